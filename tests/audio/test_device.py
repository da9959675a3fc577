import numpy as np
import pytest

from omni_adapter.audio.device import until_pause
from omni_adapter.errors import AudioError

BLOCK = 480  # 30 ms at 16 kHz


def blocks(*loudness: tuple[float, int]):
    """Blocks of noise: so many at each loudness."""
    random = np.random.default_rng(0)
    for level, count in loudness:
        for _ in range(count):
            yield (level * random.standard_normal(BLOCK)).astype(np.float32)


def test_recording_ends_a_second_after_speech():
    kept = list(until_pause(blocks((0.001, 50), (0.1, 40), (0.001, 500)), max_blocks=1000))
    assert len(kept) == 50 + 40 + 34


def test_short_pauses_do_not_end_it():
    kept = list(
        until_pause(blocks((0.001, 20), (0.1, 20), (0.001, 20), (0.1, 20), (0.001, 500)), max_blocks=1000)
    )
    assert len(kept) == 80 + 34


def test_silence_is_waited_through_up_to_the_limit():
    assert len(list(until_pause(blocks((0.0005, 5000)), max_blocks=700))) == 700


def test_noise_of_the_room_is_not_speech():
    assert len(list(until_pause(blocks((0.02, 60), (0.3, 30), (0.02, 500)), max_blocks=1000))) == 60 + 30 + 34


def test_the_keyboard_may_end_it_early():
    assert len(list(until_pause(blocks((0.1, 7)), max_blocks=1000))) == 7


def test_a_system_without_portaudio_is_named(monkeypatch):
    import builtins

    from omni_adapter.audio import device

    plain = builtins.__import__

    def refuse(name, *rest, **options):
        if name == "sounddevice":
            raise OSError("PortAudio library not found")
        return plain(name, *rest, **options)

    monkeypatch.delitem(__import__("sys").modules, "sounddevice", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        AudioError, match=r"listening needs the PortAudio library .* apt-get install libportaudio2"
    ) as error:
        next(device.record_until_pause(sampling_rate=16000, max_seconds=1))
    assert error.value.reason == "no_device"


def test_a_microphone_that_goes_away(monkeypatch):
    import sys
    import types

    from omni_adapter.audio import device

    class Microphone:
        active = False

        def __init__(self, *, callback, **settings):
            self.callback = callback

        def __enter__(self):
            block = np.full((BLOCK, 1), 0.1, dtype=np.float32)
            self.callback(block, BLOCK, None, None)
            block[:] = 0  # PortAudio uses its memory again
            return self

        def __exit__(self, *error):
            pass

    module = types.ModuleType("sounddevice")
    module.PortAudioError, module.InputStream = type("PortAudioError", (Exception,), {}), Microphone
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(device, "_PATIENCE_S", 0.01)
    recorded = device.record_until_pause(sampling_rate=16000, max_seconds=1)
    assert next(recorded).min() == np.float32(0.1)
    with pytest.raises(AudioError, match="gives no sound any more; is it still connected"):
        next(recorded)
