"""SLAM-Omni in Mini-Omni mode (https://github.com/X-LANCE/SLAM-LLM, examples/s2s): ``model.pt`` as a talker.

The weights that were trained in, a talker out. The language model's config and tokenizer, the audio encoder
and the codec, which training left as they were, come from where they were published. Knows nothing of how a
talker is run or saved.

    model.pt                                                   talker
    encoder_projector.linear1, linear2                         audio_adapter.up, down
    llm.model.embed_tokens.weight: text rows                   the base's embedding
                                   audio rows                  code_embedding
    llm.lm_head.weight likewise, where it is not tied          the base's head, code_heads
    llm.*                                                      the base's other weights
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from omni_adapter import hub
from omni_adapter.config import CodecSpec
from omni_adapter.errors import CheckpointError, ConfigError
from omni_adapter.importers.port import (
    DEFAULT_CODEC,
    DEFAULT_ENCODER,
    SPECIAL_IDS,
    ImportOptions,
    Source,
    keep_inside,
    lm_dtype,
    load_weights,
    text_marks,
    with_refs,
)
from omni_adapter.talker import OmniAdapter
from omni_adapter.tensor_files import check_finite, check_shapes, read_torch_file
from omni_adapter.vocab import CodeVocabulary, TextMarks

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.pt"
DEFAULT_BASE = "Qwen/Qwen2-0.5B"

_PROJECTOR, _LM = "encoder_projector.", "llm."
# Modules that their forward pass never runs, or that only turn codes into sound.
_IDLE = ("tts_adapter.", "codec_decoder.")
_REFUSED: Mapping[str, str] = {
    "group_decode_adapter.": "it writes codes in groups; only Mini-Omni mode, with one row of SNAC for each "
    "code of a frame, can be imported",
    "encoder.": "its audio encoder was trained too (freeze_encoder=false)",
    "whisper_model.": "its audio encoder was trained too (freeze_encoder=false)",
    "llm.base_model.": "its language model was trained with LoRA (use_peft=true); merge that with PEFT first",
    "encoder_projector.conv1d.": "its projector is cov1d-linear; only a linear one can be imported",
    "encoder_projector.qformer.": "its projector is a q-former; only a linear one can be imported",
}


class BuiltLm(NamedTuple):
    """The language model, and what was split off its tables."""

    lm: PreTrainedModel
    marks: TextMarks
    base_ids: int  # rows of the base's table before training
    read: Tensor  # [K * V, D], of its embedding
    written: Tensor  # [K * V, D], of its head


class SlamOmniImporter:
    """Reads ``model.pt``."""

    summary = "SLAM-Omni in Mini-Omni mode: model.pt of SLAM-LLM's examples/s2s"
    takes: Collection[str] = frozenset({"base", "encoder", "codec"})
    files: Collection[str] = (WEIGHTS_FILE, "README.md")

    def read(self, source: Source, *, options: ImportOptions) -> OmniAdapter:
        """Return the checkpoint as a talker.

        Its prompts, the mean over all streams and the encoder's whole window are the original's. Code rows
        write only what the delay pattern allows, so that nothing of a reply's end is lost.

        Raises:
            CheckpointError: if the file is missing or broken, or does not fit base, encoder or codec.
            ConfigError: if the checkpoint has a setting that a talker cannot have; the message names it.
        """
        path = source.path if source.path.is_file() else source.file(WEIGHTS_FILE)
        state = read_state(path)
        places = replace(options.hub, revision=None)
        encoder, encoder_ref = hub.load_encoder(options.encoder or DEFAULT_ENCODER, options=places)
        codec, codec_ref = hub.load_codec(options.codec or DEFAULT_CODEC, options=places)
        adapter = _adapter_weights(_without_prefix(state, _PROJECTOR), source=str(path))
        built = build_lm(state, options, codec.spec, source=str(path))
        talker = OmniAdapter.wrap(
            built.lm,
            encoder=encoder,
            codec=codec,
            tts_layers=0,
            fusion="mean",
            text_end_ids=[built.marks.end],
            prompt_format="slam_omni",
            text_marks=asdict(built.marks),
            encoder_padding="whole_window",
            audio_adapter={
                "stack": _stack(adapter["up.weight"], encoder.width, source=str(path)),
                "hidden_width": adapter["up.weight"].shape[0],
                "activation": "relu",
                "bias": True,
            },
            **places.arguments(),
        )
        tokenizer_ids = len(talker.tokenizer)
        _check_text_ids(built.marks, base_ids=built.base_ids, tokenizer_ids=tokenizer_ids, source=str(path))
        load_weights(talker.model.audio_adapter, adapter, source=str(path))
        load_weights(talker.model.code_embedding, {"weight": built.read}, source=str(path))
        load_weights(talker.model.code_heads, {"proj.weight": built.written}, source=str(path))
        talker = with_refs(talker, {"encoder": encoder_ref, "codec": codec_ref})
        return keep_inside(talker, ("base",), source=source)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the trained weights by their names; those that the original never runs are left out.

    Raises:
        CheckpointError: if the file is broken, holds anything but tensors by name, or lacks a part.
        ConfigError: if the checkpoint is of another kind; the message names it.
    """
    state = read_torch_file(path, mapped=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold tensors by name, as SLAM-LLM saves them")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for prefix, reason in _REFUSED.items():
        if any(name.startswith(prefix) for name in state):
            raise ConfigError(f"{path} cannot be imported: {reason}")
    idle = [name for name in state if name.startswith(_IDLE)]
    if idle:
        logger.warning(
            "%s: %d tensors that the original never runs are left out, such as %s", path, len(idle), idle[0]
        )
    unknown = [name for name in state if not name.startswith((_PROJECTOR, _LM, *_IDLE))]
    if unknown:
        raise CheckpointError(f"{path} holds {unknown[0]}, which no SLAM-Omni has; is it another model's?")
    for prefix, part in ((_PROJECTOR, "projector"), (_LM, "language model")):
        if not any(name.startswith(prefix) for name in state):
            raise CheckpointError(
                f"{path} holds no {part} ({prefix}*): it was frozen in training, so this is no whole talker"
            )
    state = {name: tensor for name, tensor in state.items() if name not in idle}
    check_finite(state, source=str(path))
    return state


def build_lm(state: Mapping[str, Tensor], options: ImportOptions, spec: CodecSpec, *, source: str) -> BuiltLm:
    """Return the language model with the text rows of its tables, and what belongs to it.

    Raises:
        BackboneError: if the base's config cannot be found.
        CheckpointError: if the weights do not fit it.
    """
    weights = _without_prefix(state, _LM)
    base = options.base or DEFAULT_BASE
    config = hub.read_lm_config(base, options=replace(options.hub, revision=None))
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        plan: PreTrainedModel = make(config)
    names = {id(parameter): name for name, parameter in plan.named_parameters()}
    tables: list[Any] = [find() for find in (plan.get_input_embeddings, plan.get_output_embeddings)]
    read, written = (names[id(table.weight)] for table in tables)  # one name where they are tied
    for name, first_name in _twins(plan, names).items():
        twin = weights.pop(name, None)
        if twin is not None and not torch.equal(twin, weights.get(first_name, twin)):
            raise CheckpointError(
                f"{source} holds another {_LM}{name}, which the base ties to {_LM}{first_name}; pass the "
                "base that it was trained with"
            )
    if read not in weights or written not in weights:
        raise CheckpointError(
            f"{source} holds no {_LM}{read if read not in weights else written}, where the ids of the codes "
            "are; pass the base that it was trained with"
        )
    split = {name: _take_apart(weights[name], spec, source=f"{source}, {name}") for name in (read, written)}
    weights |= {name: text for name, (text, _) in split.items()}
    text_rows, base_ids = weights[read].shape[0], config.vocab_size
    marks = text_marks(text_rows)
    config.vocab_size = text_rows
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, marks.end, marks.pad
    dtype = lm_dtype(options.dtype, weights[read])
    with torch.device("meta"):  # no memory until the weights are known to fit
        plan = make(config)
    check_shapes(_shapes(weights), expected=_shapes(dict(plan.named_parameters())), source=source)
    lm = type(plan).from_pretrained(
        None,
        config=config,
        # Copied: the file must not be needed any more.
        state_dict={name: tensor.to(dtype, copy=True) for name, tensor in weights.items()},
        dtype=dtype,
    )
    lm.config._name_or_path = base  # where the tokenizer is
    lm.train(False)
    return BuiltLm(lm, marks, base_ids, split[read][1], split[written][1])


def _twins(lm: PreTrainedModel, names: Mapping[int, str]) -> dict[str, str]:
    """Second names of weights that the model has once, with the first: files with all weights hold both."""
    every = lm.named_parameters(remove_duplicate=False)
    return {name: names[id(weight)] for name, weight in every if names[id(weight)] != name}


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _take_apart(table: Tensor, spec: CodecSpec, *, source: str) -> tuple[Tensor, Tensor]:
    """Split a joint table into the rows of text [V, D] and those of all code rows [K * V, D].

    Raises:
        CheckpointError: if there is no room for text beside the codec's ids.
    """
    code_rows = spec.num_codebooks * CodeVocabulary(spec.codebook_size).size
    text_rows = table.shape[0] - code_rows
    if text_rows <= SPECIAL_IDS:
        raise CheckpointError(
            f"{source} has {table.shape[0]} rows, of which the codec's ids take {code_rows}; pass the codec "
            "that it was trained with"
        )
    # Copied: a slice of the file's table would keep the whole of it.
    return table[:text_rows].clone(), table[text_rows:].clone()


def _check_text_ids(marks: TextMarks, *, base_ids: int, tokenizer_ids: int, source: str) -> None:
    """See that the text ids end where the base's do; otherwise the tables were split in the wrong place.

    Raises:
        CheckpointError: if they do not.
    """
    if not tokenizer_ids <= marks.end <= base_ids:
        raise CheckpointError(
            f"{source} has {marks.end} text ids beside those of the codec, the base has {base_ids} and its "
            f"tokenizer {tokenizer_ids}; pass base and codec that it was trained with"
        )


def _adapter_weights(projector: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The projector's weights by the names of our audio adapter.

    Raises:
        CheckpointError: if it is not two linear layers with biases.
    """
    names = {
        f"{theirs}.{kind}": f"{own}.{kind}"
        for theirs, own in (("linear1", "up"), ("linear2", "down"))
        for kind in ("weight", "bias")
    }
    if names.keys() != projector.keys():
        raise CheckpointError(
            f"{source}: the projector must be {', '.join(names)}, got {', '.join(sorted(projector))}"
        )
    return {names[name]: tensor for name, tensor in projector.items()}


def _stack(matrix: Tensor, frame_width: int, *, source: str) -> int:
    """Frames that the projector joins: as many as its first matrix [H, stack * E] takes numbers of.

    Raises:
        CheckpointError: if that is no whole number.
    """
    stack, rest = divmod(matrix.shape[1], frame_width)
    if rest or not stack:
        raise CheckpointError(
            f"{source}: the projector takes {matrix.shape[1]} numbers, the encoder's frames have "
            f"{frame_width}; pass the encoder that it was trained with"
        )
    return stack


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
