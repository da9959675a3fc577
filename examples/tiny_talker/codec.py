"""Train the tiny talker's codec: a small SNAC that knows one voice.

    python examples/tiny_talker/codec.py --data build/tiny/world --out build/tiny/codec
    python examples/tiny_talker/codec.py --encode build/tiny/world/rows_train.jsonl

Wavs of ``DATA/voice`` -> a codec that ``SnacCodec.from_pretrained(OUT)`` loads. The second command adds the
codes of the answers to rows, in a file beside them. Knows nothing of texts or language models. The first one
goes on after a stop, from the state in ``OUT-training``.

What is known of speech makes it quick, in three parts:

1. codes: a small network reads the log-mel spectrum, and SNAC's quantizer learns to keep it, each level
   saying what the coarser ones leave open. At first every level passes its (unit) vector on as it is; then
   k-means of those vectors become the codebooks, and every level passes its nearest code on.
2. decoder: with codes that stay as they are, SNAC's decoder learns to make sound of them. Whatever else needs
   codes can be trained beside it.
3. encoder: SNAC's own encoder, which hears samples instead of a spectrum and therefore learns slowly, learns
   to choose the same codes. It comes near them only: data for training is encoded by the second command.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import snac
import torch
import torch.nn.functional as F
from snac.vq import VectorQuantize
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from omni_adapter.audio.codec import SnacCodec, rows_from_levels
from omni_adapter.audio.waveform import read_waveform

sys.path.insert(0, str(Path(__file__).resolve().parent))

from part_training import STATE_FILE, mixed_precision, pick_device, training_folder, write_state

MODEL = {
    "sampling_rate": 24_000,
    "encoder_dim": 16,
    "encoder_rates": [8, 4, 4, 4],
    "decoder_dim": 256,
    "decoder_rates": [4, 4, 4, 8],
    "attn_window_size": None,
    "codebook_size": 512,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": False,
}


PARTS = ("codes", "decoder", "encoder")
"""What is trained, in this order."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        model: arguments of ``snac.SNAC``.
        steps: how long each part learns.
        rates: peak of each part's learning rate, which rises, then falls along a cosine.
        warmup_steps: steps over which it rises.
        free_steps: first steps of the codes, without codes.
        refresh_steps: steps between two k-means of the codebooks, up to half of the codes' steps.
        mel_batch: pieces of a spectrum in a step of the codes.
        mel_crop: latents in such a piece.
        batch_size: crops of sound in a step of decoder and encoder.
        crop: latents in such a crop, whole frames.
        commitment: weight of the vectors' distance to their codes.
        code_memory: a code is the mean of about so many vectors.
        validation_files: files at the end that are only listened to.
        seed: seed of weights, crops and noise.
        compile: whether to compile encoder and decoder, worth it for some hundred steps and more.
    """

    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    steps: Mapping[str, int] = field(
        default_factory=lambda: {"codes": 1_500, "decoder": 12_000, "encoder": 5_200}
    )
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"codes": 1.5e-3, "decoder": 6e-4, "encoder": 8e-4}
    )
    warmup_steps: int = 100
    free_steps: int = 300
    refresh_steps: int = 200
    mel_batch: int = 16
    mel_crop: int = 96
    batch_size: int = 3
    crop: int = 24
    commitment: float = 0.1
    code_memory: int = 10
    validation_files: int = 16
    seed: int = 0
    compile: bool = True


class Quantised(NamedTuple):
    """What the codes of all levels stand for."""

    latents: list[Tensor]  # up to each level, [B, C, T]
    commitment: Tensor  # squared distance of the vectors to their codes, as a share of their variance
    vectors: list[Tensor]  # per level, unit vectors [n, codebook_dim]
    codes: list[Tensor]  # per level, [n]; none without codes


class LogMel(nn.Module):
    """Spectra of waveforms.

    Args:
        window: samples in a window.
        step: samples from one window to the next.
        num_mels: mel bands.
        sampling_rate: Hz.
    """

    def __init__(self, window: int, step: int, num_mels: int, sampling_rate: int) -> None:
        super().__init__()
        self.window, self.step = window, step
        filters = mel_filter_bank(window // 2 + 1, num_mels, 0.0, sampling_rate / 2, sampling_rate)
        self.register_buffer("mels", torch.from_numpy(filters).float().T.contiguous(), persistent=False)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def magnitude(self, waveform: Tensor) -> Tensor:
        """Waveforms [B, N] -> magnitudes in parts of full scale, [B, window / 2 + 1, columns]."""
        spectrum = torch.stft(
            waveform, self.window, self.step, window=self.hann, center=False, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return (power + 1e-10).sqrt() * (2 / self.hann.sum())

    def log_mel(self, magnitude: Tensor) -> Tensor:
        """Magnitudes -> logarithms of mel bands, down to about where 16-bit sound ends."""
        return (self.mels @ magnitude).clamp_min(1e-4).log()

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveforms [B, N] -> [B, mels, columns]."""
        return self.log_mel(self.magnitude(waveform))


