"""LoRA on an LM: where it can go, on and off, to a folder and back.

An LM in; the same LM out, with trainable updates inside its linear layers. PEFT does the work. Knows nothing
of what is learned with them, or when.
"""

import copy
import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from omni_adapter.backbone.inspection import class_name, find_head, weight_of
from omni_adapter.backbone.probes import quiet, sample
from omni_adapter.backbone.runner import Runner, Steps
from omni_adapter.errors import BackboneError
from omni_adapter.tensor_files import read_safetensors

logger = logging.getLogger(__name__)

OWN = "default"
"""PEFT's name for what is added."""

CARRIED = "carried"
"""PEFT's name for the adapter that the base came with."""

_TASK = "CAUSAL_LM"
"""PEFT's name for what the base does, by which its ``AutoPeftModelForCausalLM`` knows what to load."""


class Lora:
    """LoRA inside an LM. No module of its own: its weights are the LM's.

    Args:
        lm: gets LoRA, in place.
        config: PEFT's settings.
        name: PEFT's name for it.
        beside: LoRA that the LM carries already, and which stays in force.

    Attributes:
        name: PEFT's name for it.
        targets: names of the modules that carry LoRA.
    """

    def __init__(
        self, lm: PreTrainedModel, config: PeftConfig, *, name: str = OWN, beside: "Lora | None" = None
    ) -> None:
        self._lm, self.name, self._beside = lm, name, beside
        if beside is None:
            self._peft = get_peft_model(lm, config, adapter_name=name)
            self.targets = tuple(sorted(self._peft.targeted_module_names))
            return
        self._peft = beside._peft
        self._peft.add_adapter(name, config)
        self._put_in_force(beside.name, name)
        layers = linear_layers(lm)
        self.targets = tuple(
            sorted(key for key, layer in layers.items() if name in getattr(layer, "lora_A", ()))
        )

    @property
    def config(self) -> LoraConfig:
        """PEFT's settings."""
        config = self._peft.peft_config[self.name]
        assert isinstance(config, LoraConfig)
        return config

    def freeze(self) -> None:
        """Let none of its weights learn."""
        for weight in self._parameters().values():
            weight.requires_grad_(False)

    def _put_in_force(self, *names: str) -> None:
        """Let the LM run with these, of which the one that was there before never learns."""
        tuner: Any = self._peft.base_model
        tuner.set_adapter(list(names))
        assert self._beside is not None
        self._beside.freeze()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base's own weights inside; what learns stays what learns."""
        flags = [(parameter, parameter.requires_grad) for parameter in self._lm.parameters()]
        try:
            if self._beside is None:
                with self._peft.disable_adapter():
                    yield
            else:
                self._put_in_force(self._beside.name)
                yield
        finally:
            if self._beside is not None:
                self._put_in_force(self._beside.name, self.name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def weights(self) -> dict[str, Tensor]:
        """The live weights, under their names in the LM without that of PEFT's adapter."""
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    def _parameters(self) -> dict[str, nn.Parameter]:
        infix = re.compile(rf"\.{re.escape(self.name)}(?=\.|$)")
        return {
            infix.sub("", name): parameter
            for name, parameter in self._lm.named_parameters()
            if "lora_" in name and infix.search(name)
        }

    def save(self, folder: Path, *, base: str | None, revision: str | None) -> None:
        """Write weights and settings as PEFT does, so that PEFT alone can put them onto the base as well.

        Args:
            folder: made if missing.
            base: Hub id of the base, if it has one; where it lies on this machine is not written.
            revision: commit of the base.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.cpu().contiguous() for name, weight in self._file_weights().items()}
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.copy(self.config)
        config.base_model_name_or_path, config.revision = base, revision
        config.task_type = _TASK
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))

    def read(self, folder: Path) -> None:
        """Load the weights that ``save`` or PEFT wrote.

        Raises:
            CheckpointError: if the file is broken or its tensors do not fit.
        """
        expected = {name: tuple(weight.shape) for name, weight in self._file_weights().items()}
        self.load(read_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, expected=expected))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights over, under their names in PEFT's files.

        Raises:
            BackboneError: if names or shapes differ.
        """
        # Into the live ones: PEFT's loader renames those of some mixtures of experts.
        copy_weights(weights, into=self._file_weights(), name=class_name(self._lm))

    def _file_weights(self) -> dict[str, Tensor]:
        """The live weights, under their names in PEFT's files."""
        # Not from state_dict(): some quantised layers turn their weights inside out for that.
        state = dict(self._peft.named_parameters(remove_duplicate=False))
        weights: dict[str, Tensor] = get_peft_model_state_dict(
            self._peft, state_dict=state, adapter_name=self.name, save_embedding_layers=False
        )
        return {name: weight.detach() for name, weight in weights.items()}

    def drop(self) -> None:
        """Take LoRA off again and leave the base's weights as they were. Nothing else may be called after."""
        if self._beside is None:
            self._peft.unload()
            return
        self._peft.delete_adapter(self.name)
        self._put_in_force(self._beside.name)

    def merge(self) -> None:
        """Add the updates, those beside it too, to the base's weights for good, and take all LoRA off."""
        self._peft.merge_and_unload()


def is_lora(name: str) -> bool:
    """Whether the parameter of an LM that is called ``name`` is LoRA of ours, not of an adapter of others."""
    return ".lora_" in name and not re.search(rf"\.{CARRIED}(\.|$)", name)


def copy_weights(weights: Mapping[str, Tensor], *, into: Mapping[str, Tensor], name: str) -> None:
    """Copy weights into the live ones of an LM that is called ``name``.

    Raises:
        BackboneError: if names or shapes differ.
    """
    wrong = [key for key in into if _shape(weights.get(key)) != _shape(into[key])]
    wrong += [key for key in weights if key not in into]
    if wrong:
        raise BackboneError(
            f"{len(wrong)} LoRA weights do not fit {name}, the first is {wrong[0]}: "
            f"expected {_shape(into.get(wrong[0]))}, got {_shape(weights.get(wrong[0]))}; "
            "add LoRA of the same rank to the same modules first"
        )
    with torch.no_grad():
        for key, weight in into.items():
            weight.copy_(weights[key])


def _shape(weight: Tensor | None) -> str:
    """Shape of a weight that may be missing, for messages."""
    return "none" if weight is None else str(list(weight.shape))


# --- settings ---


def make_config(
    modules: Mapping[str, nn.Module], *, rank: int, alpha: float | None, dropout: float, use_dora: bool
) -> LoraConfig:
    """PEFT's settings of LoRA on ``modules``, by name; the others as ``Backbone.add_lora`` has them."""
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(modules),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules.values()),
        use_dora=use_dora,
    )


