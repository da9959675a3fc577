"""Find the adapter of PEFT that a base comes with: a folder, a repository, or inside a loaded LM.

What a caller names as the base in; the base itself, the adapter and how to name it out. Settings of strangers
are checked before PEFT reads them, and no pickle is read. Knows nothing of how the two are put together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file

from omni_adapter.backbone import ADAPTER_CONFIG, ADAPTER_FILES, Carried, read_carried, take_adapter
from omni_adapter.config import PartRef
from omni_adapter.errors import BackboneError, CheckpointError
from omni_adapter.hub.files import read_json, short
from omni_adapter.hub.options import HUB_ERRORS, HubOptions, is_hub_id, unreachable

_MAX_RANK = 1 << 16
# Settings of PEFT that read other files, or begin with changes to the base.
_REFUSED = ("corda_config", "eva_config", "loftq_config", "megatron_config")


class Based(NamedTuple):
    """A base, and what it comes with."""

    base: Any  # Hub id, folder or loaded LM
    options: HubOptions  # for the base
    adapter: Carried | None
    ref: PartRef | None  # how to name the adapter


def split_base(base: Any, *, base_adapter: str | Path | None, options: HubOptions) -> Based:
    """Tell a base from the adapter that it comes with.

    Args:
        base: Hub id or folder of a causal LM or of an adapter, which names its base; or a loaded LM, which
            PEFT may have changed.
        base_adapter: Hub id or folder of an adapter to put onto the base.
        options: where to look for what ``base`` names.

    Raises:
        BackboneError: if an adapter cannot be carried, or names no base that can be loaded.
        CheckpointError: if its files are broken, or ``base_adapter`` is none.
    """
    elsewhere = replace(options, revision=None)
    if not isinstance(base, str | Path):
        lm, carried = take_adapter(base)
        if carried and base_adapter is not None:
            raise BackboneError(
                "the loaded base carries an adapter already; merge it first, or name no other"
            )
        if base_adapter is None:
            return Based(lm, options, carried, PartRef("") if carried else None)
        adapter, ref = load_adapter(base_adapter, options=elsewhere)
        return Based(lm, options, adapter, ref)
    if base_adapter is not None:
        adapter, ref = load_adapter(base_adapter, options=elsewhere)
        return Based(base, options, adapter, ref)
    if not _is_adapter(str(base), options):
        return Based(base, options, None, None)
    adapter, ref = load_adapter(base, options=options)
    named, revision = adapter.config.base_model_name_or_path, adapter.config.revision
    here = Path(base).is_dir()
    if not isinstance(named, str) or not (is_hub_id(named) or (here and Path(named).is_dir())):
        raise BackboneError(
            f"the adapter {base} names the base {short(named)}, which cannot be looked up; pass the base, "
            "and this as base_adapter="
        )
    return Based(named, replace(options, revision=revision), adapter, ref)


def load_adapter(name: str | Path, *, options: HubOptions) -> tuple[Carried, PartRef]:
    """Return an adapter of PEFT and how to name it.

    Args:
        name: Hub id or folder.
        options: where to look.

    Raises:
        BackboneError: if PEFT does not know its settings.
        CheckpointError: if it is missing or broken, or kept as a pickle.
    """
    options = options.pinned(str(name))
    if Path(name).is_dir():
        folder, ref = Path(name), PartRef(str(Path(name).resolve()))
    else:
        ref = PartRef(str(name), revision=options.revision)
        try:
            arguments: dict[str, Any] = options.arguments()
            folder = Path(snapshot_download(str(name), allow_patterns=list(ADAPTER_FILES), **arguments))
        except HUB_ERRORS as error:
            raise CheckpointError(unreachable(str(name), error)) from error
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{name} holds no {missing[0]}, so it is no adapter that PEFT saved as safetensors; pickles are "
            "never read"
        )
    _check(folder / ADAPTER_CONFIG)
    return read_carried(folder), ref


def _is_adapter(name: str, options: HubOptions) -> bool:
    """Whether a folder or repository holds an adapter."""
    if Path(name).is_dir():
        return (Path(name) / ADAPTER_CONFIG).is_file()
    if not is_hub_id(name):
        return False
    try:
        found = cached_file(
            name, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False, **options.arguments()
        )
    except HUB_ERRORS:  # whoever loads the base says better what is wrong
        return False
    return found is not None


def _check(path: Path) -> None:
    values = read_json(path)
    refused = [name for name in _REFUSED if values.get(name)]
    if refused:
        raise CheckpointError(
            f"{path} sets {', '.join(refused)}; convert it to a plain adapter with PEFT first"
        )
    if not isinstance(values.get("target_modules", []), list):
        raise CheckpointError(
            f"{path}: target_modules must be a list of names, got {short(values.get('target_modules'))}"
        )
    pattern = values.get("rank_pattern") or {}
    ranks = [values.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(isinstance(rank, int) and 0 <= rank <= _MAX_RANK for rank in ranks):
        raise CheckpointError(f"{path}: ranks must be at most {_MAX_RANK}, got {short(ranks)}")