class SpectralLoss(nn.Module):
    """Distance of two waveforms: their mel and linear spectra in windows from 5 to 85 ms.

    Only magnitudes are compared. Shorter windows would ask the codes to say when each pulse of the voice
    comes, which nobody hears and a language model cannot predict.
    """

    def __init__(self, sampling_rate: int, windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)) -> None:
        super().__init__()
        # No more mel bands than a window can tell apart.
        spectra = [LogMel(window, window // 4, min(128, window // 12), sampling_rate) for window in windows]
        self.spectra = nn.ModuleList(spectra)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """Waveforms [B, N] -> mean distance over windows."""
        return torch.stack([self._distance(spectra, made, real) for spectra in self.spectra]).mean()

    def _distance(self, spectra: LogMel, made: Tensor, real: Tensor) -> Tensor:
        margin = (spectra.window // 2, spectra.window // 2)
        target = spectra.magnitude(F.pad(real, margin))
        magnitude = spectra.magnitude(F.pad(made, margin))
        log_distance = (spectra.log_mel(magnitude) - spectra.log_mel(target)).abs().mean()
        linear_distance = (magnitude - target).abs().mean() / target.mean().clamp_min(1e-4)
        return log_distance + 0.5 * linear_distance


class Analysis(nn.Module):
    """Turns a log-mel spectrum into latents, and reads it off again.

    A latent goes with two columns of the spectrum, each centred on its half of the latent's samples.

    Args:
        width: channels of the latents.
        sampling_rate: Hz.
        hop_length: samples per latent.
    """

    columns = 2
    num_mels = 80

    def __init__(self, width: int, sampling_rate: int, hop_length: int) -> None:
        super().__init__()
        step = hop_length // self.columns
        self.spectrum = LogMel(4 * step, step, self.num_mels, sampling_rate)
        channels = self.columns * self.num_mels
        self.register_buffer("mean", torch.zeros(channels, 1))
        self.encode = nn.Sequential(
            nn.Conv1d(channels, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5, padding=2),
        )
        self.read = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2), nn.GELU(), nn.Conv1d(width, channels, 1)
        )

    @torch.no_grad()
    def mel(self, waveform: Tensor) -> Tensor:
        """Samples [N], whole latents, -> spectrum [mels * columns, T]."""
        window, step = self.spectrum.window, self.spectrum.step
        padded = F.pad(waveform, ((window - step) // 2, (window - step) // 2))
        # A long recording goes through in pieces, which overlap by what a window is longer than a step.
        stride = 4_000 * step
        pieces = [padded[i : i + stride + window - step] for i in range(0, len(waveform), stride)]
        spectrum = torch.cat([self.spectrum(piece[None])[0] for piece in pieces], dim=1)
        return spectrum.unflatten(1, (-1, self.columns)).transpose(1, 2).flatten(0, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """Spectra [B, mels * columns, T] -> latents [B, C, T]."""
        latents: Tensor = self.encode((mel - self.mean) / 2)
        return latents

    def distance(self, latents: Tensor, mel: Tensor) -> Tensor:
        """Mean absolute distance of a spectrum to what is read off latents."""
        return (self.read(latents) + self.mean - mel).abs().mean()


class Trainer:
    """A SNAC in training.

    Args:
        settings: how to train.
        speech: all sound to learn from, one after the other, whole frames, [N].
        validation: sound that is only listened to, whole frames, [N].
        device: where to train.
    """

    def __init__(self, settings: Settings, speech: Tensor, validation: Tensor, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.step = settings, device, 0
        self.speech, self.validation = speech, validation.to(device)
        self.model = model = snac.SNAC(**settings.model).to(device)
        self.hop, self.frame = int(model.hop_length), int(model.hop_length) * max(model.vq_strides)
        self.spec = self.codec().spec
        self.analysis = Analysis(model.latent_dim, model.sampling_rate, self.hop).to(device)
        self.loss = SpectralLoss(model.sampling_rate).to(device)
        for quantizer in self._quantizers:
            quantizer.codebook.weight.requires_grad_(False)
        self.optimizers = {part: self._optimizer(part) for part in PARTS}
        size, width = model.codebook_size, model.quantizer.codebook_dim
        self.code_sizes = torch.full((model.n_codebooks, size), float(settings.code_memory), device=device)
        self.code_sums = torch.zeros(model.n_codebooks, size, width, device=device)
        self.mel = self.analysis.mel(speech)  # [mels * columns, T]
        self.codes: list[Tensor] = []  # of the speech, once they are final: per level, [T / stride]
        self._prepare()
        self._encode, self._decode = model.encoder, model.decoder
        if settings.compile:
            self._encode, self._decode = torch.compile(self._encode), torch.compile(self._decode)

    @torch.no_grad()
    def _prepare(self) -> None:
        """Start near the scale of speech, which would have to be learned first.

        SNAC's activations hardly bend sound as quiet as speech is, so that what depends on its power would be
        slow to learn; and logarithms of quiet sound are far below zero.
        """
        rms = self.speech[self.speech.abs() > 1e-3].square().mean().sqrt()
        self.model.encoder.block[0].weight = self.model.encoder.block[0].weight / rms.to(self.device)
        mean = self.mel.unflatten(0, (self.analysis.num_mels, -1)).mean(dim=(1, 2))
        self.analysis.mean.copy_(mean.repeat_interleave(self.analysis.columns)[:, None])

    @property
    def num_steps(self) -> int:
        """Steps of all parts."""
        return sum(self.settings.steps.values())

    @property
    def place(self) -> tuple[str, int]:
        """The part that is being trained, and its steps so far."""
        step = self.step
        for part in PARTS[:-1]:
            if step < self.settings.steps[part]:
                return part, step
            step -= self.settings.steps[part]
        return PARTS[-1], step

    def train_step(self) -> dict[str, float]:
        """Do one step; its losses."""
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        part, step = self.place
        if part == "codes":
            losses = self._codes_step(step)
        else:
            if not self.codes:
                self.codes = self.encode_mel(self.mel)
            losses = self._decoder_step(step) if part == "decoder" else self._encoder_step(step)
        self.step += 1
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _codes_step(self, step: int) -> dict[str, Tensor]:
        settings, free = self.settings, step < self.settings.free_steps
        since = step - settings.free_steps
        if since >= 0 and since % settings.refresh_steps == 0 and 2 * step <= settings.steps["codes"]:
            self._find_codes()
        mel = torch.stack([self.mel[:, i : i + settings.mel_crop] for i in self._starts(settings.mel_batch)])
        quantised = self._quantise(self.analysis(mel), free=free)
        distances = [self.analysis.distance(latents, mel) for latents in quantised.latents]
        loss = distances[-1] + sum(distances[:-1]) / 4 + settings.commitment * quantised.commitment
        norm = self._learn("codes", loss, step)
        if not free:
            for level, (vectors, codes) in enumerate(zip(quantised.vectors, quantised.codes, strict=True)):
                self._follow(level, vectors, codes)
        levels = {f"mel{level}": distance for level, distance in enumerate(distances)}
        return {**levels, "commitment": quantised.commitment, "norm": norm}

    def _decoder_step(self, step: int) -> dict[str, Tensor]:
        waveform, codes = self._crops()
        with torch.no_grad():
            latents = self.model.quantizer.from_codes(codes)
        made = self._autocast(self._decode, latents)
        loss = self.loss(made[:, 0], waveform[:, 0])
        return {"loss": loss, "norm": self._learn("decoder", loss, step)}

    def _encoder_step(self, step: int) -> dict[str, Tensor]:
        waveform, codes = self._crops()
        residual = self._autocast(self._encode, waveform)
        losses = {}
        for level, (quantizer, chosen) in enumerate(zip(self._quantizers, codes, strict=True)):
            vectors = self._vectors(quantizer, residual)  # [B, codebook_dim, T / stride]
            closeness = (vectors.transpose(1, 2) @ quantizer.codebook.weight.T) * 20
            losses[f"codes{level}"] = F.cross_entropy(closeness.flatten(0, 1), chosen.flatten())
            level_latents = quantizer.out_proj(quantizer.decode_code(chosen))
            residual = residual - level_latents.repeat_interleave(quantizer.stride, dim=-1)
        # What is left over should be what no code says: nothing.
        losses["rest"] = residual.square().mean()
        norm = self._learn("encoder", torch.stack(list(losses.values())).sum(), step)
        return {**losses, "norm": norm}

    def _learn(self, part: str, loss: Tensor, step: int) -> Tensor:
        """Do one step of a part's optimizer; the norm of the gradient."""
        loss.backward()
        settings, optimizer = self.settings, self.optimizers[part]
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps[part])))
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = settings.rates[part] * cosine * min(1.0, (step + 1) / settings.warmup_steps)
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """What the part that was trained last makes of the validation sound."""
        self.step -= 1
        part, step = self.place
        self.step += 1
        mel = self.analysis.mel(self.validation)[None]
        quantised = self._quantise(
            self.analysis(mel), free=part == "codes" and step < self.settings.free_steps
        )
        if part == "codes":
            counts = [torch.bincount(codes, minlength=self.model.codebook_size) for codes in quantised.codes]
            return {
                "mel": [round(float(self.analysis.distance(level, mel)), 4) for level in quantised.latents],
                "used": [round(float((count > 0).float().mean()), 3) for count in counts],
                "perplexity": [round(_perplexity(count), 1) for count in counts],
            }
        if part == "decoder":
            made = self.model.decoder(quantised.latents[-1])
            return {"validation": round(float(self.loss(made[:, 0], self.validation[None])), 4)}
        chosen = self.model.encode(self.validation[None, None])
        same = [(one[0] == other).float().mean() for one, other in zip(chosen, quantised.codes, strict=True)]
        return {"same_codes": [round(float(share), 3) for share in same]}

    @torch.no_grad()
    def encode_mel(self, mel: Tensor) -> list[Tensor]:
        """Codes of a spectrum [mels * columns, T]: per level, [T / stride]."""
        return self._quantise(self.analysis(mel[None]), free=False).codes

    def encode(self, waveform: Tensor) -> Tensor:
        """Codes of samples [N], as the decoder learned them, [K, ceil(N / frame)]."""
        waveform = F.pad(waveform, (0, -len(waveform) % self.frame)).to(self.device)
        levels = [codes[None] for codes in self.encode_mel(self.analysis.mel(waveform))]
        return rows_from_levels(levels, self.spec)[0]

    def codec(self) -> SnacCodec:
        """The codec as it is now."""
        return SnacCodec.from_model(self.model)

    def save(self, path: Path) -> None:
        """Write all that :meth:`load` needs to go on."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "analysis": self.analysis.state_dict(),
            "optimizers": {part: optimizer.state_dict() for part, optimizer in self.optimizers.items()},
            "code_sizes": self.code_sizes,
            "code_sums": self.code_sums,
        }
        write_state(path, state)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.analysis.load_state_dict(state["analysis"])
        for part, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][part])
        self.code_sizes, self.code_sums = state["code_sizes"], state["code_sums"]

    @property
    def _quantizers(self) -> list[VectorQuantize]:
        return list(self.model.quantizer.quantizers)

    def _optimizer(self, part: str) -> torch.optim.Optimizer:
        modules = {
            "codes": (self.model.quantizer, self.analysis),
            "decoder": (self.model.decoder,),
            "encoder": (self.model.encoder,),
        }[part]
        weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, betas=(0.9, 0.99) if part == "codes" else (0.8, 0.99))

    def _starts(self, count: int) -> list[int]:
        """Where random pieces of the speech begin, in latents; at the beginning of a frame."""
        latents = self.settings.mel_crop if self.place[0] == "codes" else self.settings.crop
        stride = max(self.model.vq_strides)
        starts = torch.randint((len(self.speech) // self.hop - latents) // stride, (count,))
        return [stride * start for start in starts.tolist()]

    def _crops(self) -> tuple[Tensor, list[Tensor]]:
        """Random pieces of the speech, [B, 1, N], and their codes: per level, [B, crop / stride]."""
        starts, crop = self._starts(self.settings.batch_size), self.settings.crop
        waveform = torch.stack([self.speech[i * self.hop : (i + crop) * self.hop] for i in starts])
        codes = [
            torch.stack([level[i // stride : (i + crop) // stride] for i in starts])
            for level, stride in zip(self.codes, self.model.vq_strides, strict=True)
        ]
        return waveform[:, None].to(self.device), codes

    def _autocast(self, part: nn.Module, value: Tensor) -> Tensor:
        with mixed_precision(self.device):
            result: Tensor = part(value)
        return result.float()

    def _quantise(self, latents: Tensor, *, free: bool) -> Quantised:
        """What SNAC's quantizer does, with gradients for its encoder; the vectors themselves if ``free``."""
        residual, total = latents, torch.zeros_like(latents)
        commitment = latents.new_zeros(())
        all_latents, all_vectors, all_codes = [], [], []
        for quantizer in self._quantizers:
            vectors = self._vectors(quantizer, residual)  # [B, codebook_dim, T / stride]
            flat = vectors.transpose(1, 2).flatten(0, 1)
            chosen = vectors
            if not free:
                codes = (flat.detach() @ quantizer.codebook.weight.T).argmax(dim=1)
                code_vectors = quantizer.codebook.weight[codes].view(*vectors.transpose(1, 2).shape)
                code_vectors = code_vectors.transpose(1, 2)
                distance = (vectors - code_vectors).square().sum(dim=1).mean()
                commitment = commitment + distance / flat.var(dim=0).sum().clamp_min(1e-4)
                chosen = vectors + (code_vectors - vectors).detach()
                all_codes.append(codes)
            level = quantizer.out_proj(chosen).repeat_interleave(quantizer.stride, dim=-1)
            total, residual = total + level, residual - level
            all_latents.append(total)
            all_vectors.append(flat.detach())
        return Quantised(all_latents, commitment, all_vectors, all_codes)

    def _vectors(self, quantizer: VectorQuantize, residual: Tensor) -> Tensor:
        pooled = F.avg_pool1d(residual, quantizer.stride, quantizer.stride)
        return F.normalize(quantizer.in_proj(pooled), dim=1)

    @torch.no_grad()
    def _find_codes(self) -> None:
        """Make codebooks of the vectors, level by level: each sees what the last one left over."""
        longest = 250 * self.settings.mel_crop
        residual = self.analysis(self.mel[None, :, :longest])
        for level, quantizer in enumerate(self._quantizers):
            vectors = self._vectors(quantizer, residual).transpose(1, 2)
            codebook = _k_means(vectors.flatten(0, 1), self.model.codebook_size)
            quantizer.codebook.weight.copy_(codebook)
            self.code_sizes[level] = self.settings.code_memory
            self.code_sums[level] = codebook * self.settings.code_memory
            codes = (vectors @ codebook.T).argmax(dim=-1)
            level_latents = quantizer.out_proj(codebook[codes].transpose(1, 2))
            residual = residual - level_latents.repeat_interleave(quantizer.stride, dim=-1)

    @torch.no_grad()
    def _follow(self, level: int, vectors: Tensor, codes: Tensor) -> None:
        """Move the codes of a level towards the vectors [n, codebook_dim] that chose them."""
        sizes, sums = self.code_sizes[level], self.code_sums[level]
        decay = 1 - len(vectors) / (self.settings.code_memory * len(sizes))
        sizes.mul_(decay).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
        sums.mul_(decay).index_add_(0, codes, vectors)
        dead = (sizes < 1).nonzero()[:, 0]
        if len(dead):
            sizes[dead] = self.settings.code_memory / 2
            sums[dead] = vectors[torch.randint(len(vectors), (len(dead),))] * self.settings.code_memory / 2
        self._quantizers[level].codebook.weight.copy_(F.normalize(sums))


def train(
    settings: Settings, *, data: Path, out: Path, device: torch.device, minutes_between_saves: float = 3.0
) -> SnacCodec:
    """Train, or go on with training, and write the codec.

    Args:
        settings: how to train.
        data: folder with ``voice/*.wav``.
        out: folder to write the codec to. What is needed to go on is in the folder ``OUT-training``, and so
            is the codec as it is so far.
        device: where to train.
        minutes_between_saves: how often to write it down.
    """
    trainer = open_trainer(settings, data=data, out=out, device=device)
    state = state_path(out)
    size = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    seconds = len(trainer.speech) / trainer.model.sampling_rate
    print(f"{size:.2f} M weights, {seconds:.0f} s of speech, from step {trainer.step}", flush=True)
    saved = logged = time.monotonic()
    losses: list[dict[str, float]] = []
    while trainer.step < trainer.num_steps:
        losses.append(trainer.train_step())
        part, step = trainer.place
        ends_part = step == 0
        if step % 50 == 0:
            pace = {"seconds_per_step": round((time.monotonic() - logged) / len(losses), 3)}
            _log_line(trainer.step, losses, pace | (trainer.validate() if step % 500 == 0 else {}))
            logged, losses = time.monotonic(), []
        if ends_part or time.monotonic() - saved > 60 * minutes_between_saves:
            print(f"saved at step {trainer.step}: {part} at {step}", flush=True)
            trainer.save(state)
            trainer.codec().save_pretrained(state.parent / "codec")
            saved = time.monotonic()
    trainer.save(state)
    codec = trainer.codec()
    codec.save_pretrained(out)
    _log_line(trainer.step, [], trainer.validate())
    return codec


def state_path(out: Path) -> Path:
    """Where the state of a training is kept whose codec goes to ``out``."""
    return training_folder(out) / STATE_FILE


def open_trainer(settings: Settings, *, data: Path, out: Path, device: torch.device) -> Trainer:
    """Return a trainer, where it stopped if it has been here before."""
    trainer = Trainer(settings, *read_speech(data / "voice", settings), device)
    if state_path(out).exists():
        trainer.load(state_path(out))
    return trainer


def encode_rows(rows: Path, trainer: Trainer) -> Path:
    """Add the codes of their answers to rows: ``NAME.jsonl`` -> ``NAME_coded.jsonl`` beside it."""
    out = rows.with_name(f"{rows.stem}_coded.jsonl")
    codes: dict[str, list[list[int]]] = {}  # by recording
    rate = trainer.model.sampling_rate
    unfinished = out.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as written:
        for line in rows.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            name = row["audio_out"]
            if name not in codes:
                waveform = read_waveform(rows.parent / name, sampling_rate=rate)
                codes[name] = trainer.encode(waveform).tolist()
            written.write(json.dumps(row | {"codes_out": codes[name]}) + "\n")
    unfinished.replace(out)
    return out


def _log_line(step: int, losses: list[dict[str, float]], further: dict[str, Any]) -> None:
    names = losses[-1] if losses else ()
    means = {name: round(sum(row.get(name, 0) for row in losses) / len(losses), 4) for name in names}
    print(json.dumps({"step": step, **means, **further}), flush=True)


def read_speech(folder: Path, settings: Settings) -> tuple[Tensor, Tensor]:
    """All wavs of a folder, one after the other: those to learn from [N], and those to listen to [N]."""
    paths = sorted(folder.glob("*.wav"))
    if not paths:
        raise SystemExit(f"no wavs in {folder}; write them first: python examples/tiny_talker/build_world.py")
    waveforms = [read_waveform(path, sampling_rate=settings.model["sampling_rate"]) for path in paths]
    frame = math.prod(settings.model["encoder_rates"]) * max(settings.model["vq_strides"])
    kept_back = settings.validation_files
    speech, validation = (_whole(part, frame) for part in (waveforms[:-kept_back], waveforms[-kept_back:]))
    longest = max(settings.crop, settings.mel_crop) * math.prod(settings.model["encoder_rates"]) + frame
    if len(speech) <= longest:
        raise SystemExit(
            f"{folder} holds {len(speech)} samples to learn from, too few for a crop ({longest})"
        )
    return speech, validation


def _whole(waveforms: list[Tensor], frame: int) -> Tensor:
    """Recordings one after the other, cut to whole frames."""
    joined = torch.cat([torch.zeros(0), *waveforms])
    return joined[: len(joined) // frame * frame]


def _k_means(vectors: Tensor, size: int, rounds: int = 20) -> Tensor:
    """Unit vectors [n, d] to ``size`` unit means."""
    means = vectors[torch.randperm(len(vectors))[torch.arange(size) % len(vectors)]]
    for _ in range(rounds):
        chosen = (vectors @ means.T).argmax(dim=1)
        sums = torch.zeros_like(means).index_add_(0, chosen, vectors)
        unused = torch.bincount(chosen, minlength=size) == 0
        sums[unused] = vectors[torch.randint(len(vectors), (int(unused.sum()),))]
        means = F.normalize(sums)
    return means


def _perplexity(counts: Tensor) -> float:
    """How many equally frequent codes would be as hard to guess."""
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("build/tiny/world"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny/codec"))
    parser.add_argument("--steps", type=int, default=Settings().steps["decoder"], help="of the decoder")
    parser.add_argument("--device", default="auto", help="where (default: an accelerator if there is one)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--encode", type=Path, nargs="+", help="do not train; add codes to the answers of rows"
    )
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    steps = Settings().steps | {"decoder": arguments.steps}
    settings = Settings(steps=steps, seed=arguments.seed, compile=arguments.encode is None)
    if arguments.encode is None:
        train(settings, data=arguments.data, out=arguments.out, device=device)
    else:
        trainer = open_trainer(settings, data=arguments.data, out=arguments.out, device=device)
        for rows in arguments.encode:
            print(encode_rows(rows, trainer))


if __name__ == "__main__":
    main()
