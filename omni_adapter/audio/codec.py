"""Codec: waveform <-> code grid, whole or as a stream.

Waveform [N] -> codes [K, T] and codes [B, K, T] -> waveform [B, T * samples_per_frame]. Knows nothing of
delays, special ids or language models: it only ever sees codes.

Decoding is a stream even when it is whole: no frame is decoded again as context of another. Frames always go
through one at a time: every sample comes from the same arithmetic however the codes were split, so streamed
and whole decoding are equal bit for bit.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import snac
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors.torch import save_file
from snac.layers import NoiseBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize

from omni_adapter.audio.snac_decoder import (
    CodecPrecision,
    DecoderState,
    SnacDecoder,
    can_join,
    can_round,
    join_states,
    lay_out,
    reach,
    select_states,
)
from omni_adapter.config import CodecSpec, Positive, parse
from omni_adapter.errors import AudioError, CheckpointError, CodeGridError, ConfigError
from omni_adapter.tensor_files import check_finite, check_shapes, read_safetensors, read_torch_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PUBLISHED_WEIGHTS_FILE = "pytorch_model.bin"

_NORM_SUFFIXES = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight_g", ".weight_v"),
)


class Codec(Protocol):
    """What the library asks of a codec. Another codec is one class with these members."""

    @property
    def spec(self) -> CodecSpec:
        """Geometry of the codec."""

    @property
    def context_samples(self) -> tuple[int, int]:
        """Samples of history and of look-ahead that a sample's value depends on."""

    def encode(self, waveform: Tensor) -> Tensor:
        """Encode a waveform [N] into codes [K, T]."""

    def decode(self, codes: Tensor, *, first_frame: Tensor | int = 0, seed: int = 0) -> Tensor:
        """Decode codes [B, K, T] into waveforms [B, T * samples_per_frame]."""

    def start(self, *, batch_size: int = 1, first_frame: Tensor | int = 0, seed: int = 0) -> Any:
        """Return the state of a new stream of ``batch_size`` conversations; ``copy.deepcopy`` branches it."""

    def decode_chunk(self, codes: Tensor, state: Any, *, last: bool = False) -> Tensor:
        """Decode the next codes [B, K, n] into the samples [B, m] that can no longer change."""

    def fingerprint(self) -> dict[str, Any]:
        """Facts, as JSON values, by which the codec is recognised when a talker is loaded."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the codec into a folder."""


class CodecStream:
    """Decode the codes of one conversation as they come.

    The chunks, put together, are what ``codec.decode`` gives for all codes at once. Samples come out as soon
    as later codes cannot change them: ``codec.context_samples[1]`` are held back.

    With ``lookahead_frames`` sound comes sooner, and is not quite the same: samples are given out once that
    many frames behind theirs are known, as if the codes ended there. As many samples come out in the end, and
    what was given out never changes what follows. The fewer frames in one chunk, the larger the error.

    Args:
        codec: the codec.
        seed: seed of the decoder's noise.
        lookahead_frames: frames behind a sample's own that it waits for at most; None for all that matter.

    Raises:
        ConfigError: if ``lookahead_frames`` is negative.
    """

    def __init__(self, codec: Codec, *, seed: int = 0, lookahead_frames: int | None = None) -> None:
        if lookahead_frames is not None and lookahead_frames < 0:
            raise ConfigError(f"lookahead_frames must be at least 0, or None, got {lookahead_frames}")
        self._codec = codec
        self._state = codec.start(seed=seed)
        self._lookahead_frames = lookahead_frames
        self._num_frames = 0
        self._num_final = 0  # samples that can no longer change
        self._ahead = 0  # samples given out beyond those

    def push(self, codes: Tensor) -> Tensor:
        """Take the next codes [K, n] and return the next samples [m], float32."""
        samples = self._codec.decode_chunk(codes[None], self._state)[0]
        if self._lookahead_frames is None:
            return samples
        self._num_frames += codes.shape[-1]
        self._num_final += len(samples)
        given, self._ahead = self._ahead, max(0, self._ahead - len(samples))
        frames = self._num_frames - self._lookahead_frames
        due = frames * self._codec.spec.samples_per_frame - self._num_final
        if due > self._ahead:
            guessed = self._flush(copy.deepcopy(self._state))
            samples, self._ahead = torch.cat((samples, guessed[:due])), due
        return samples[given:]

    def finish(self) -> Tensor:
        """Return the samples [m] that were held back; the stream takes no codes after this."""
        return self._flush(self._state)[self._ahead :]

    @staticmethod
    def push_together(streams: Sequence["CodecStream"], codes: Tensor) -> list[Tensor]:
        """Push the next codes of several streams of one codec, in one call where their states can be joined.

        The samples are those of ``push`` within rounding, since rows are multiplied together.

        Args:
            streams: different ones, B in all.
            codes: integer codes, [B, K, n].

        Returns:
            For each stream what ``push`` returns.
        """
        first = streams[0]
        states = [stream._state for stream in streams]
        if len(streams) == 1 or not all(
            stream._lookahead_frames is None
            and isinstance(stream._state, DecoderState)
            and can_join(first._state, stream._state)
            for stream in streams
        ):
            return [stream.push(part) for stream, part in zip(streams, codes, strict=True)]
        joined = join_states(states)
        samples = first._codec.decode_chunk(codes, joined)
        for place, stream in enumerate(streams):
            stream._state = select_states(joined, [place])
        return list(samples)

    def _flush(self, state: Any) -> Tensor:
        no_codes = torch.empty(1, self._codec.spec.num_codebooks, 0, dtype=torch.long)
        return self._codec.decode_chunk(no_codes, state, last=True)[0]


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SnacConfig:
    """Settings of a SNAC model; ``config.json`` of a published one holds these keys."""

    sampling_rate: Positive
    encoder_dim: Positive
    encoder_rates: list[Positive]
    decoder_dim: Positive
    decoder_rates: list[Positive]
    codebook_size: Positive
    codebook_dim: Positive
    vq_strides: list[Positive]
    latent_dim: Positive | None = None
    attn_window_size: Positive | None = None
    noise: bool = True
    depthwise: bool = True

    @property
    def spec(self) -> CodecSpec:
        """Geometry of the codec."""
        return CodecSpec(
            sampling_rate=self.sampling_rate,
            hop_length=math.prod(self.encoder_rates),
            level_strides=tuple(self.vq_strides),
            codebook_size=self.codebook_size,
        )


