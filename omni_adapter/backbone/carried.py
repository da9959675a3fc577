"""An adapter of others that a base comes with: taken out of the LM, to be put back by our own rules.

An LM that PEFT changed in, the LM as it was and the adapter's settings and weights out; or a folder that PEFT
wrote. Says by name what cannot be carried. Knows nothing of our own LoRA, nor of where folders come from.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from omni_adapter.backbone.inspection import class_name
from omni_adapter.errors import BackboneError
from omni_adapter.tensor_files import read_safetensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, SAFETENSORS_WEIGHTS_NAME)

_MERGEABLE = ("LORA", "IA3", "LOHA", "LOKR", "OFT")
_PREFIX = "base_model.model."  # of names in PEFT's files
_WHOLE = ("modules_to_save", "trainable_token_indices")
# Starts that only set weights which are read from the file afterwards; others change the base as well.
_PLAIN_STARTS = (True, False, "gaussian")


class Carried(NamedTuple):
    """An adapter outside of any LM."""

    config: PeftConfig
    weights: dict[str, Tensor]  # on the CPU, under their names in PEFT's files

    @property
    def kind(self) -> str:
        """What PEFT calls its kind, such as ``LORA``."""
        kind: Any = self.config.peft_type
        return str(getattr(kind, "value", kind))

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells it from others: its kind, and a digest of its weights and their scale."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name].float().contiguous()
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            digest.update(weight.numpy().tobytes())
        settings = self.config.to_dict()
        scale = {key: settings.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
        scale |= {key: dict(settings.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
        return {"kind": self.kind, "sha256": digest.hexdigest(), **scale}

    def save(self, folder: Path, *, base: str | None = None, revision: str | None = None) -> None:
        """Write it as PEFT does.

        Args:
            folder: made if missing.
            base: Hub id of the base, if it has one.
            revision: commit of the base there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path, config.revision = base, revision
        config.save_pretrained(str(folder))


