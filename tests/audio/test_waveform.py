import io
import logging
import multiprocessing
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.audio.waveform import WaveformStream, WavWriter, read_waveform, write_wav
from omni_adapter.errors import AudioError

RATE = 16000


def tone(seconds=1.0, rate=RATE, *, level=0.5, hz=440.0):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def as_file(samples, rate=RATE, *, kind="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def reason_of(source, **options):
    with pytest.raises(AudioError) as error:
        read_waveform(source, sampling_rate=RATE, **options)
    return error.value.reason


FORMATS = [  # format, subtype, largest error of a sample
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "PCM_24", 1e-6),
    ("WAV", "PCM_32", 1e-6),
    ("WAV", "FLOAT", 0.0),
    ("WAV", "DOUBLE", 0.0),
    ("WAV", "ULAW", 0.05),
    ("AIFF", "PCM_16", 1e-4),
    ("FLAC", "PCM_16", 1e-4),
    ("FLAC", "PCM_24", 1e-6),
    ("OGG", "VORBIS", 0.1),
    ("OGG", "OPUS", 0.1),
    ("MP3", "MPEG_LAYER_III", 0.1),
]


@pytest.mark.parametrize(("kind", "subtype", "error"), FORMATS)
def test_every_format(kind, subtype, error):
    samples = tone()
    waveform = read_waveform(as_file(samples, kind=kind, subtype=subtype), sampling_rate=RATE)
    assert waveform.dtype == torch.float32
    assert waveform.shape == samples.shape
    assert np.abs(waveform.numpy() - samples)[800:-800].max() <= error


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_any_rate_keeps_duration_and_tone(rate):
    stereo = np.stack([tone(1.3, rate), tone(1.3, rate)], axis=1)
    waveform = read_waveform(as_file(stereo, rate), sampling_rate=RATE).numpy()
    assert abs(len(waveform) - 1.3 * RATE) <= 1
    inside = slice(800, len(waveform) - 800)
    assert np.abs(waveform - tone(2)[: len(waveform)])[inside].max() < 2e-3


def test_every_kind_of_source_gives_the_same(tmp_path):
    samples = tone()
    data = as_file(samples, subtype="FLOAT")
    path = tmp_path / "tone.wav"
    path.write_bytes(data)
    sources = [path, str(path), data, io.BytesIO(data), samples, torch.from_numpy(samples)]
    sources += [(samples, RATE), (torch.from_numpy(samples), RATE), samples[:, None], samples[None, :]]
    sources += [samples.astype(np.float64)]
    with path.open("rb") as file:
        for source in [*sources, file]:
            waveform = read_waveform(source, sampling_rate=RATE, array_rate=RATE)
            assert torch.equal(waveform, torch.from_numpy(samples))


def test_integers_are_scaled_by_their_type():
    samples = tone()
    for dtype, scale, middle in ((np.int16, 32768, 0), (np.int32, 2**31, 0), (np.uint8, 128, 128)):
        integers = (samples.astype(np.float64) * (scale - 1) + middle).astype(dtype)
        waveform = read_waveform((integers, RATE), sampling_rate=RATE).numpy()
        assert np.abs(waveform - samples).max() < 2 / scale + 1e-6


def test_blocks_do_not_show(monkeypatch):
    data = as_file(tone(1.0, 44100), 44100)
    whole = read_waveform(data, sampling_rate=RATE)
    monkeypatch.setattr("omni_adapter.audio.waveform._BLOCK_VALUES", 1000)
    torch.testing.assert_close(read_waveform(data, sampling_rate=RATE), whole, rtol=0, atol=1e-6)


def test_inverted_stereo_is_heard_and_warned_about(caplog):
    stereo = np.stack([tone(), -tone()], axis=1)
    for source in (as_file(stereo), (stereo, RATE)):
        with caplog.at_level(logging.WARNING):
            waveform = read_waveform(source, sampling_rate=RATE)
        assert waveform.abs().max() > 0.49
        assert "channels cancel each other" in caplog.text
        caplog.clear()