class SnacCodec(nn.Module):
    """SNAC as a :class:`Codec`: always frozen and in evaluation mode, weight norms folded into the weights.

    Args:
        config: settings of the model.
        state: its weights by name, as a SNAC's ``state_dict`` gives them, weight norms folded or not.

    Attributes:
        spec: geometry of the codec.
        context_samples: samples of history and of look-ahead that a sample's value depends on.

    Raises:
        CheckpointError: if the weights do not fit the settings.
        ConfigError: if the settings describe a model that cannot be decoded as a stream.
    """

    def __init__(self, config: SnacConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.model = _build(config, state)
        self.spec = config.spec
        self.context_samples = _context_samples(self.model.decoder, self.spec)
        self.precision: CodecPrecision = "fp32"
        self._prepare()

    @classmethod
    def from_model(cls, model: snac.SNAC) -> "SnacCodec":
        """Make a codec of a copy of ``model``'s weights."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return cls(_config_of(model), state)

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "SnacCodec":
        """Load a codec from a folder or the Hub.

        Args:
            id_or_folder: folder or Hub id with ``config.json`` and either ``model.safetensors`` or
                ``pytorch_model.bin``.
            revision: branch, tag or commit of the Hub repository.
            token: access token of the Hub.
            cache_dir: where downloads are kept.
            local_files_only: never ask the network.

        Raises:
            CheckpointError: if files are missing or broken, or weights do not fit the config.
        """
        source = _Source(str(id_or_folder), revision, token, cache_dir, local_files_only)
        config = _read_config(source)
        state, path = _read_weights(source)
        try:
            return cls(config, state)
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; :meth:`from_pretrained` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        state = {name: tensor.contiguous().cpu() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which this codec is recognised: its settings and a digest of its codebooks."""
        digest = hashlib.sha256()
        for quantizer in self.model.quantizer.quantizers:
            digest.update(quantizer.codebook.weight.float().cpu().contiguous().numpy().tobytes())
        return {"kind": "snac", **asdict(self.config), "codebooks_sha256": digest.hexdigest()[:16]}

    def train(self, mode: bool = True) -> "SnacCodec":
        """Stay in evaluation mode: the codec is never trained."""
        return super().train(False)

    def pack(self, precision: CodecPrecision) -> None:
        """Choose how the decoder computes from now on. Streams that have begun must have ended.

        Args:
            precision: ``fp32`` in the weights' own dtype, ``bf16`` with the operands of its large matrix
                products rounded: faster where the machine multiplies bfloat16, not exactly the same sound.
                Encoding and what is saved stay as they are.

        Raises:
            ConfigError: if there is no such precision, or not on this processor.
        """
        if precision not in get_args(CodecPrecision):
            raise ConfigError(
                f"a codec computes in one of {', '.join(get_args(CodecPrecision))}, got {precision!r}"
            )
        if precision == "bf16" and not can_round(self._weight.device):
            raise ConfigError("this processor does not multiply bfloat16; let the codec compute in fp32")
        self.precision = precision
        self._prepare()

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Encode a waveform.

        Args:
            waveform: float samples in -1..1 at ``spec.sampling_rate``, [N]; silence fills up the last frame.

        Returns:
            int64 codes, [K, T] with T = ceil(N / spec.samples_per_frame).

        Raises:
            AudioError: if the waveform is not one float channel, is empty, or holds NaN or infinity.
        """
        if waveform.dim() != 1 or not waveform.is_floating_point():
            came = f"{waveform.dtype} {list(waveform.shape)}"
            raise AudioError(
                f"a codec encodes float samples of the shape [N], got {came}", reason="wrong_type"
            )
        if waveform.numel() == 0:
            raise AudioError("there is nothing to encode: the waveform has no samples", reason="empty")
        if not waveform.isfinite().all():
            raise AudioError("the waveform holds NaN or infinity; clean it first", reason="not_finite")
        levels = self.model.encode(waveform[None, None].to(self._weight))
        return rows_from_levels(levels, self.spec)[0]

    def decode(self, codes: Tensor, *, first_frame: Tensor | int = 0, seed: int = 0) -> Tensor:
        """Decode whole grids of codes.

        Args:
            codes: integer codes, [B, K, T].
            first_frame: absolute number of the first frame, one for all or [B]; places the decoder's noise.
            seed: seed of the decoder's noise.

        Returns:
            float32 samples, [B, T * spec.samples_per_frame].

        Raises:
            CodeGridError: if the grid has the wrong shape or type or holds an id that is no code.
        """
        state = self.start(batch_size=len(codes), first_frame=first_frame, seed=seed)
        return self.decode_chunk(codes, state, last=True)

    def start(self, *, batch_size: int = 1, first_frame: Tensor | int = 0, seed: int = 0) -> DecoderState:
        """Return the state of a new stream.

        Args:
            batch_size: conversations decoded side by side.
            first_frame: absolute number of the first frame, one for all or [B].
            seed: seed of the decoder's noise.
        """
        if self._decoder_of != self._weights_at():
            self._prepare()
        first_frames = torch.as_tensor(first_frame).expand(batch_size).tolist()
        return DecoderState(seeds=[seed] * batch_size, first_frames=first_frames)

    @torch.no_grad()
    def decode_chunk(self, codes: Tensor, state: DecoderState, *, last: bool = False) -> Tensor:
        """Decode the next frames of a stream.

        Args:
            codes: integer codes of the next n >= 0 frames, [B, K, n].
            state: what earlier chunks left behind; changed in place.
            last: whether no codes follow; the samples that were held back come out too.

        Returns:
            float32 samples that later codes cannot change, [B, m].

        Raises:
            CodeGridError: if the grid has the wrong shape or type, holds an id that is no code, or comes
                after the last chunk.
        """
        self._check(codes, state)
        decoder, weight = self._decoder, self._weight
        pieces = [weight.new_empty(0, len(codes))]
        levels = levels_from_rows(codes.to(weight.device, torch.long), self.spec)
        for frame in range(codes.shape[-1]):
            pieces.append(decoder(self._latents(levels, frame), state))
            state.num_frames += 1
        state.finished = last
        if last and state.num_frames:
            no_latents = weight.new_empty(0, len(codes), self.model.latent_dim)
            pieces.append(decoder(no_latents, state, last=True))
        waveform = torch.cat(pieces).t()
        return waveform.to(torch.promote_types(waveform.dtype, torch.float32)).contiguous()

    def _latents(self, levels: Sequence[Tensor], frame: int) -> Tensor:
        """Latents [n, B, C] of one frame of the codes of all levels."""
        latents: Tensor | None = None
        for quantizer, codes in zip(self.model.quantizer.quantizers, levels, strict=True):
            projection = quantizer.out_proj
            size = max(self.spec.level_strides) // quantizer.stride
            own = codes[:, frame * size : (frame + 1) * size].t()
            found = nn.functional.embedding(own, quantizer.codebook.weight)
            spread = nn.functional.linear(found, projection.weight[:, :, 0], projection.bias)
            spread = spread.repeat_interleave(quantizer.stride, dim=0)
            latents = spread if latents is None else latents + spread
        assert latents is not None
        return latents

    def _prepare(self) -> None:
        """Lay out the decoder's weights as they are now."""
        vars(self).pop("_decoder", None)  # what it laid out makes room for the new
        self._decoder = SnacDecoder(
            self.model.decoder, latents_per_frame=max(self.spec.level_strides), precision=self.precision
        )
        self._decoder_of = self._weights_at()

    def _weights_at(self) -> tuple[tuple[int, int], ...]:
        """Where the decoder's weights lie, and how often they were changed."""
        return tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in self.model.decoder.parameters()
        )

    @property
    def _weight(self) -> Tensor:
        """A weight, for its device and dtype."""
        weight: Tensor = self.model.quantizer.quantizers[0].codebook.weight
        return weight

    def _check(self, codes: Tensor, state: DecoderState) -> None:
        batch, rows, size = len(state.first_frames), self.spec.num_codebooks, self.spec.codebook_size
        if codes.dim() != 3 or codes.shape[:2] != (batch, rows) or codes.is_floating_point():
            came = f"{codes.dtype} {list(codes.shape)}"
            raise CodeGridError(f"the codec decodes integer codes [{batch}, {rows}, T], got {came}")
        if state.finished:
            raise CodeGridError("this stream is finished; start a new one for more codes")
        illegal = ((codes < 0) | (codes >= size)).nonzero()
        if len(illegal):
            item, row, frame = illegal[0].tolist()
            raise CodeGridError(
                f"row {row} holds {int(codes[item, row, frame])} at frame {frame}, but codes are "
                f"0 .. {size - 1}; take marks such as end and pad off first"
            )


