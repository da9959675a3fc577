"""Ultravox: a projector that lets a language model hear (https://github.com/fixie-ai/ultravox).

``config.json`` and safetensors in, a talker out whose hearing is theirs. Its voice is new and untrained: they
have none. Knows nothing of how a talker is run or saved.

    Ultravox                                          talker
    multi_modal_projector.ln_pre                      audio_adapter.in_norm
    multi_modal_projector.linear_1                    audio_adapter.up; of swiglu the second half is gate
    multi_modal_projector.ln_mid (from v0.5)          audio_adapter.hidden_norm
    multi_modal_projector.linear_2                    audio_adapter.down
    multi_modal_projector.ln_post (up to v0.4.1)      audio_adapter.out_norm
    audio_tower.*, where it was trained too           the audio encoder
    text_model_id                                     the base, by its name
"""

from collections.abc import Collection, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.config import Positive, parse
from omni_adapter.errors import CheckpointError, ConfigError
from omni_adapter.hub.files import read_json
from omni_adapter.hub.options import is_hub_id
from omni_adapter.importers.port import (
    DEFAULT_CODEC,
    ImportOptions,
    Source,
    keep_inside,
    load_weights,
)
from omni_adapter.modules.audio_encoder import AudioEncoder
from omni_adapter.talker import OmniAdapter
from omni_adapter.tensor_files import check_shapes, read_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PROJECTOR, _TOWER, _LM = "multi_modal_projector.", "audio_tower.", "language_model."
_ACTIVATIONS = ("swiglu", "relu", "gelu", "silu")
_MAX_LAYERS = 1000


@dataclass(frozen=True)
class UltravoxConfig:
    """What matters of ``config.json``; names and defaults are theirs."""

    text_model_id: str | None = None
    audio_model_id: str | None = None
    audio_config: dict[str, Any] = field(default_factory=dict)
    hidden_size: Positive = 4096
    stack_factor: Positive = 8
    projector_act: str = "swiglu"
    projector_ln_mid: bool = False
    num_projector_layers: int | None = None
    audio_latency_block_size: int | None = None

    @property
    def inside(self) -> int:
        """Width between the two linear layers of the projector."""
        return self.hidden_size // 2 if self.projector_act == "swiglu" else self.hidden_size


class UltravoxImporter:
    """Reads the projector, and the audio encoder where it was trained too."""

    summary = "Ultravox, hearing only: config.json and safetensors with the projector"
    takes: Collection[str] = frozenset({"base", "encoder", "codec"})
    files: Collection[str] = (CONFIG_FILE, "*.safetensors", INDEX_FILE)

    def read(self, source: Source, *, options: ImportOptions) -> OmniAdapter:
        """Return a talker that hears as the checkpoint does and answers in the words of its base.

        Recordings stand in the chat template without marks around them, and nothing marks a transcription
        either: ask for one in words. The voice has to be trained.

        Raises:
            CheckpointError: if files are missing, broken, or do not fit each other.
            ConfigError: if the checkpoint has a setting that a talker cannot have; the message names it.
        """
        config = read_ultravox_config(source.file(CONFIG_FILE))
        state = read_weights(source)
        base = _place(options.base or config.text_model_id, "base", source, asked=options.base is not None)
        tower = {name: tensor for name, tensor in state.items() if name.startswith(_TOWER)}
        places = replace(options.hub, revision=None).arguments()
        if tower:
            encoder: Any = _encoder(tower, config, source)
        else:
            encoder = _place(
                options.encoder or config.audio_model_id, "encoder", source, asked=options.encoder is not None
            )
        talker = OmniAdapter.wrap(
            base,
            encoder=encoder,
            codec=options.codec or DEFAULT_CODEC,
            recording_marks=False,
            audio_adapter={
                "stack": config.stack_factor,
                "hidden_width": config.inside,
                "activation": config.projector_act,
                "norms": ["in", "hidden" if config.projector_ln_mid else "out"],
            },
            dtype=options.dtype,
            **places,
        )
        load_weights(talker.model.audio_adapter, adapter_weights(state, config), source=source.name)
        _silence_marks(talker)
        return keep_inside(talker, ("encoder",), source=source) if tower else talker


def read_ultravox_config(path: Path) -> UltravoxConfig:
    """Read ``config.json``.

    Raises:
        CheckpointError: if it is no JSON object.
        ConfigError: naming the settings that a talker cannot have, or that have a wrong value.
    """
    values = read_json(path)
    known = UltravoxConfig.__dataclass_fields__
    config = parse(UltravoxConfig, {name: values[name] for name in known if name in values}, source=str(path))
    wrong = []
    if values.get("model_type", "ultravox") != "ultravox":
        wrong.append(f"model_type={values['model_type']!r} instead of 'ultravox'")
    if config.projector_act not in _ACTIVATIONS:
        wrong.append(f"projector_act={config.projector_act!r} instead of one of {', '.join(_ACTIVATIONS)}")
    if config.projector_act == "swiglu" and config.hidden_size % 2:
        wrong.append(f"hidden_size={config.hidden_size}, which swiglu cannot halve")
    if config.num_projector_layers:
        wrong.append(f"num_projector_layers={config.num_projector_layers} instead of 0")
    if config.audio_latency_block_size:
        wrong.append(
            f"audio_latency_block_size={config.audio_latency_block_size} instead of null: its encoder hears "
            "block by block"
        )
    if wrong:
        raise ConfigError(f"{path} has settings that a talker cannot have: {'; '.join(wrong)}")
    return config


