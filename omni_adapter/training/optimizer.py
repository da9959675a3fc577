"""How weights move: groups of parameters and settings in, AdamW and its rate at each step out.

Knows nothing of models, data or processes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from omni_adapter.errors import TrainingError
from omni_adapter.training.settings import OptimSettings


def rate_share(step: int, settings: OptimSettings) -> float:
    """Return the share of the highest rate at which the step after ``step`` steps is taken.

    It rises evenly to 1 over the warm-up and falls along half a cosine to ``final_share`` at the last step.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    rest = max(1, settings.num_steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / rest)
    return settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(
    groups: Mapping[str, Mapping[str, Tensor]], settings: OptimSettings, *, rates: Mapping[str, float]
) -> torch.optim.AdamW:
    """Return AdamW over all that learns.

    Args:
        groups: parameters of each weight group that learns.
        settings: rates, decay and averages.
        rates: highest rate of single groups; those of ``settings.group_rates`` come before them.

    Raises:
        TrainingError: if nothing learns.
    """
    by_kind: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameters in groups.items():
        rate = settings.group_rates.get(name, rates.get(name, settings.learning_rate))
        for parameter in parameters.values():
            # Norms and biases have one dimension; to pull them to zero helps nobody.
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            by_kind.setdefault((rate, decay), []).append(parameter)
    if not by_kind:
        raise TrainingError("nothing learns: the stage leaves every weight as it is")
    options = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in by_kind.items()
    ]
    try:
        return torch.optim.AdamW(options, betas=settings.betas, eps=settings.eps, fused=True)
    except RuntimeError:  # a device or type without a fused kernel
        return torch.optim.AdamW(options, betas=settings.betas, eps=settings.eps)
