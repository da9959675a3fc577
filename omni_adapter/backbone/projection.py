"""Hidden states to logits, by the LM's own head.

States that enter the head in, [B, S, hidden width]; logits [B, S, V] out, with the LM's own scales, caps and
biases: the LM runs as it is, but its body answers with the given states. Knows nothing of what they are for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.backbone.inspection import find_head
from omni_adapter.backbone.probes import PROBE_STEPS, Tolerated, is_close, probe, sample
from omni_adapter.backbone.runner import Runner, Steps, watched_bodies

_LARGE_LOGIT = 1e3  # where caps show


class Body(NamedTuple):
    """The module whose last hidden state enters the head, and the class of its output."""

    module: nn.Module
    output_class: type[Any]


def project(runner: Runner, hidden: Tensor, *, body: Body) -> Tensor:
    """Return the logits of ``hidden``, [B, S, V].

    Args:
        runner: the LM.
        hidden: states as a pass returns them, [B, S, hidden width].
        body: the module in whose place ``hidden`` comes.
    """
    arguments = runner.accepted(use_cache=False, return_dict=True)
    with _answering(body.module, body.output_class(last_hidden_state=hidden)):
        logits: Tensor = runner.lm(inputs_embeds=hidden, **arguments)["logits"]
    return logits


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer ``answer`` to every call inside, hooks included."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@probe
def find_body(runner: Runner) -> Body:
    """Run a step and see which module's last hidden state enters the head."""
    with watched_bodies(runner.lm) as calls:
        runner.run(Steps(sample(runner, steps=1)))
    return Body(calls[-1].module, calls[-1].output_class)


@probe
def runs_alone(runner: Runner, body: nn.Module) -> bool:
    """Compare the hidden states of the LM with those of its body alone, in a pass and in cached steps."""
    embeddings = sample(runner)
    half = PROBE_STEPS // 2
    passes: list[list[Tensor]] = []
    with Tolerated():
        for logits_to_keep in (1, None):
            cache, found = None, []
            for part in (embeddings[:, :half], embeddings[:, half : half + 1]):
                output = runner.run(
                    Steps(part), cache, use_cache=True, logits_to_keep=logits_to_keep, alone=body
                )
                cache = output.cache
                found += [output.hidden, output.tapped]
            passes.append(found)
        return all(torch.equal(one, other) for one, other in zip(*passes, strict=True))
    return False


@probe
def gives_logits(runner: Runner, projected: Callable[[Tensor], Tensor]) -> bool:
    """Compare projected hidden states of a few tokens with the LM's logits."""
    with Tolerated():
        whole = runner.run(Steps(sample(runner)))
        return is_close(projected(whole.hidden), whole.logits, runner=runner)
    return False


@probe
def head_gives_logits(runner: Runner, projected: Callable[[Tensor], Tensor]) -> bool:
    """Compare the LM's logits with what its head's module gives, as states come and where they are large."""
    head: Any = find_head(runner.lm)
    with Tolerated():
        hidden = runner.run(Steps(sample(runner))).hidden
        scale = _LARGE_LOGIT / float(head(hidden).abs().max())
        return all(torch.equal(projected(states), head(states)) for states in (hidden, scale * hidden))
    return False


@probe
def head_is_linear(runner: Runner, projected: Callable[[Tensor], Tensor]) -> bool:
    """Compare the LM's logits with those of its head alone, as they come and where they are large."""
    head: Any = find_head(runner.lm)
    hidden = runner.run(Steps(sample(runner))).hidden
    scale = _LARGE_LOGIT / float(F.linear(hidden, head.weight).abs().max())
    return all(
        is_close(projected(states), F.linear(states, head.weight), runner=runner)
        for states in (hidden, scale * hidden)
    )
