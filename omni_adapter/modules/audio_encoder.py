"""The encoder half of Whisper, for recordings as long as they are.

Features [B, M, F] with their true lengths -> frames [B, A', E] with theirs; or, where it hears in blocks, the
features of one window as they come. Walks the layers of transformers' ``WhisperEncoder`` itself, because that
class takes nothing but full windows. Knows nothing of waveforms or language models.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, WhisperConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.audio.features import LogMel
from omni_adapter.config import EncoderPadding
from omni_adapter.errors import AudioError, CheckpointError, ConfigError, MissingDependencyError
from omni_adapter.tensor_files import check_finite, check_shapes, read_torch_file

PACKAGE_PREFIX = "whisper:"
"""Before the name of a model of the ``whisper`` package, as in ``whisper:small``."""

_ENCODER_PREFIXES = {r"^(?:model\.)?encoder\.": ""}
_PACKAGE_NAMES = (  # names of the whisper package, and transformers' for the same
    ("positional_embedding", "embed_positions.weight"),
    ("blocks.", "layers."),
    (".attn.query.", ".self_attn.q_proj."),
    (".attn.key.", ".self_attn.k_proj."),
    (".attn.value.", ".self_attn.v_proj."),
    (".attn.out.", ".self_attn.out_proj."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".mlp_ln.", ".final_layer_norm."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    ("ln_post.", "layer_norm."),
)
_CONV_PAST = 2  # feature frames before a block that its first frame depends on, through both convolutions
_ROUNDING_S = 1e-6
_PACKAGE_DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")


class EncodedAudio(NamedTuple):
    """What an encoder makes of a batch of windows."""

    frames: Tensor  # [B, A', E], zero after each window's length
    lengths: Tensor  # int64 [B]


@dataclass
class EncoderState:
    """What an encoder must remember of a window that is still growing; owned by the caller.

    Attributes:
        features: those from two frames before the next block on, [1, M, f]; None before the first.
        steps: frames A' that were made.
        keys: of these, in each layer, [1, H, C, W]; the first ``steps`` of C are filled.
        values: likewise.
    """

    features: Tensor | None = None
    steps: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class _EncoderOnly(WhisperEncoder):  # type: ignore[no-untyped-call]
    """The encoder of a checkpoint that may hold the rest of a Whisper as well."""

    _keys_to_ignore_on_load_unexpected = [r"^(?:model\.)?decoder\.", r"^proj_out\."]  # noqa: RUF012 (as declared)


class AudioEncoder(nn.Module):
    """Whisper's encoder: frozen, always in evaluation mode, exact for every length up to its window.

    Args:
        encoder: the encoder; it is taken over and frozen.
        log_mel: features that it was trained with; None for Whisper's, with the bins that the encoder takes.
    """

    def __init__(self, encoder: WhisperEncoder, *, log_mel: LogMel | None = None) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.train()
        self.stride = int(encoder.conv1.stride[0] * encoder.conv2.stride[0])
        self.width = int(encoder.config.d_model)
        self.window_frames = int(encoder.config.max_source_positions) * self.stride
        self._log_mel = log_mel or _whisper_log_mel(self.num_mel_bins, self.window_frames)

    @classmethod
    def from_pretrained(
        cls,
        source: "str | Path | PreTrainedModel | AudioEncoder",
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "AudioEncoder":
        """Load the encoder of a Whisper model; nothing else of it is read.

        Args:
            source: folder or Hub id of a model that transformers saved (whole or encoder only, safetensors);
                a ``.pt`` file of the ``whisper`` package; ``whisper:NAME`` for a model that this package
                knows by name; or a loaded model of transformers, whose encoder is taken over.
            revision: branch, tag or commit of the Hub repository.
            token: access token of the Hub.
            cache_dir: where downloads are kept.
            local_files_only: never ask the network.

        Raises:
            CheckpointError: if there is no Whisper encoder there, or its weights are broken or incomplete.
            MissingDependencyError: if a model is asked for by its name in a package that is not installed.
        """
        if isinstance(source, AudioEncoder):
            return source
        if isinstance(source, PreTrainedModel):
            return cls(_encoder_of(source))
        name = str(source)
        if name.startswith(PACKAGE_PREFIX):
            return _from_package(name)
        if name.endswith(".pt"):
            return _from_package_checkpoint(read_torch_file(Path(name)), source=name)
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        encoder = _load(name, options)
        try:
            log_mel = LogMel.from_pretrained(name, **options)
        except CheckpointError:  # a bare encoder has no settings of features
            log_mel = None
        return cls(encoder, log_mel=log_mel)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder and the settings of its features; :meth:`from_pretrained` reads them."""
        self.encoder.save_pretrained(str(folder), save_original_format=False)
        self._log_mel.save_pretrained(folder)

    @property
    def num_mel_bins(self) -> int:
        """Mel bins M of the features."""
        return int(self.encoder.config.num_mel_bins)

    def log_mel(self) -> LogMel:
        """Return the features that this encoder was trained with."""
        return self._log_mel

    def num_steps(self, num_feature_frames: int) -> int:
        """Return how many frames A' the encoder makes of ``num_feature_frames``."""
        return -(-num_feature_frames // self.stride)

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which this encoder is recognised, the same in every floating-point type."""
        config = self.encoder.config
        # Signs survive every cast; those of one slice of the last block tell one training from another.
        last_layer: Any = self.encoder.layers[-1]
        signs = (last_layer.fc2.weight[:64, :64] > 0).cpu().numpy().tobytes()
        return {
            "kind": "whisper",
            "width": self.width,
            "layers": config.encoder_layers,
            "heads": config.encoder_attention_heads,
            "num_mel_bins": self.num_mel_bins,
            "window_frames": self.window_frames,
            "signs_sha256": hashlib.sha256(signs).hexdigest()[:16],
        }

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Stay in evaluation mode: the encoder is never trained."""
        return super().train(False)

    def block_steps(self, block_seconds: float | None) -> int | None:
        """Return how many frames A' a block of ``block_seconds`` has, None for no blocks.

        Raises:
            ConfigError: if that is no whole number of frames.
        """
        if block_seconds is None:
            return None
        log_mel = self._log_mel
        frame_seconds = self.stride * log_mel.hop_length / log_mel.sampling_rate
        steps = round(block_seconds / frame_seconds)
        if steps < 1 or abs(steps * frame_seconds - block_seconds) > _ROUNDING_S:
            raise ConfigError(
                f"encoder_block_seconds must be a multiple of the encoder's {frame_seconds:g} s a frame, "
                f"got {block_seconds:g}; try {max(1, steps) * frame_seconds:g}"
            )
        return steps

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        *,
        padding: EncoderPadding = "true_length",
        block_steps: int | None = None,
    ) -> EncodedAudio:
        """Encode a batch of windows.

        Args:
            features: log-mel features, [B, M, F].
            lengths: true feature frames of each window, int64 [B], from 1 to F.
            padding: ``true_length``: nothing after a window's length has any influence, so that a window
                gives the same frames alone and in a batch. Otherwise what follows is the silence of a full
                window, which is heard and then cut off.
            block_steps: attend to frames of the own block and those before it, in blocks of so many frames;
                None attends to the whole window.

        Returns:
            Frames for the true lengths, [B, A', E], and their numbers, ``num_steps`` of each length.

        Raises:
            AudioError: if the features do not fit the encoder or the lengths do not fit the features.
        """
        self._check(features, lengths, padding)
        lengths = lengths.to(features.device)
        steps = (lengths + self.stride - 1) // self.stride
        heard = torch.full_like(lengths, features.shape[-1]) if padding != "true_length" else lengths
        x = features.to(self.encoder.conv1.weight.dtype)
        everything = bool((heard == features.shape[-1]).all())
        if not everything:
            x = x * _mask(heard, features.shape[-1])[:, None].to(x.dtype)
        x = nn.functional.gelu(self.encoder.conv1(x))
        if not everything:  # the second convolution pads with zeros where a window ends
            x = x * _mask(heard, features.shape[-1])[:, None].to(x.dtype)
        x = nn.functional.gelu(self.encoder.conv2(x)).transpose(1, 2)  # [B, A', E]
        x = x + self.encoder.embed_positions.weight[: x.shape[1]]
        heard_steps = (heard + self.stride - 1) // self.stride
        attention_mask: Any = None
        if block_steps is not None and block_steps < x.shape[1]:
            attention_mask = _block_mask(_mask(heard_steps, x.shape[1]), block_steps, x.dtype)
        elif not everything:
            attention_mask = create_bidirectional_mask(
                config=self.encoder.config,
                inputs_embeds=x,
                attention_mask=_mask(heard_steps, x.shape[1]).long(),
            )
        for layer in self.encoder.layers:
            x = layer(x, attention_mask)
        x = self.encoder.layer_norm(x)
        longest = int(steps.max())
        kept = _mask(steps, longest)[..., None].to(x.dtype)
        return EncodedAudio(x[:, :longest] * kept, steps)

    def append(
        self,
        features: Tensor,
        state: EncoderState,
        *,
        block_steps: int,
        lookahead_steps: int = 0,
        last: bool = False,
    ) -> Tensor:
        """Encode the blocks of a window that its next features complete.

        A block is encoded when its features and one more are there, which is as far as the convolutions see.
        Keys and values are kept, so that each frame is computed once. The frames are those that ``forward``
        makes of the whole window with the same ``block_steps``, to the rounding of floats.

        With ``lookahead_steps`` a block waits for so many frames more and attends to them too, which are then
        computed again with their own block. That is no way to train, but it is nearer to attending to the
        whole window.

        Args:
            features: the next ones of the window, [M, f], any number of them.
            state: of the window; changed in place.
            block_steps: frames of a block.
            lookahead_steps: frames after a block that it attends to.
            last: nothing follows in this window; the rest is encoded too.

        Returns:
            New frames, [s, E], maybe none.

        Raises:
            AudioError: if the features do not fit the encoder, or are more than a window.
        """
        if features.dim() != 2 or features.shape[0] != self.num_mel_bins:
            raise AudioError(
                f"this encoder takes features [{self.num_mel_bins}, f], got {list(features.shape)}; "
                "make them with its own log_mel()",
                reason="wrong_type",
            )
        weight = self.encoder.conv1.weight
        x = features[None].to(device=weight.device, dtype=weight.dtype)
        if state.features is None:
            state.features = x.new_zeros(1, self.num_mel_bins, _CONV_PAST)
        x = torch.cat((state.features, x), dim=2)
        size, ahead, blocks = block_steps * self.stride, lookahead_steps * self.stride, []
        rest = x.shape[2] - _CONV_PAST
        if state.steps * self.stride + rest > self.window_frames:
            raise AudioError(
                f"a window has at most {self.window_frames} feature frames, "
                f"got {state.steps * self.stride + rest}; begin a new state for the next window",
                reason="too_long",
            )
        while rest > (0 if last else size + ahead):
            heard = x[:, :, : _CONV_PAST + size + ahead + 1]
            is_rest = last and rest <= size + ahead
            most = block_steps + lookahead_steps
            kept_steps = most if is_rest else block_steps
            blocks.append(self._encode_block(heard, state, max_steps=most, kept_steps=kept_steps))
            x = x[:, :, size:]
            rest = 0 if is_rest else rest - size
        state.features = x
        return torch.cat(blocks) if blocks else x.new_zeros(0, self.width)

    def _encode_block(
        self, features: Tensor, state: EncoderState, *, max_steps: int, kept_steps: int
    ) -> Tensor:
        """Encode a stretch of a window and keep its first frames, [s, E].

        Args:
            features: of the stretch and beside it, as far as the convolutions see, [1, M, 2 + F + 1].
            state: of the window; knows the kept frames afterwards.
            max_steps: frames of the stretch; fewer where the window ends.
            kept_steps: frames that are kept, at most.
        """
        num_frames = min(features.shape[2] - _CONV_PAST, max_steps * self.stride)
        steps = self.num_steps(num_frames)
        x = nn.functional.gelu(self.encoder.conv1(features))
        # The second convolution pads with zeros before a window and after its end; what the first one made
        # of its own padding is not looked at.
        if not state.steps:
            x[:, :, :_CONV_PAST] = 0
        x = x[:, :, : _CONV_PAST + num_frames]
        x = nn.functional.gelu(self.encoder.conv2(x))[:, :, 1 : 1 + steps].transpose(1, 2)  # [1, s, E]
        x = x + self.encoder.embed_positions.weight[state.steps : state.steps + steps]
        for index, layer in enumerate(self.encoder.layers):
            x = self._run_layer(layer, x, state, index)
        kept: Tensor = self.encoder.layer_norm(x[:, :kept_steps])[0]
        state.steps += len(kept)  # keys and values after that are written again
        return kept

    def _run_layer(self, layer: Any, x: Tensor, state: EncoderState, index: int) -> Tensor:
        """One layer of transformers' encoder, [1, s, E], which also sees the frames before."""
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [1, H, s, W]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if index == len(state.keys):
            room = self.window_frames // self.stride
            state.keys.append(key.new_empty(1, key.shape[1], room, key.shape[3]))
            state.values.append(torch.empty_like(state.keys[-1]))
        end = state.steps + x.shape[1]
        state.keys[index][:, :, state.steps : end] = key
        state.values[index][:, :, state.steps : end] = value
        attended = nn.functional.scaled_dot_product_attention(
            query, state.keys[index][:, :, :end], state.values[index][:, :, :end], scale=attention.scaling
        )
        x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
        normed = layer.final_layer_norm(x)
        mlp: Tensor = layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return x + mlp

    def _check(self, features: Tensor, lengths: Tensor, padding: EncoderPadding) -> None:
        if features.dim() != 3 or features.shape[1] != self.num_mel_bins:
            raise AudioError(
                f"this encoder takes features [B, {self.num_mel_bins}, F], got {list(features.shape)}; "
                "make them with its own log_mel()",
                reason="wrong_type",
            )
        num_frames = features.shape[-1]
        exactly = padding != "true_length"
        if num_frames > self.window_frames or (exactly and num_frames != self.window_frames):
            limit = "exactly" if exactly else "at most"
            raise AudioError(
                f"a window has {limit} {self.window_frames} feature frames, got {num_frames}; "
                "LogMel.windows splits long recordings",
                reason="too_long" if num_frames > self.window_frames else "wrong_type",
            )
        if lengths.shape != features.shape[:1] or not bool(((lengths >= 1) & (lengths <= num_frames)).all()):
            raise AudioError(
                f"lengths must be {features.shape[0]} numbers from 1 to {num_frames}, got {lengths.tolist()}",
                reason="wrong_type",
            )