def rows_from_levels(levels: Sequence[Tensor], spec: CodecSpec) -> Tensor:
    """Put the codes of all levels into one grid.

    The rows of a frame are ordered by the time at which their code begins, the coarser level first.

    Args:
        levels: int64 codes of each level, coarsest first, each [B, T * codes of the level in a frame].
        spec: geometry of the codec.

    Returns:
        int64 codes, [B, K, T].
    """
    rows = [levels[level][:, offset :: _codes_per_frame(spec, level)] for level, offset in _row_order(spec)]
    return torch.stack(rows, dim=1)


def levels_from_rows(codes: Tensor, spec: CodecSpec) -> list[Tensor]:
    """Undo :func:`rows_from_levels`: codes [B, K, T] to a tensor [B, T * codes in a frame] for each level."""
    order = _row_order(spec)
    levels = []
    for level in range(len(spec.level_strides)):
        rows = [order.index((level, offset)) for offset in range(_codes_per_frame(spec, level))]
        levels.append(codes[:, rows].transpose(1, 2).flatten(1))
    return levels


def _codes_per_frame(spec: CodecSpec, level: int) -> int:
    return max(spec.level_strides) // spec.level_strides[level]


def _row_order(spec: CodecSpec) -> list[tuple[int, int]]:
    """(level, place within the frame) of each row."""
    codes = [
        (level, offset)
        for level in range(len(spec.level_strides))
        for offset in range(_codes_per_frame(spec, level))
    ]
    return sorted(codes, key=lambda code: (code[1] * spec.level_strides[code[0]], code[0]))


