"""What can be read off an LM without running it.

An LM in; names, modules and numbers out, or the reason why it cannot be wrapped. Goes by signatures, classes
and configs. Knows nothing of what an LM computes: that is for ``probes``.
"""

import inspect
import json
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from omni_adapter.errors import BackboneError

_NOT_PASSED = frozenset({"args", "kwargs", "input_ids", "labels"})
"""Argument names of a forward that a backbone has no use for."""

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Config keys that transformers uses for the number of positions."""

_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
    "quantization_config",
)
"""Config keys that say how a model was loaded, not what it is."""


def inspect_base(lm: PreTrainedModel) -> frozenset[str]:
    """Check from the outside that ``lm`` can be wrapped.

    Returns:
        The argument names that its forward takes, those that it passes on to its body included.

    Raises:
        BackboneError: if it cannot; the text names what it lacks.
    """
    name = class_name(lm)
    if not isinstance(lm, PreTrainedModel):
        raise BackboneError(f"expected a causal LM of transformers (PreTrainedModel), got {name}")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name} is an encoder-decoder; pass a causal LM")
    accepts = _accepted(lm)
    if "inputs_embeds" not in inspect.signature(lm.forward).parameters:
        raise BackboneError(
            f"forward() of {name} takes no inputs_embeds; pass a causal LM that can be fed embeddings"
        )
    try:
        table = lm.get_input_embeddings()
    except NotImplementedError:
        table = None
    if table is None or isinstance(table, (nn.ModuleList, nn.ModuleDict)):
        raise BackboneError(
            f"get_input_embeddings() of {name} gives {class_name(table)}; pass a causal LM with one table"
        )
    return accepts


def _accepted(lm: PreTrainedModel) -> frozenset[str]:
    """Argument names of the LM's forward, and of its body's where the LM passes further ones on."""
    parameters = inspect.signature(lm.forward).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for body in find_bodies(lm):
            names |= set(inspect.signature(body.forward).parameters)
    return frozenset(names - _NOT_PASSED)


def find_bodies(lm: PreTrainedModel) -> list[nn.Module]:
    """Modules that may compute the last hidden state that enters the head."""
    head = find_head(lm)
    inside = {lm, *(() if head is None else head.modules())}
    decoder: nn.Module = lm.get_decoder()  # type: ignore[no-untyped-call]
    candidates = (lm.base_model, decoder, *lm.children())
    return [body for body in dict.fromkeys(candidates) if body not in inside]


def find_head(lm: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits, if the LM tells."""
    head: nn.Module | None = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def weight_of(module: nn.Module) -> Tensor:
    """Weight of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def vocab_size(lm: PreTrainedModel) -> int:
    """Entries V of the text logits."""
    head = find_head(lm)
    return int(lm.config.get_text_config().vocab_size if head is None else weight_of(head).shape[0])


def max_positions(lm: PreTrainedModel) -> int | None:
    """Positions that the config speaks of, None if of none."""
    config = lm.config.get_text_config()
    limits = (getattr(config, name, None) for name in _LIMITS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def is_quantized(lm: PreTrainedModel) -> bool:
    """Whether weights of the LM are stored in less than 16 bits, so that they cannot learn."""
    if getattr(lm, "hf_quantizer", None) is not None:
        return True
    return any(not parameter.is_floating_point() for parameter in lm.parameters())


def is_rearranged(lm: PreTrainedModel) -> bool:
    """Whether weights in 4 bits lie as this processor likes them, from where they do not come back unharmed.

    bitsandbytes 0.50 does so when a model first runs on some CPUs; its ``state_dict`` then breaks them.
    """
    states = (getattr(parameter, "quant_state", None) for parameter in lm.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def fingerprint(lm: PreTrainedModel) -> dict[str, Any]:
    """The facts of the LM's config by which it is recognised, as plain JSON."""
    config: dict[str, Any] = _lasting(json.loads(lm.config.to_json_string(use_diff=True)))
    return config


def _lasting(value: Any) -> Any:
    """A config's values without those that say how a model was loaded, in nested configs too."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def class_name(value: object) -> str:
    """Name of a model's class, for messages."""
    return type(value).__name__
