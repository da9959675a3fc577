import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from omni_adapter.audio.features import LogMel, LogMelState
from omni_adapter.errors import AudioError, CheckpointError, ConfigError

RATE = 16000
SHORT = LogMel(80, window_seconds=1)  # windows of one second keep tests fast


def noise(num_samples, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(num_samples, generator=generator)


def test_window_is_whispers_own_arithmetic():
    waveform = noise(3 * RATE)
    expected = WhisperFeatureExtractor()(
        waveform.numpy(), sampling_rate=RATE, return_tensors="pt"
    ).input_features
    (window,) = LogMel().windows(waveform, padding="window")
    assert window.values.dtype == torch.float32
    assert torch.equal(window.values, expected[0])
    assert window.length == 300


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3 * RATE + 500))
@example(1)
@example(159)
@example(160)
@example(161)
@example(RATE - 1)
@example(RATE)
@example(RATE + 1)
def test_number_of_frames_is_known_beforehand(num_samples):
    windows = SHORT.windows(noise(num_samples))
    assert [window.length for window in windows] == SHORT.num_frames(num_samples)
    assert [window.values.shape for window in windows] == [(80, window.length) for window in windows]
    # Nothing is dropped: the frames cover every sample, and not one frame more than needed.
    covered = sum(window.length for window in windows) * SHORT.hop_length
    assert num_samples <= covered < num_samples + SHORT.hop_length
    assert all(window.values.isfinite().all() for window in windows)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2 * RATE))
@example(RATE - 399)
def test_true_length_is_the_beginning_of_the_full_window(num_samples):
    waveform = noise(num_samples)
    cut, full = (SHORT.windows(waveform, padding=padding) for padding in ("true_length", "window"))
    for short, long in zip(cut, full, strict=True):
        assert long.values.shape == (80, SHORT.window_frames)
        assert short.length == long.length
        torch.testing.assert_close(short.values, long.values[:, : short.length], rtol=0, atol=1e-5)


def test_long_recordings_become_several_windows():
    waveform = noise(2 * RATE + 4000)
    windows = SHORT.windows(waveform)
    assert [window.length for window in windows] == [100, 100, 25]
    for window, part in zip(windows, waveform.split(RATE), strict=True):
        assert torch.equal(window.values, SHORT.windows(part)[0].values)


def test_equal_to_the_whisper_package():
    whisper_audio = pytest.importorskip("whisper.audio")
    waveform = noise(2 * RATE)
    padded = whisper_audio.pad_or_trim(waveform.numpy())
    for num_mel_bins in (80, 128):
        expected = whisper_audio.log_mel_spectrogram(padded, n_mels=num_mel_bins)
        (window,) = LogMel(num_mel_bins).windows(waveform, padding="window")
        torch.testing.assert_close(window.values, expected, rtol=0, atol=1e-4)


def test_save_and_load(tmp_path):
    log_mel = LogMel(128, window_seconds=0.5)
    log_mel.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    loaded = LogMel.from_pretrained(tmp_path)
    assert (loaded.num_mel_bins, loaded.window_frames, loaded.sampling_rate) == (128, 50, RATE)
    waveform = noise(RATE)
    for ours, theirs in zip(log_mel.windows(waveform), loaded.windows(waveform), strict=True):
        assert torch.equal(ours.values, theirs.values)


def test_errors(tmp_path):
    with pytest.raises(AudioError, match="no samples"):
        SHORT.windows(torch.zeros(0))
    with pytest.raises(AudioError, match=r"float samples \[N\], got torch.int16 \[2, 5\]"):
        SHORT.windows(torch.zeros(2, 5, dtype=torch.int16))
    with pytest.raises(ConfigError, match="whole number of feature frames"):
        LogMel(window_seconds=0.0051)
    with pytest.raises(CheckpointError, match=r"no usable preprocessor_config\.json"):
        LogMel.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"hop_length": "far"}))
    with pytest.raises(CheckpointError, match=r"no usable preprocessor_config\.json"):
        LogMel.from_pretrained(tmp_path)