# --- facts of a model, derived from its modules ---


def _context_samples(decoder: nn.Module, spec: CodecSpec) -> tuple[int, int]:
    """Samples of history and of look-ahead that a sample's value depends on.

    Follows the samples around one frame back through the convolutions to the frames that they come from.
    """
    frame, latents = spec.samples_per_frame, max(spec.level_strides)
    convs = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)]
    radius = frame
    while True:
        radius *= 2
        samples = torch.arange(-radius, radius + frame)
        first = last = samples  # inputs of the layer that each sample depends on
        for conv in reversed(convs):
            padding, stride = int(conv.padding[0]), int(conv.stride[0])
            if isinstance(conv, nn.ConvTranspose1d):
                first, last = (first + padding) // stride - 1, (last + padding) // stride
            else:
                first, last = first - padding, last - padding + reach(conv)
        touched = samples[(first // latents <= 0) & (last // latents >= 0)]  # by the codes of frame 0
        history, look_ahead = int(touched[-1]) - (frame - 1), -int(touched[0])
        if max(history, look_ahead) < radius:
            return history, look_ahead


def _config_of(model: snac.SNAC) -> SnacConfig:
    return SnacConfig(
        sampling_rate=int(model.sampling_rate),
        encoder_dim=model.encoder_dim,
        encoder_rates=list(model.encoder_rates),
        decoder_dim=model.decoder_dim,
        decoder_rates=list(model.decoder_rates),
        codebook_size=model.codebook_size,
        codebook_dim=model.codebook_dim,
        vq_strides=list(model.vq_strides),
        latent_dim=model.latent_dim,
        attn_window_size=model.attn_window_size,
        noise=any(isinstance(layer, NoiseBlock) for layer in model.decoder.modules()),
        depthwise=model.decoder.model[0].groups > 1,
    )


def _build(config: SnacConfig, state: Mapping[str, Tensor]) -> snac.SNAC:
    """A frozen SNAC with folded weights."""
    if config.attn_window_size is not None:
        raise ConfigError(
            f"this SNAC has attention over windows of {config.attn_window_size} codes, which a stream of "
            "single frames cannot fill; use a SNAC with attn_window_size null, such as the one for 24 kHz"
        )
    if math.prod(config.encoder_rates) != math.prod(config.decoder_rates):
        raise ConfigError(
            f"encoder_rates {config.encoder_rates} and decoder_rates {config.decoder_rates} need one product"
        )
    with torch.device("meta"):  # no memory until the weights are known to fit
        model = snac.SNAC(**asdict(config))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    folded = _fold_weight_norms(state)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_shapes(
        {name: tensor.shape for name, tensor in folded.items()}, expected=expected, source="the codec"
    )
    check_finite(folded, source="the codec")
    model.load_state_dict(folded, assign=True)
    lay_out(model.decoder)
    return model.eval().requires_grad_(False)


def _fold_weight_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each weight norm, named in torch's newer or older way, by the weight that it makes."""
    folded = dict(state)
    for name in state:
        for g_suffix, v_suffix in _NORM_SUFFIXES:
            module = name.removesuffix(g_suffix)
            if module == name or module + v_suffix not in state:
                continue
            g, v = folded.pop(name), folded.pop(module + v_suffix)
            if g.dim() != v.dim() or not g.numel() == g.shape[0] == v.shape[0]:
                raise CheckpointError(
                    f"{name} {list(g.shape)} does not fit {module}{v_suffix} {list(v.shape)}"
                )
            folded[f"{module}.weight"] = torch._weight_norm(v.float(), g.float(), 0)
    return {name: tensor.float() for name, tensor in folded.items()}


# --- files ---


@dataclass(frozen=True)
class _Source:
    """A folder, or a repository of the Hub."""

    place: str
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool

    def find(self, name: str) -> Path | None:
        """Path of the file ``name``, downloaded if need be; None if the source does not have it."""
        if Path(self.place).is_dir():
            path = Path(self.place) / name
            return path if path.is_file() else None
        try:
            found = hf_hub_download(
                self.place,
                name,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{name} of {self.place} is not on this machine and the Hub was not reached; check the "
                f"connection, or pass a folder that holds the codec: {error}"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(
                f"{self.place} is neither a folder nor a readable repository of the Hub: {error}"
            ) from error
        return Path(found)


def read_snac_config(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SnacConfig:
    """Read the settings of a SNAC without its weights; arguments are those of ``from_pretrained``.

    Raises:
        CheckpointError: if there are none, or they are broken.
    """
    return _read_config(_Source(str(id_or_folder), revision, token, cache_dir, local_files_only))


def _read_config(source: _Source) -> SnacConfig:
    path = source.find(CONFIG_FILE)
    if path is None:
        raise CheckpointError(f"{source.place} is no codec: it has no {CONFIG_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(values).__name__}")
    try:
        return parse(SnacConfig, values, source=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _read_weights(source: _Source) -> tuple[dict[str, Tensor], Path]:
    path = source.find(WEIGHTS_FILE)
    if path is not None:
        return read_safetensors(path), path
    path = source.find(PUBLISHED_WEIGHTS_FILE)
    if path is None:
        raise CheckpointError(f"{source.place} has neither {WEIGHTS_FILE} nor {PUBLISHED_WEIGHTS_FILE}")
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold a dict of tensors")
    return state, path
