"""What an importer is: a published checkpoint in, a talker out.

A folder or Hub id and options in; files on this machine out. Knows nothing of any checkpoint's layout: each
is one file beside this one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from omni_adapter.config import OmniConfig, PartRef
from omni_adapter.data.processor import OmniProcessor
from omni_adapter.errors import CheckpointError, ConfigError
from omni_adapter.hub import HubOptions
from omni_adapter.hub.options import HUB_ERRORS, unreachable
from omni_adapter.model_card import CARD_FILE, read_license
from omni_adapter.talker import OmniAdapter
from omni_adapter.tensor_files import check_shapes
from omni_adapter.vocab import TextMarks

DEFAULT_ENCODER = "openai/whisper-small"
DEFAULT_CODEC = "hubertsiuzdak/snac_24khz"

SPECIAL_IDS = 64
"""Rows of each vocabulary, text and every code row, that checkpoints of Mini-Omni's layout keep for marks."""

_MARKS = ("end", "pad", "input", "answer", "asr")  # the first of them, in both vocabularies


@dataclass(frozen=True)
class ImportOptions:
    """What to import with. An importer refuses those that it has no use for.

    Attributes:
        base: folder or Hub id of the language model, for checkpoints that hold only what was added to it.
        encoder: folder, Hub id or file of the audio encoder; None takes the checkpoint's own.
        codec: folder or Hub id of the codec; None takes the one that the checkpoint was trained with.
        dtype: type of the weights, such as ``float32``; ``auto`` keeps that of the file.
        hub: where to look for what is named by a Hub id; ``revision`` is that of the checkpoint.
    """

    base: str | None = None
    encoder: str | None = None
    codec: str | None = None
    dtype: str = "auto"
    hub: HubOptions = field(default_factory=HubOptions)


class Source(NamedTuple):
    """A published checkpoint on this machine."""

    path: Path  # folder, or a single file
    name: str  # as it was asked for: a path or a Hub id
    hub_id: str | None  # None if it is a path

    def file(self, name: str) -> Path:
        """Return the path of a file of the checkpoint.

        Raises:
            CheckpointError: if it is not there.
        """
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(f"{self.name} holds no {name}; pass the folder or Hub id that has it")
        return path


class Importer(Protocol):
    """Reads the published checkpoints of one project."""

    @property
    def summary(self) -> str:
        """One line for the command's help: whose checkpoints, and which files of them."""

    @property
    def takes(self) -> Collection[str]:
        """Which of ``base``, ``encoder`` and ``codec`` it has use for."""

    @property
    def files(self) -> Collection[str]:
        """Patterns of the files that are downloaded when the checkpoint is named by its Hub id."""

    def read(self, source: Source, *, options: ImportOptions) -> OmniAdapter:
        """Return the checkpoint as a talker; parts that came with it are marked by :func:`keep_inside`.

        Raises:
            CheckpointError: if files are missing, broken, or do not fit each other.
            ConfigError: if the checkpoint has a setting that a talker cannot have; the message names it.
        """


def run_importer(importer: Importer, source: str | Path, *, options: ImportOptions) -> OmniAdapter:
    """Find the files of a published checkpoint and read them.

    Args:
        importer: who knows their layout.
        source: folder, file or Hub id.
        options: what to import with.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is broken.
        ConfigError: if an option is of no use to the importer.
    """
    useless = [
        part
        for part in ("base", "encoder", "codec")
        if getattr(options, part) is not None and part not in importer.takes
    ]
    if useless:
        usable = ", ".join(sorted(importer.takes)) or "none of base, encoder and codec"
        raise ConfigError(f"this importer has no use for {', '.join(useless)}; it takes {usable}")
    return importer.read(_fetch(str(source), importer.files, options.hub), options=options)


def keep_inside(talker: OmniAdapter, parts: Collection[str], *, source: Source) -> OmniAdapter:
    """Return the talker with ``parts`` marked as its own: saving it writes them beside the added weights.

    Args:
        talker: not to be used any more.
        parts: base, encoder or codec, as far as they came with the checkpoint.
        source: the checkpoint; the licence that its card states is the base's.
    """
    inside: dict[str, PartRef] = {
        part: replace(getattr(talker.config, part), id=f"./{part}", origin=source.hub_id) for part in parts
    }
    card = source.path / CARD_FILE
    if "base" in inside and card.is_file():
        inside["base"] = replace(inside["base"], license=read_license(card))
    return with_refs(talker, inside)


def with_refs(talker: OmniAdapter, refs: Mapping[str, PartRef]) -> OmniAdapter:
    """Return the talker with other names for its parts; the parts stay the same.

    Args:
        talker: not to be used any more.
        refs: how to name base, encoder or codec; what they are recognised by is kept.
    """
    known = {part: getattr(talker.config, part).fingerprint for part in refs}
    named: dict[str, Any] = {part: replace(ref, fingerprint=known[part]) for part, ref in refs.items()}
    config: OmniConfig = replace(talker.config, **named)
    talker.model.config = config
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    return OmniAdapter(
        talker.model, processor=processor, codec=talker.codec, config=config, datasets=talker.datasets
    )


def lm_dtype(name: str, weights: Tensor) -> torch.dtype:
    """Return the type that ``ImportOptions.dtype`` names; ``auto`` is that of ``weights``.

    Raises:
        ConfigError: if there is no such type.
    """
    if name == "auto":
        return weights.dtype
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return dtype


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into a module, all of them and nothing else.

    Args:
        module: keeps its type and device.
        weights: by the module's own names.
        source: what to call the origin in an error.

    Raises:
        CheckpointError: naming the missing, unknown and wrongly shaped tensors.
    """
    own = dict(module.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in own.items()}
    check_shapes(shapes, expected=expected, source=source)
    for name, tensor in weights.items():
        own[name].data.copy_(tensor)


def _fetch(name: str, patterns: Collection[str], options: HubOptions) -> Source:
    """Where a checkpoint lies, downloaded if need be, all from one commit."""
    if Path(name).exists():
        return Source(Path(name), name, None)
    options = options.pinned(name)
    try:
        folder = snapshot_download(name, allow_patterns=list(patterns), **options.arguments())
    except HUB_ERRORS as error:
        raise CheckpointError(unreachable(name, error)) from error
    return Source(Path(folder), name, name)


def text_marks(text_rows: int) -> TextMarks:
    """Return the ids of the text marks where the text's table has ``text_rows`` rows, marks included."""
    first = text_rows - SPECIAL_IDS
    return TextMarks(**{name: first + index for index, name in enumerate(_MARKS)})