def _mask(lengths: Tensor, size: int) -> Tensor:
    """True before each length, [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _block_mask(heard: Tensor, block_steps: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores where each block sees itself and those before, [B, 1, A', A'].

    Args:
        heard: whether a frame belongs to the recording, bool [B, A'].
        block_steps: frames of a block.
        dtype: of the result.
    """
    blocks = torch.arange(heard.shape[1], device=heard.device) // block_steps
    visible = (blocks[None] <= blocks[:, None]) & heard[:, None]  # [B, A', A'], query by key
    mask = torch.zeros(visible.shape, dtype=dtype, device=heard.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _whisper_log_mel(num_mel_bins: int, window_frames: int) -> LogMel:
    """Whisper's features with a window of another length."""
    whisper = LogMel(num_mel_bins)
    return LogMel(num_mel_bins, window_seconds=window_frames * whisper.hop_length / whisper.sampling_rate)


def _encoder_of(model: PreTrainedModel) -> WhisperEncoder:
    encoder = model if isinstance(model, WhisperEncoder) else getattr(model, "encoder", None)
    if encoder is None and hasattr(model, "get_encoder"):
        encoder = model.get_encoder()
    if not isinstance(encoder, WhisperEncoder):
        raise CheckpointError(f"hearing needs a Whisper model of transformers, got {type(model).__name__}")
    return encoder


def _load(name: str, options: Mapping[str, Any]) -> WhisperEncoder:
    """The encoder of a checkpoint of transformers."""
    try:
        config, _ = WhisperConfig.get_config_dict(name, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a readable repository of the Hub with a config.json: {error}"
        ) from error
    if config.get("model_type") != WhisperConfig.model_type:
        raise CheckpointError(f"{name} is a {config.get('model_type')} model; hearing needs a Whisper model")
    try:
        loaded: Any = _EncoderOnly.from_pretrained(
            name,
            use_safetensors=True,
            key_mapping=_ENCODER_PREFIXES,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the encoder of {name} cannot be loaded from safetensors: {error}") from error
    encoder: WhisperEncoder = loaded[0]
    info: Mapping[str, set[str]] = loaded[1]
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unknown:
        raise CheckpointError(f"{name} does not fit its config: missing {missing}, unknown {unknown}")
    check_finite(encoder.state_dict(), source=name)
    return encoder


def _from_package(name: str) -> AudioEncoder:
    """A model that the whisper package downloads by name."""
    try:
        import whisper
    except ImportError as error:
        raise MissingDependencyError(
            "the openai-whisper package", extra="whisper", purpose=f"the encoder {name!r}"
        ) from error
    try:
        model = whisper.load_model(name.removeprefix(PACKAGE_PREFIX), device="cpu")
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"the whisper package cannot load {name!r}: {error}") from error
    checkpoint = {"dims": vars(model.dims), "model_state_dict": model.state_dict()}
    return _from_package_checkpoint(checkpoint, source=name)


def _from_package_checkpoint(checkpoint: Any, *, source: str) -> AudioEncoder:
    """A checkpoint of the whisper package: its sizes and the weights of the whole model."""
    if not isinstance(checkpoint, dict) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise CheckpointError(
            f"{source} is no checkpoint of the whisper package: no dims and model_state_dict"
        )
    dims = checkpoint["dims"]
    if any(not isinstance(dims.get(key), int) or dims[key] < 1 for key in _PACKAGE_DIMS):
        raise CheckpointError(
            f"{source}: dims must hold whole numbers for {', '.join(_PACKAGE_DIMS)}, got {dims}"
        )
    config = WhisperConfig(
        num_mel_bins=dims["n_mels"],
        max_source_positions=dims["n_audio_ctx"],
        d_model=dims["n_audio_state"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_layers=dims["n_audio_layer"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
    )
    with torch.device("meta"):  # no memory until the weights are known to fit
        encoder = WhisperEncoder(config)
    state = {
        _transformers_name(name.removeprefix("encoder.")): tensor.float()
        for name, tensor in checkpoint["model_state_dict"].items()
        if name.startswith("encoder.")
    }
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    check_shapes({name: tensor.shape for name, tensor in state.items()}, expected=expected, source=source)
    check_finite(state, source=source)
    encoder.load_state_dict(state, assign=True)
    return AudioEncoder(encoder)


def _transformers_name(name: str) -> str:
    for package_part, part in _PACKAGE_NAMES:
        name = name.replace(package_part, part)
    return name