def read_weights(source: Source) -> dict[str, Tensor]:
    """Read projector and audio encoder from one file or from the shards that an index lists.

    Raises:
        CheckpointError: if files are missing or broken, or the checkpoint trained its language model too.
    """
    if (source.path / WEIGHTS_FILE).is_file():
        shards = [WEIGHTS_FILE]
    else:
        weight_map = read_json(source.file(INDEX_FILE)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"{source.name}: weight_map of {INDEX_FILE} must name the file of each tensor"
            )
        if any(name.startswith(_LM) for name in weight_map):
            raise _lm_was_trained(source)
        shards = sorted({file for name, file in weight_map.items() if name.startswith((_PROJECTOR, _TOWER))})
        outside = [file for file in shards if Path(file).name != file]
        if outside:
            raise CheckpointError(
                f"{source.name}: {INDEX_FILE} names {outside[0]!r}, which is no file beside it"
            )
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_safetensors(source.file(shard), prefixes=(_PROJECTOR, _TOWER, _LM))
    if any(name.startswith(_LM) for name in state):
        raise _lm_was_trained(source)
    return state


def adapter_weights(state: Mapping[str, Tensor], config: UltravoxConfig) -> dict[str, Tensor]:
    """Return the projector's weights by the names of our audio adapter; what it lacks is left out."""
    projector = {
        name.removeprefix(_PROJECTOR): tensor for name, tensor in state.items() if name.startswith(_PROJECTOR)
    }
    names = {
        "ln_pre.weight": "in_norm.weight",
        "linear_1.weight": "up.weight",
        "ln_mid.weight": "hidden_norm.weight",
        "linear_2.weight": "down.weight",
        "ln_post.weight": "out_norm.weight",
    }
    weights = {names.get(name, name): tensor for name, tensor in projector.items()}
    if config.projector_act == "swiglu" and "up.weight" in weights:
        weights["up.weight"], weights["gate.weight"] = weights["up.weight"].chunk(2)
    return weights


def _encoder(tower: Mapping[str, Tensor], config: UltravoxConfig, source: Source) -> AudioEncoder:
    """The audio encoder that was trained with the projector.

    Raises:
        CheckpointError: if it is no Whisper, or not all of it is there.
    """
    values = config.audio_config
    if values.get("model_type", WhisperConfig.model_type) != WhisperConfig.model_type:
        raise CheckpointError(
            f"{source.name} hears by a {values['model_type']} model; hearing needs a Whisper model"
        )
    try:
        whisper = WhisperConfig(**values)
        if not 0 < whisper.encoder_layers <= _MAX_LAYERS:
            raise ValueError(f"encoder_layers is {whisper.encoder_layers}")
        with torch.device("meta"):  # no memory until the weights are known to fit
            encoder = WhisperEncoder(whisper)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{source.name}: audio_config in {CONFIG_FILE} is not that of a Whisper: {error}"
        ) from error
    weights = {name.removeprefix(_TOWER): tensor.float() for name, tensor in tower.items()}
    check = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    check_shapes(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        expected=check,
        source=f"the audio_tower of {source.name}",
    )
    encoder.load_state_dict(weights, assign=True)
    return AudioEncoder(encoder)


def _place(name: str | None, part: str, source: Source, *, asked: bool) -> str:
    """Where a part lies that the checkpoint only names.

    Raises:
        CheckpointError: if it has no name, or a checkpoint of the Hub names a file of this machine.
    """
    if not name:
        raise CheckpointError(f"{source.name} does not name its {part}; pass it as an option")
    if not asked and source.hub_id and not is_hub_id(name):
        raise CheckpointError(
            f"{source.name} names the {part} {name!r}, which is no Hub id; pass it as an option"
        )
    return name


def _lm_was_trained(source: Source) -> CheckpointError:
    return CheckpointError(
        f"{source.name} holds weights of its language model ({_LM}*); only checkpoints that train hearing "
        "alone can be imported"
    )


@torch.no_grad()
def _silence_marks(talker: OmniAdapter) -> None:
    """Let the marks of the last prompt step weigh nothing, as the base was never trained on them."""
    embedding, vocabulary = talker.model.code_embedding, talker.config.vocabulary
    for row in range(embedding.num_codebooks):
        for mark in (vocabulary.answer, vocabulary.asr):
            embedding.weight[row * vocabulary.size + mark] = 0