def test_louder_than_one_is_scaled_down_and_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        waveform = read_waveform(as_file(tone(level=2.0), subtype="FLOAT"), sampling_rate=RATE)
    assert waveform.abs().max() <= 1.0
    assert np.abs(waveform.numpy() - tone(level=1.0)).max() < 1e-2
    assert "scaled down" in caplog.text


def patched(data, start, replacement):
    return data[:start] + replacement + data[start + len(replacement) :]


WAV, FLAC = as_file(tone()), as_file(tone(), kind="FLAC")
NOT_FINITE = tone()
NOT_FINITE[8000] = np.nan
NO_LENGTH = patched(FLAC, 21, bytes([FLAC[21] & 0xF0, 0, 0, 0, 0]))
BOMB = patched(FLAC, 21, bytes([FLAC[21] | 0x0F, 255, 255, 255, 255]))

BROKEN = [
    ("no bytes", b"", "empty", "no bytes"),
    ("no samples", as_file(tone(0)), "empty", "no samples"),
    ("header only", WAV[:44], "empty", "no samples"),
    ("torn header", WAV[:20], "empty", "within its header"),
    ("torn wav", WAV[: len(WAV) // 2], "truncated", "15978 of 32000 bytes"),
    ("torn flac", FLAC[: len(FLAC) // 2], "truncated", "truncated"),
    (
        "torn mp3",
        as_file(tone(9), kind="MP3", subtype="MPEG_LAYER_III")[:4000],
        "truncated",
        "of 144000 samples",
    ),
    ("text", b"this is no audio at all" * 99, "unreadable", "not audio"),
    ("zip", b"PK\x03\x04" + bytes(999), "unreadable", "not audio"),
    ("0 Hz", patched(WAV, 24, bytes(4)), "unreadable", "not audio"),
    (
        "rare encoding",
        as_file(tone(), subtype="IMA_ADPCM"),
        "unsupported",
        "IMA_ADPCM in WAV, which is not decoded",
    ),
    ("rare container", as_file(tone(), kind="VOC"), "unsupported", "PCM_16 in VOC, which is not decoded"),
    ("NaN", as_file(NOT_FINITE, subtype="FLOAT"), "not_finite", "NaN"),
    ("infinity", as_file(np.full(RATE, np.inf), subtype="FLOAT"), "not_finite", "NaN"),
    ("silence", as_file(np.zeros(RATE)), "silent", "is silent"),
    ("almost silence", as_file(tone(level=5e-5), subtype="FLOAT"), "silent", "is silent"),
    ("not in -1..1", as_file(tone(level=20000.0), subtype="FLOAT"), "out_of_range", "reach 2e"),
    ("header claims 50 days", BOMB, "too_long", "at most 1800 s"),
]


@pytest.mark.parametrize(
    ("data", "reason", "text"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_broken_recordings_say_what_is_wrong(data, reason, text, tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(AudioError, match=text) as error:
            read_waveform(source, sampling_rate=RATE)
        assert error.value.reason == reason


def test_silence_is_fine_when_asked_for():
    assert read_waveform(as_file(np.zeros(RATE)), sampling_rate=RATE, allow_silent=True).shape == (RATE,)


@pytest.mark.parametrize("data", [as_file(tone(3)), patched(WAV, 40, b"\xff" * 4)])
def test_length_limit(data):
    seconds = len(read_waveform(data, sampling_rate=RATE)) / RATE
    assert len(read_waveform(data, sampling_rate=RATE, max_seconds=seconds)) == seconds * RATE
    assert reason_of(data, max_seconds=seconds - 0.1) == "too_long"


def test_length_limit_counts_what_is_decoded_where_the_header_does_not_say():
    assert len(read_waveform(NO_LENGTH, sampling_rate=RATE)) == RATE
    assert reason_of(NO_LENGTH, max_seconds=0.5) == "too_long"
    assert reason_of((tone(2), RATE), max_seconds=1) == "too_long"


def test_ten_minutes_are_read_whole():
    data = as_file(np.tile(tone(), 600), kind="FLAC")
    assert len(read_waveform(data, sampling_rate=RATE)) == 600 * RATE


def _read_bomb_in_little_memory(path, answer):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20),) * 2)
    answer.send(reason_of(path))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory by /proc")
def test_a_header_never_decides_about_memory(tmp_path):
    path = tmp_path / "bomb.flac"
    path.write_bytes(BOMB)
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_read_bomb_in_little_memory, args=(path, send))
    child.start()
    assert receive.poll(30)
    assert receive.recv() == "too_long"
    child.join()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (17, "wrong_type"),
        (None, "wrong_type"),
        (np.zeros((2, 3, 4)), "wrong_type"),
        (np.zeros((1000, 1000)), "wrong_type"),
        (np.array(["a", "b"]), "wrong_type"),
        (np.zeros(5, dtype=complex), "wrong_type"),
        (np.zeros(0), "empty"),
        ((tone(), 0), "bad_rate"),
        ((tone(), "16000"), "bad_rate"),
        ((tone(), 16000.5), "bad_rate"),
        ("no/such/file.wav", "not_found"),
        ("What is the capital of France? " * 99, "not_found"),
        ("bad\0name", "not_found"),
        (Path(), "not_found"),
    ],
)
def test_wrong_sources(source, reason):
    assert reason_of(source, array_rate=RATE) == reason


def test_an_array_needs_a_rate():
    with pytest.raises(AudioError, match=r"pass \(samples, rate\)") as error:
        read_waveform(tone(), sampling_rate=RATE)
    assert error.value.reason == "bad_rate"


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_raise_anything_but_our_error(noise, start):
    for data in (noise, patched(WAV, start, noise), patched(FLAC, start, noise)):
        try:
            waveform = read_waveform(data, sampling_rate=RATE)
        except AudioError:
            continue
        assert waveform.isfinite().all()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_real_speech(tmp_path):
    path = tmp_path / "speech.wav"
    subprocess.run(["espeak-ng", "-w", str(path), "What is the capital of France?"], check=True)
    info = soundfile.info(path)
    waveform = read_waveform(path, sampling_rate=RATE)
    assert abs(len(waveform) - info.duration * RATE) <= 1
    assert 0.1 < waveform.abs().max() <= 1.0


class TestWriting:
    @pytest.mark.parametrize("chunks", [tone(), torch.from_numpy(tone()), np.split(tone(), 10), []])
    def test_written_is_read(self, chunks, tmp_path):
        path = tmp_path / "out.wav"
        write_wav(path, chunks, sampling_rate=24000)
        samples, rate = soundfile.read(path)
        assert rate == 24000
        expected = tone() if len(chunks) else np.zeros(0)
        assert len(samples) == len(expected)
        assert not len(samples) or np.abs(samples - expected).max() < 1e-4

    def test_header_is_right_after_every_chunk(self, tmp_path):
        path = tmp_path / "out.wav"
        with WavWriter(path, sampling_rate=24000) as wav:
            assert soundfile.info(path).frames == 0
            for count in range(1, 4):
                wav.write(tone()[:1000])
                assert soundfile.info(path).frames == 1000 * count == wav.num_samples
                assert path.stat().st_size == 44 + 2 * wav.num_samples

    def test_loud_samples_are_clipped_not_wrapped(self, tmp_path):
        write_wav(tmp_path / "out.wav", np.array([2.0, -2.0]), sampling_rate=24000)
        samples, _ = soundfile.read(tmp_path / "out.wav")
        assert samples[0] > 0.99
        assert samples[1] < -0.99

    def test_errors(self, tmp_path):
        with pytest.raises(AudioError, match="cannot be written"):
            WavWriter(tmp_path / "no" / "folder.wav", sampling_rate=24000)
        with WavWriter(tmp_path / "out.wav", sampling_rate=24000) as wav:
            with pytest.raises(AudioError, match="NaN"):
                wav.write(np.array([np.nan]))
            with pytest.raises(AudioError, match=r"floats of the shape \[n\], got int64"):
                wav.write(np.zeros((2, 2), dtype=np.int64))


# --- a recording that still grows ---


def streamed(samples, rate, sizes, *, sampling_rate=16000):
    stream = WaveformStream(sampling_rate=sampling_rate)
    parts, start = [], 0
    for size in sizes:
        parts.append(stream.append(samples[start : start + size], sampling_rate=rate))
        start += size
    parts.append(stream.append(samples[start:], sampling_rate=rate))
    return torch.cat([*parts, stream.finish()])


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("sizes", [[], [1] * 50, [441, 0, 3000, 17]])
def test_streamed_equals_read(rate, sizes):
    samples = (0.3 * np.random.default_rng(0).standard_normal((rate // 2, 2))).astype(np.float32)
    samples = samples.clip(-1, 1)
    expected = read_waveform((samples, rate), sampling_rate=16000)
    torch.testing.assert_close(streamed(samples, rate, sizes), expected, rtol=0, atol=1e-6)


def test_streamed_bytes_may_be_cut_anywhere():
    samples = (3000 * np.sin(np.arange(2000))).astype(np.int16)
    pcm = samples.tobytes()
    expected = read_waveform((samples, 16000), sampling_rate=16000)
    for sizes in ([3, 1, 7, 500], [1] * 9):
        assert torch.equal(streamed(pcm, 16000, sizes), expected)


def test_streamed_loud_samples_are_clipped_with_one_warning(caplog):
    stream = WaveformStream(sampling_rate=16000)
    for _ in range(2):
        assert stream.append(np.array([0.5, 1.5]), sampling_rate=16000).tolist() == [0.5, 1.0]
    assert [record.getMessage() for record in caplog.records] == [
        "the recording reaches 1.5; clipped to -1..1"
    ]
    assert stream.duration_s == 4 / 16000


@pytest.mark.parametrize(
    ("samples", "rate", "reason", "message"),
    [
        (np.zeros(4), 8000, "bad_rate", "it began at 16000 Hz, got 8000 Hz"),
        (np.zeros(4), 0, "bad_rate", "whole number from 1000 to 1000000 Hz, got 0"),
        (np.zeros((2, 3, 4)), 16000, "wrong_type", r"\[n\] or \[n, channels\], got \[2, 3, 4\]"),
        ([0.0], 16000, "wrong_type", "an array, a tensor or bytes of 16-bit PCM, got list"),
        (np.zeros(4, dtype=complex), 16000, "wrong_type", "floats or integers, got complex128"),
        (np.array([0.0, np.nan]), 16000, "not_finite", "NaN or infinity after 0.2 s"),
        (np.array([0.0, 300.0]), 16000, "out_of_range", "samples reach 300"),
        (np.zeros(17000), 16000, "too_long", "at least 1 s long, at most 1 s are read"),
    ],
)
def test_a_bad_piece_leaves_the_stream_as_it_was(samples, rate, reason, message):
    stream = WaveformStream(sampling_rate=8000, max_seconds=1)
    good = (0.1 * np.random.default_rng(0).standard_normal(3000)).astype(np.float32)
    first = stream.append(good, sampling_rate=16000)
    with pytest.raises(AudioError, match=message) as caught:
        stream.append(samples, sampling_rate=rate)
    assert caught.value.reason == reason
    rest = stream.append(good, sampling_rate=16000)
    whole = read_waveform((np.concatenate((good, good)), 16000), sampling_rate=8000)
    torch.testing.assert_close(torch.cat((first, rest, stream.finish())), whole, rtol=0, atol=1e-6)


def test_a_stream_of_nothing_and_one_that_is_over():
    with pytest.raises(AudioError, match="no samples came") as caught:
        WaveformStream(sampling_rate=16000).finish()
    assert caught.value.reason == "empty"
    stream = WaveformStream(sampling_rate=16000)
    stream.append(np.zeros(100), sampling_rate=16000)
    with pytest.raises(AudioError, match="the recording is silent") as caught:
        stream.finish()
    assert caught.value.reason == "silent"
    stream.finish(allow_silent=True)
    with pytest.raises(AudioError, match="is over; begin a new one") as caught:
        stream.append(np.zeros(100), sampling_rate=16000)
    assert caught.value.reason == "over"
