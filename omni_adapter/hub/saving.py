"""Write a talker into an empty folder: config, added weights, LoRA, card, and parts that have no other home.

A model and its config in, files out, safetensors and JSON only. Knows nothing of what was in the folder
before, nor of how it is shared.
"""

import copy
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from omni_adapter.audio.codec import Codec
from omni_adapter.backbone import Carried
from omni_adapter.config import OmniConfig, PartRef, dump
from omni_adapter.errors import CheckpointError
from omni_adapter.hub.files import (
    BASE_ADAPTER,
    CONFIG_FILE,
    DATASETS_FILE,
    EVALUATION_FILE,
    LORA_FOLDER,
    PARTS,
    WEIGHTS_FILE,
)
from omni_adapter.hub.options import is_hub_id
from omni_adapter.model import OmniModel
from omni_adapter.model_card import CardFacts, hub_id, write_model_card
from omni_adapter.modules.audio_encoder import AudioEncoder


def parts_inside(config: OmniConfig, include: Collection[str]) -> tuple[str, ...]:
    """Return the parts to write beside the added weights.

    Those are the ones asked for, and those that came inside the talker's folder: they have no other home.

    Raises:
        CheckpointError: if a part is unknown, or one that is not written has no name to refer to.
    """
    adapter = config.base_adapter
    known = (*PARTS, BASE_ADAPTER) if adapter else PARTS
    unknown = set(include) - set(known)
    if isinstance(include, str) or unknown:
        raise CheckpointError(
            f"parts that can be saved are {', '.join(known)}, got "
            f"{include if isinstance(include, str) else ', '.join(sorted(unknown))}"
        )
    inside = [part for part in PARTS if part in include or getattr(config, part).id.startswith("./")]
    for part in PARTS:
        if part not in inside and not getattr(config, part).id:
            raise CheckpointError(
                f"the {part} came as a loaded model without a name, so it cannot be referred to; "
                f"pass include=({part!r},) to save it beside, or wrap it by its Hub id"
            )
    # An adapter is small: it is saved beside without being asked for where it has no name.
    wanted = BASE_ADAPTER in include or "base" in inside
    if adapter and (wanted or not adapter.id or adapter.id.startswith("./")):
        inside.append(BASE_ADAPTER)
    return tuple(inside)


def save_parts(
    folder: Path, names: Collection[str], *, config: OmniConfig, lm: PreTrainedModel, tokenizer: Any,
    encoder: AudioEncoder, codec: Codec, adapter: Carried | None = None,
) -> OmniConfig:  # fmt: skip
    """Write whole parts beside the added weights and return a config that refers to them."""
    if "base" in names:
        lm.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    if "encoder" in names:
        encoder.save_pretrained(folder / "encoder")
    if "codec" in names:
        codec.save_pretrained(folder / "codec")
    if BASE_ADAPTER in names:
        assert adapter is not None
        base = hub_id(config.base)
        adapter.save(folder / BASE_ADAPTER, base=base, revision=config.base.revision if base else None)
    moved: dict[str, Any] = {part: _moved(getattr(config, part), f"./{part}") for part in names}
    return replace(config, **moved)


def save_added(folder: Path, model: OmniModel, *, config: OmniConfig, with_lora: bool = True) -> None:
    """Write config, added weights and LoRA."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.added_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if with_lora and model.backbone.has_lora:
        base = hub_id(config.base)
        revision = config.base.revision if base else None
        model.backbone.save_lora(folder / LORA_FOLDER, base=base, revision=revision)
    _write_json(folder / CONFIG_FILE, dump(config))


def save_card(folder: Path, *, config: OmniConfig, facts: CardFacts) -> None:
    """Write the model card, and what it says beside the config as JSON and recordings.

    Raises:
        CheckpointError: if a sample is missing or no recording, or a figure is not finite.
    """
    for name, value in facts.evaluation.items():
        if not math.isfinite(value):
            raise CheckpointError(f"figures of a model card must be finite, {name!r} is {value}")
    for file, values in ((EVALUATION_FILE, facts.evaluation), (DATASETS_FILE, facts.datasets)):
        if values:
            _write_json(folder / file, values)
    write_model_card(folder, config=config, facts=facts)


def plain_lm(model: OmniModel, *, lora: bool, adapter: bool) -> PreTrainedModel:
    """Return the LM as plain transformers knows it; a copy if something must be taken out for that.

    Args:
        model: the talker's model.
        lora: merge our LoRA, and with it the adapter of others; else it is left out.
        adapter: merge that adapter in any case; else it is left out as well.

    Raises:
        BackboneError: if the base is quantised, so that nothing can be merged.
        CheckpointError: if its weights cannot be written.
    """
    if not (model.backbone.has_lora or model.backbone.stacks):
        _check_can_be_saved(model)
        return model.backbone.lm
    backbone = copy.deepcopy(model.backbone)
    if lora:
        backbone.merge_lora()
        return backbone.lm
    _check_can_be_saved(model)
    backbone.drop_lora()
    if adapter:
        backbone.merge_lora()
    else:
        backbone.drop_carried()
    return backbone.lm


def _check_can_be_saved(model: OmniModel) -> None:
    if not model.backbone.can_be_saved:
        raise CheckpointError(
            "the base's 4-bit weights lie as bitsandbytes needs them on this CPU, which it cannot undo; save "
            "the talker without the base, or load it on an accelerator or unquantised"
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _moved(ref: PartRef, place: str) -> PartRef:
    """The reference to a part that is saved inside the talker's folder; it remembers where it came from."""
    is_inside = ref.id.startswith("./")
    return replace(ref, id=place, origin=ref.origin if is_inside else (ref.id if is_hub_id(ref.id) else None))