def test_no_recording_takes_no_frames():
    assert SHORT.num_frames(0) == []
    assert np.sum(SHORT.num_frames(10)) == 1


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    # The original keeps int(milliseconds / 20) + 1 steps of two frames each, of a window of 1500.
    [(1, [1]), (319, [2]), (320, [3]), (321, [3]), (16_000, [101]), (480_000, [3000]), (480_160, [3000, 2])],
)
def test_frames_as_the_original_counts_them(num_samples, frames):
    log_mel = LogMel(80)
    assert log_mel.num_frames(num_samples, padding="mini_omni") == frames
    if num_samples < log_mel.window_samples:
        assert -(-frames[0] // 2) == int(num_samples / 16_000 * 1000 / 20) + 1
    windows = log_mel.windows(torch.ones(num_samples), padding="mini_omni")
    assert [window.length for window in windows] == frames
    assert all(window.values.shape[-1] == log_mel.window_frames for window in windows)


# --- sound that still grows ---


def grown(log_mel, waveform, sizes, *, padding="true_length", block_frames=None):
    """Features of a recording that comes in pieces, joined window by window."""
    state = LogMelState(block_frames)
    windows, pieces = [], []
    parts = list(waveform.split(sizes))
    for index, part in enumerate(parts):
        for new in log_mel.append(part, state, padding=padding, last=index + 1 == len(parts)):
            pieces.append(new)
            if new.ends_window:
                values = torch.cat([piece.values for piece in pieces], dim=1)
                windows.append((values, sum(piece.length for piece in pieces)))
                pieces = []
    assert pieces == []
    return windows


def random_sizes(total, seed):
    generator = np.random.default_rng(seed)
    sizes = []
    while total:
        sizes.append(min(total, int(generator.choice([1, 17, 160, 401, 2000, 9000]))))
        total -= sizes[-1]
    return sizes


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2 * RATE + 500), st.integers(0, 1000), st.sampled_from([None, 1, 4, 30, 200]))
@example(RATE, 0, None)
@example(RATE, 1, 10)
@example(200, 0, 2)
@example(201, 0, 2)
def test_growing_equals_whole(num_samples, seed, block_frames):
    waveform = noise(num_samples, seed=seed)
    waveform[: num_samples // 2] *= 1e-6  # what comes first lies under the floor that the rest sets
    whole = SHORT.windows(waveform, block_frames=block_frames)
    windows = grown(SHORT, waveform, random_sizes(num_samples, seed), block_frames=block_frames)
    for (values, length), expected in zip(windows, whole, strict=True):
        assert length == expected.length
        torch.testing.assert_close(values, expected.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("padding", ["window", "whole_window", "mini_omni"])
def test_growing_equals_whole_with_the_silence_of_a_window(padding):
    waveform = noise(RATE + 5000)
    windows = grown(SHORT, waveform, random_sizes(len(waveform), 0), padding=padding)
    for (values, length), expected in zip(windows, SHORT.windows(waveform, padding=padding), strict=True):
        assert length == expected.length
        torch.testing.assert_close(values, expected.values, rtol=0, atol=1e-4)


def test_frames_are_given_out_as_soon_as_nothing_can_change_them():
    state, given = LogMelState(block_frames=10), []
    for part in noise(RATE // 2).split(40):
        given.append(sum(new.length for new in SHORT.append(part, state)))
    # Frame 10 ends the first block; its Fourier transform ends 200 samples after its centre.
    assert [(index + 1) * 40 for index, count in enumerate(given) if count] == [1800, 3400, 5000, 6600]
    assert [count for count in given if count] == [11, 10, 10, 10]


def test_blocks_do_not_hear_the_future():
    quiet, loud = 1e-7 * noise(RATE // 2), noise(RATE // 2, seed=1)
    (alone,) = SHORT.windows(quiet, block_frames=10)
    (both,) = SHORT.windows(torch.cat((quiet, loud)), block_frames=10)
    assert torch.equal(both.values[:, :41], alone.values[:, :41])
    (whisper,) = SHORT.windows(torch.cat((quiet, loud)))
    assert (
        whisper.values[:, :41] - both.values[:, :41]
    ).min() > 0.3  # Whisper raises the quiet part afterwards


def test_blocks_are_whispers_features_once_the_loudest_has_been():
    waveform = noise(RATE)
    waveform[500] = 1.0
    (blocks,), (whole,) = SHORT.windows(waveform, block_frames=10), SHORT.windows(waveform)
    torch.testing.assert_close(blocks.values, whole.values, rtol=0, atol=1e-4)
    assert not torch.allclose(blocks.values[:, 1:], whole.values[:, :-1], atol=1e-2)


def test_blocks_take_true_lengths_only():
    with pytest.raises(ConfigError, match="go with padding=\"true_length\", got 'window'"):
        SHORT.windows(noise(100), padding="window", block_frames=10)


def test_growing_takes_float_samples_only():
    with pytest.raises(AudioError, match=r"float samples \[N\], got torch.int16 \[5\]"):
        SHORT.append(torch.zeros(5, dtype=torch.int16), LogMelState())