def read_carried(folder: Path) -> Carried:
    """Read an adapter that PEFT wrote.

    Raises:
        BackboneError: if PEFT does not know its settings.
        CheckpointError: if its weights are broken.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(f"{folder / ADAPTER_CONFIG} is no adapter that PEFT knows: {error}") from error
    config.auto_mapping = None  # names a module to import, which only AutoPeftModel would
    config.inference_mode = True
    return Carried(config, read_safetensors(folder / SAFETENSORS_WEIGHTS_NAME))


def take_adapter(model: Any) -> tuple[Any, Carried | None]:
    """Take the adapter that is in force out of a loaded LM.

    Args:
        model: an LM, or a ``PeftModel``; the LM inside is changed back to what it was before PEFT changed it.

    Returns:
        The LM, and the adapter, None if there is none. Anything that is no LM comes back as it is.

    Raises:
        BackboneError: if there is something that cannot be taken out; the text says what to do.
    """
    lm = model
    if isinstance(model, PeftModel):
        _check_kind(model.peft_config[model.active_adapters[0]])
        lm = model.get_base_model()
    if not isinstance(lm, PreTrainedModel):
        return model, None
    layers = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return lm, None
    names = {name for layer in layers for name in layer.active_adapters if not layer.disable_adapters}
    if len(names) != 1:
        raise BackboneError(
            f"{len(names)} adapters are in force in {class_name(lm)} ({', '.join(sorted(names)) or 'none'}), "
            "one can be carried; choose it with set_adapter, or pass what merge_and_unload() returns"
        )
    if any(layer.merged for layer in layers):
        raise BackboneError(
            f"the adapter is merged into {class_name(lm)} for now; call unmerge_adapter(), or pass the model "
            "that merge_and_unload() returns"
        )
    name = names.pop()
    config: Any = copy.deepcopy(lm.peft_config[name])
    _check_kind(config)
    config.inference_mode = True
    found = get_peft_model_state_dict(
        lm,
        state_dict=dict(lm.named_parameters(remove_duplicate=False)),
        adapter_name=name,
        save_embedding_layers=False,
    )
    weights = {
        key if key.startswith(_PREFIX) else _PREFIX + key: value.detach().cpu().clone()
        for key, value in found.items()
    }
    _unload(lm)
    return lm, Carried(config, weights)


def check_carried(carried: Carried, lm: PreTrainedModel, *, merge: bool, quantized: bool) -> None:
    """Refuse what cannot be carried in the way that was asked for.

    Raises:
        BackboneError: naming what stands against it, and what can be done.
    """
    config: Any = carried.config
    _check_kind(config)
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise BackboneError(
            f"an adapter that began with init_lora_weights={start!r} belongs to a changed base; convert it "
            "to plain LoRA with PEFT first"
        )
    if getattr(config, "layer_replication", None):
        raise BackboneError("the adapter repeats layers (layer_replication); pass the merged model as base")
    if merge:
        if quantized:
            raise BackboneError(
                f"{class_name(lm)} is quantised: merging an adapter would round it to the base's few bits; "
                "carry it beside the base (merge_base_adapter=False), or load the base unquantised"
            )
        return
    if carried.kind != "LORA":
        raise BackboneError(
            f"an adapter of kind {carried.kind} cannot be carried beside the base, where LoRA is to go; "
            "say merge_base_adapter=True"
        )
    whole = [key for key in _WHOLE if getattr(config, key, None)]
    if getattr(config, "bias", "none") != "none":
        whole.append("bias")
    if whole:
        raise BackboneError(
            f"the adapter replaces weights of the base itself ({', '.join(whole)}); "
            "say merge_base_adapter=True"
        )


def without_copies(carried: Carried, lm: PreTrainedModel) -> Carried:
    """Leave out the base's own tables, which PEFT saves beside an adapter that touches them.

    Raises:
        BackboneError: if they are not the base's, as after new tokens were added.
    """
    own = dict(lm.named_parameters(remove_duplicate=False))
    kept = {}
    for name, weight in carried.weights.items():
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if plain not in own or getattr(carried.config, "modules_to_save", None):
            kept[name] = weight
        elif weight.shape != own[plain].shape or not weight.to(own[plain]).equal(own[plain].detach()):
            raise BackboneError(
                f"the adapter brings a {plain} {list(weight.shape)} that is not that of {class_name(lm)}, "
                f"{list(own[plain].shape)}; merge the two with PEFT and pass the result as the base"
            )
    return carried._replace(weights=kept)


def check_unshared(lm: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse to merge into weights that several modules share, which would all change.

    Args:
        lm: with the adapter in it.
        names: modules that carry it.

    Raises:
        BackboneError: naming the modules.
    """
    own = {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in lm.named_modules()
    }
    weights = {name: list(module.parameters(recurse=False)) for name, module in own.items()}
    once = set(own.values())
    owners = Counter(id(weight) for module in once for weight in module.parameters(recurse=False))
    shared = [name for name in names if any(owners[id(weight)] > 1 for weight in weights.get(name, ()))]
    if shared:
        raise BackboneError(
            f"LoRA on {', '.join(sorted(set(shared)))} of {class_name(lm)} cannot be merged: other modules "
            "use the same weight; keep it beside the base"
        )


def _check_kind(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind not in _MERGEABLE:
        what = "puts steps before the prompt" if config.is_prompt_learning else "is not one that can be moved"
        raise BackboneError(
            f"an adapter of kind {kind} {what}; kinds that a base can carry are {', '.join(_MERGEABLE)}"
        )


def _unload(lm: PreTrainedModel) -> None:
    """Put the LM's own modules back in the place of PEFT's."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    found = {name: module for name, module in lm.named_modules() if isinstance(module, kinds)}
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        if any(name.startswith(f"{other}.") for other in found):
            continue
        own: Any
        if isinstance(module, BaseTunerLayer):
            own = module.get_base_layer()
        else:
            own = module.original_module
        setattr(lm.get_submodule(parent), child, own)
    if hasattr(lm, "peft_config"):
        del lm.peft_config
    if getattr(lm, "_hf_peft_config_loaded", False):
        lm._hf_peft_config_loaded = False
        vars(lm).pop("_weight_conversions", None)  # of the adapter's file; saving would apply them to the LM
    for parameter in lm.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