def read_config(folder: Path) -> LoraConfig:
    """PEFT's settings as ``Lora.save`` or PEFT wrote them.

    Raises:
        BackboneError: if they are not those of LoRA.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise BackboneError(f"{folder} holds {config.peft_type}; LoRA was expected")
    config.task_type = None  # PEFT's class for the task would wrap methods of the LM that are not used here
    return config


# --- where it can go ---


def find_targets(runner: Runner, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Linear layers to put LoRA on, by name.

    Args:
        runner: the LM.
        targets: names of modules, or ``all-linear`` for every linear layer that the text path runs.

    Raises:
        BackboneError: if there is none.
    """
    modules = _trainable(runner) if targets == "all-linear" else _named(runner.lm, targets)
    modules = {name: _own_layer(module) for name, module in modules.items()}
    if not modules:
        raise BackboneError(
            f"no linear layer of {class_name(runner.lm)} fits LoRA targets {targets!r}; name some of its own"
        )
    return modules


def linear_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers of an LM by name, with LoRA or without; those that LoRA itself is made of are none."""
    modules = dict(lm.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in modules.items()
        if isinstance(_own_layer(module), (nn.Linear, Conv1D)) and not name.startswith(inside)
    }


def _own_layer(module: nn.Module) -> nn.Module:
    """The LM's own layer in a module that may carry LoRA."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _named(lm: PreTrainedModel, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Linear layers whose name is, or ends with, one of ``targets``."""
    suffixes = (targets,) if isinstance(targets, str) else tuple(targets)
    return {
        name: module
        for name, module in linear_layers(lm).items()
        if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    }


def _trainable(runner: Runner) -> dict[str, nn.Module]:
    """Linear layers that LoRA can train, by name.

    Those that the text path runs through their own forward, that a gradient reaches, and whose weight is
    theirs alone: merging would add to a shared one several times.
    """
    modules = dict(runner.lm.named_modules())
    linear = linear_layers(runner.lm)
    learning = _learning(runner, modules)
    owners = Counter(id(weight_of(module)) for module in linear.values())
    head = find_head(runner.lm)
    return {
        name: module
        for name, module in linear.items()
        if module is not head
        and owners[id(weight_of(module))] == 1
        and _is_used(name, modules, learning)
        and not _weight_is_read(name, modules)
    }


def _learning(runner: Runner, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the modules that a few tokens run through and whose output gets a gradient."""
    outputs: dict[str, Tensor] = {}

    def collect(module: nn.Module, inputs: Any, output: Any, *, name: str) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[name] = output

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(collect, name=name))
            stack.callback(handle.remove)
        stack.enter_context(quiet(runner))
        stack.enter_context(torch.enable_grad())
        logits = runner.run(Steps(sample(runner).detach().requires_grad_())).logits
        gradients = torch.autograd.grad(
            logits.float().square().mean(), list(outputs.values()), allow_unused=True
        )
    return {name for name, gradient in zip(outputs, gradients, strict=True) if gradient is not None}


def _is_used(name: str, modules: Mapping[str, nn.Module], learning: set[str]) -> bool:
    """Whether a module learns, or belongs to a list of which other members do (experts of a mixture)."""
    if name in learning:
        return True
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        member, parent = ".".join(parts[:length]), ".".join(parts[: length - 1])
        if isinstance(modules[parent], nn.ModuleList):
            siblings = {f"{parent}.{key}" for key, _ in modules[parent].named_children()}
            return member not in learning and bool(siblings & learning)
    return False


def _weight_is_read(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the parent's code reads the module's weight past its forward, as fused kernels do."""
    parent, _, attribute = name.rpartition(".")
    pattern = re.compile(rf"self\.{re.escape(attribute)}\.weight\b(?!\.(dtype|device|shape))")
    for kind in type(modules[parent]).__mro__:
        if kind in (nn.Module, PreTrainedModel):
            break
        try:
            if pattern.search(inspect.getsource(kind)):
                return True
        except (OSError, TypeError):
            logger.debug("no source of %s", kind.__name__)
    return False
