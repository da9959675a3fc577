"""Another codec in one file: it whistles.

    python examples/add_a_codec.py

Speech becomes the loudness of every 40 ms and the strongest frequency of every 20 ms: three rows of codes, 25
frames a second, on two levels as in SNAC. It keeps the melody of a sentence and little else, but it is a
whole codec: any class with these members can be passed as `codec=`.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from untrained_talker import make_parts

from omni_adapter import OmniAdapter
from omni_adapter.audio.codec import CodecStream, levels_from_rows, rows_from_levels
from omni_adapter.config import CodecSpec


@dataclass
class WhistleState:
    """Frames decoded so far; tones are placed by their absolute time, so nothing else is remembered."""

    first_frames: Tensor  # [B]
    num_frames: int = 0


class WhistleCodec:
    """Loudness and strongest frequency, as a codec."""

    spec = CodecSpec(sampling_rate=16_000, hop_length=320, level_strides=(2, 1), codebook_size=128)
    context_samples = (0, 0)  # a sample depends on nothing but the codes of its own frame

    lowest_hz, highest_hz = 100.0, 3000.0
    quietest_db = -60.0

    def encode(self, waveform: Tensor) -> Tensor:
        """Waveform [N] -> codes [K, T]."""
        hop, size = self.spec.hop_length, self.spec.codebook_size
        padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % self.spec.samples_per_frame))
        pieces = padded.view(-1, hop)  # [2T, hop]
        spectrum = torch.fft.rfft(pieces * torch.hann_window(hop), n=4 * hop).abs()
        hertz = torch.arange(spectrum.shape[1]) * self.spec.sampling_rate / (4 * hop)
        spectrum[:, (hertz < self.lowest_hz) | (hertz > self.highest_hz)] = 0
        strongest = hertz[spectrum.argmax(dim=1)].clamp(self.lowest_hz, self.highest_hz)
        octaves = torch.log2(strongest / self.lowest_hz) / math.log2(self.highest_hz / self.lowest_hz)
        power = pieces.view(-1, 2 * hop).square().mean(dim=1)
        loudness = 1 - 10 * torch.log10(power + 1e-12) / self.quietest_db
        levels = [(value.clamp(0, 1) * (size - 1)).round().long()[None] for value in (loudness, octaves)]
        return rows_from_levels(levels, self.spec)[0]

    def decode(self, codes: Tensor, *, first_frame: Tensor | int = 0, seed: int = 0) -> Tensor:
        """Codes [B, K, T] -> waveforms [B, T * samples_per_frame]."""
        state = self.start(batch_size=len(codes), first_frame=first_frame, seed=seed)
        return self.decode_chunk(codes, state, last=True)

    def start(self, *, batch_size: int = 1, first_frame: Tensor | int = 0, seed: int = 0) -> WhistleState:
        """A new stream; nothing is drawn here, so that the seed has no use."""
        return WhistleState(torch.as_tensor(first_frame).expand(batch_size))

    def decode_chunk(self, codes: Tensor, state: WhistleState, *, last: bool = False) -> Tensor:
        """The next codes [B, K, n] -> all of their samples, since none is held back."""
        hop = self.spec.hop_length
        loudness, octaves = (
            level.double() / (self.spec.codebook_size - 1)
            for level in levels_from_rows(codes.cpu(), self.spec)
        )
        hertz = self.lowest_hz * (self.highest_hz / self.lowest_hz) ** octaves  # [B, 2n]
        volume = 10 ** ((1 - loudness) * self.quietest_db / 20) * (loudness > 0)  # [B, n]
        first = 2 * (state.first_frames + state.num_frames)[:, None] + torch.arange(hertz.shape[1])  # [B, 2n]
        time_s = (first[..., None] * hop + torch.arange(hop)) / self.spec.sampling_rate  # [B, 2n, hop]
        fade = torch.hann_window(hop, periodic=False, dtype=torch.float64)  # no clicks where tones change
        tones = torch.sin(2 * torch.pi * hertz[..., None] * time_s) * fade
        state.num_frames += codes.shape[-1]
        return (tones * volume.repeat_interleave(2, dim=1)[..., None]).flatten(1).clamp(-1, 1).float()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this codec from another."""
        return {"kind": "whistle", "lowest_hz": self.lowest_hz, "highest_hz": self.highest_hz}

    def save_pretrained(self, folder: str | Path) -> None:
        """There are no weights; the facts are enough."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.fingerprint()), encoding="utf-8")


def main() -> None:
    codec = WhistleCodec()
    codes = torch.randint(codec.spec.codebook_size, (codec.spec.num_codebooks, 10))
    stream = CodecStream(codec)
    pieces = [stream.push(piece) for piece in codes.split(3, dim=1)] + [stream.finish()]
    print(f"streamed equals whole: {torch.equal(torch.cat(pieces), codec.decode(codes[None])[0])}")

    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
    heard = codec.decode(codec.encode(tone)[None])[0]
    peak_hz = torch.fft.rfft(heard).abs().argmax() * codec.spec.sampling_rate / len(heard)
    print(f"a tone of 440 Hz comes back at {peak_hz:.0f} Hz")

    parts = make_parts()
    talker = OmniAdapter.wrap(
        parts.lm, tokenizer=parts.tokenizer, encoder=parts.whisper, codec=codec, tts_layers=1
    )
    with tempfile.TemporaryDirectory() as folder:
        talker.save_pretrained(folder, include=("base", "encoder", "codec"))
        again = OmniAdapter.from_pretrained(folder, codec=WhistleCodec())  # your class, so you make it
    reply = again.chat(text="What is the capital of France?", max_new_tokens=40)
    print(f"whistled {reply.duration_s:.1f} s at {reply.sampling_rate} Hz")


if __name__ == "__main__":
    main()
