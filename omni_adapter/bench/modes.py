"""The ways in which a talker can decode here, and how each is loaded.

A talker's folder or name and a mode in, a talker out, or the reason why this mode cannot be had.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from omni_adapter.audio.codec import SnacConfig
from omni_adapter.bench.presets import Preset, load_talker, make_tokenizer
from omni_adapter.modules.tts_blocks import TtsBlocks
from omni_adapter.talker import OmniAdapter
from omni_adapter.vocab import CodeVocabulary


@dataclass(frozen=True)
class Mode:
    """A way to decode.

    Attributes:
        name: for JSON and options.
        what: in words.
        weight_bytes: bytes of a weight that a step reads.
        precision: what ``from_pretrained`` is asked for; None loads float32 weights and packs nothing.
    """

    name: str
    what: str
    weight_bytes: int
    precision: str | None


MODES = (
    Mode("plain", "float32 weights as transformers holds them", 4, None),
    Mode("fp32", "float32, repacked for this machine", 4, "fp32"),
    Mode("bf16", "bfloat16, repacked", 2, "bf16"),
    Mode("int8", "8 bits, repacked", 1, "int8"),
)
"""Ours, the plainest first."""

REFERENCES = {"reference_fp32": torch.float32, "reference_bf16": torch.bfloat16}
"""The published implementation, and the type of its weights."""


def why_not(mode: Mode) -> str | None:
    """Say why this version cannot have a mode; None if it can."""
    if mode.precision is None:
        return None
    if "precision" not in inspect.signature(OmniAdapter.from_pretrained).parameters:
        return "this version packs no weights"
    return None


def load_mode(name: str, mode: Mode, *, device: torch.device, preset: str | None = None) -> OmniAdapter:
    """Load a talker in a mode.

    Args:
        name: folder or Hub id.
        mode: in which it shall decode.
        device: where to.
        preset: the one whose random weights it has; transformers would load its tokenizer as that of the
            base's family.
    """
    loading: dict[str, Any] = {"tokenizer": make_tokenizer(preset)} if preset else {}
    if mode.precision is None:
        return load_talker(name, dtype="float32", **loading).to(device)
    if device.type == "cpu":
        return load_talker(name, precision=mode.precision, **loading)
    return load_talker(name, **loading).to(device).pack(mode.precision)


@dataclass(frozen=True)
class StepWeights:
    """Weights that decoding steps read, counted before anything is packed.

    Attributes:
        body: the language model without embedding and head.
        text_head: its head, which a step reads while the text goes on.
        tts_blocks: the blocks between it and the code heads.
        code_heads: all of them.
    """

    body: int
    text_head: int
    tts_blocks: int
    code_heads: int

    @classmethod
    def of(cls, talker: OmniAdapter) -> "StepWeights":
        """Count those of a talker that is not packed."""
        body, head = _lm_weights(talker.model.backbone.lm)
        return cls(body, head, _size(talker.model.tts_blocks), _size(talker.model.code_heads))

    @classmethod
    def of_preset(cls, preset: Preset) -> "StepWeights":
        """Count those of a preset without TTS blocks, without building it."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset.lm))  # type: ignore[no-untyped-call]
        body, head = _lm_weights(lm)
        spec = SnacConfig(**preset.codec).spec
        vocabulary = CodeVocabulary(spec.codebook_size)
        return cls(body, head, 0, spec.num_codebooks * vocabulary.size * preset.lm["hidden_size"])

    def total(self, *, text_runs: bool, tts_layers: bool) -> int:
        """Weights of a step."""
        return (
            self.body
            + self.code_heads
            + (self.text_head if text_runs else 0)
            + (self.tts_blocks if tts_layers else 0)
        )


@contextmanager
def tts_layers(talker: OmniAdapter, count: int | None) -> Iterator[OmniAdapter]:
    """Let a talker do with ``count`` TTS blocks, all that it has or none, while the block runs.

    What the code heads then read is the language model's own state, as in the published network without
    its further blocks. None leaves it as it is.
    """
    model = talker.model
    blocks = model.tts_blocks
    if count is None or count == talker.config.tts.layers:
        yield talker
        return
    config = replace(talker.config.tts, layers=0, input="after_norm")
    model.tts_blocks = TtsBlocks(width=talker.config.hidden_width, config=config).eval()
    try:
        yield talker
    finally:
        model.tts_blocks = blocks


def _lm_weights(lm: PreTrainedModel) -> tuple[int, int]:
    """Weights of a language model's blocks and norms, and of its head."""
    head = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = lm.get_input_embeddings()
    outside = {id(embedding.weight)} | ({id(head.weight)} if head is not None else set())
    body = sum(weight.numel() for weight in lm.parameters() if id(weight) not in outside)
    return body, head.weight.numel() if head is not None else 0


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
