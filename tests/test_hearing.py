"""What is heard while it is spoken is what is heard of the whole recording."""

import numpy as np
import pytest
import torch

from omni_adapter import OmniAdapter
from omni_adapter.audio.clips import Clips
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.config import AudioAdapterConfig
from omni_adapter.errors import AudioError, ConfigError
from omni_adapter.hearing import Blocks, Hearing, measure_hearing_error
from tests.talkers import fresh_talker

RATE = 16000


@pytest.fixture(scope="module")
def waveform(question):
    return read_waveform(question, sampling_rate=RATE)


@pytest.fixture(scope="module")
def blocks_talker():
    return fresh_talker(encoder_block_seconds=0.4, audio_adapter=AudioAdapterConfig(stack=3))


def heard_whole(talker, waveform):
    windows = talker.processor.log_mel.windows(
        waveform, padding=talker.config.encoder_padding, block_frames=talker.processor.block_frames
    )
    with torch.no_grad():
        return talker.model.hear(Clips.of([windows]))[0]


def heard_in_pieces(hearing, waveform, seed):
    generator, parts = np.random.default_rng(seed), []
    while len(waveform):
        size = int(generator.choice([0, 1, 480, 1600, 7000]))
        parts.append(hearing.append(waveform[:size]))
        waveform = waveform[size:]
    return torch.cat([*parts, hearing.finish()]), parts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_as_they_come_equal_the_whole(blocks_talker, waveform, seed):
    hearing = Hearing(blocks_talker.model, blocks_talker.processor.log_mel)
    embeddings, parts = heard_in_pieces(hearing, waveform, seed)
    expected = heard_whole(blocks_talker, waveform)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    early = sum(len(part) for part in parts)
    assert len(expected) - early <= 20 / 3 + 1  # all but the last block was known before the end
    assert hearing.frames.shape == (-(-len(waveform) // 320), blocks_talker.config.encoder_width)


def test_whole_windows_wait_for_the_end(talker, waveform):
    hearing = Hearing(talker.model, talker.processor.log_mel)
    embeddings, parts = heard_in_pieces(hearing, waveform, 0)
    assert not any(len(part) for part in parts)
    expected = heard_whole(talker, waveform)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("block_seconds", [None, 0.4])
def test_more_than_one_window(waveform, block_seconds):
    talker = fresh_talker(encoder_block_seconds=block_seconds, audio_adapter=AudioAdapterConfig(stack=7))
    long = waveform.repeat(20)[: 31 * RATE]
    hearing = Hearing(talker.model, talker.processor.log_mel)
    parts = [hearing.append(part) for part in long.split(50_000)]
    assert sum(len(part) for part in parts) >= 1500 // 7  # the first window was encoded when it was full
    expected = heard_whole(talker, long)
    torch.testing.assert_close(
        torch.cat([*parts, hearing.finish()]), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_the_silence_of_a_window_is_waited_for(waveform):
    talker = fresh_talker(encoder_padding="window")
    hearing = Hearing(talker.model, talker.processor.log_mel)
    embeddings, _ = heard_in_pieces(hearing, waveform, 0)
    expected = heard_whole(talker, waveform)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_roughly_in_blocks_and_how_roughly(talker, waveform):
    log_mel = talker.processor.log_mel
    small, large, ahead, one = (
        measure_hearing_error(talker.model, log_mel, waveforms=[waveform], blocks=blocks)
        for blocks in (Blocks(0.1, 0), Blocks(1.0, 0), Blocks(0.1, 0.9), Blocks(30.0, 0))
    )
    assert small.seconds == len(waveform) / RATE
    assert 1e-3 < large.embeddings < small.embeddings < 2
    assert 1e-3 < large.frames < small.frames < 2
    assert ahead.embeddings < small.embeddings
    assert small.worst_embedding > small.embeddings
    assert one.embeddings < 1e-4  # one block holds the window, and its loudest frame
    exact = heard_whole(talker, waveform)
    rough = Hearing(talker.model, log_mel, blocks=Blocks(0.1, 0)).finish(waveform)
    assert float((rough - exact).norm() / exact.norm()) == pytest.approx(small.embeddings, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_looking_ahead_does_not_depend_on_the_pieces(talker, waveform, seed):
    blocks, log_mel = Blocks(0.3, 0.5), talker.processor.log_mel
    hearing = Hearing(talker.model, log_mel, blocks=blocks)
    embeddings, parts = heard_in_pieces(hearing, waveform, seed)
    expected = Hearing(talker.model, log_mel, blocks=blocks).finish(waveform)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    early = sum(len(part) for part in parts)
    assert 0 < len(expected) - early <= 40 + 5  # a block, what it looks ahead, and what comes in groups


def test_how_a_talker_hears_is_saved_with_it(blocks_talker, question, tmp_path):
    blocks_talker.save_pretrained(tmp_path, include=("base", "encoder", "codec"))
    loaded = OmniAdapter.from_pretrained(tmp_path)
    assert loaded.config.encoder_block_seconds == 0.4
    assert (
        loaded.chat(question, max_new_tokens=12).text == blocks_talker.chat(question, max_new_tokens=12).text
    )


def test_errors(blocks_talker, talker):
    log_mel = talker.processor.log_mel
    with pytest.raises(ConfigError, match=r"hears in blocks of 0\.4 s and in no others"):
        Hearing(blocks_talker.model, log_mel, blocks=Blocks(0.2))
    padded = fresh_talker(encoder_padding="window")
    with pytest.raises(ConfigError, match="encoder_padding='window', which needs the recording's end"):
        Hearing(padded.model, log_mel, blocks=Blocks(0.2))
    with pytest.raises(ConfigError, match=r"multiple of the encoder's 0\.02 s a frame"):
        Hearing(talker.model, log_mel, blocks=Blocks(0.25001))
    with pytest.raises(ConfigError, match=r"longer than 0 s and look ahead 0 s or more, got 0 s and 1 s"):
        Blocks(0)
    with pytest.raises(AudioError, match="nothing to hear"):
        Hearing(talker.model, log_mel).finish()
