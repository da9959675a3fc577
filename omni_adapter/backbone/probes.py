"""What only running a few tokens tells of an LM.

A runner in; facts out, or the reason why the LM cannot be wrapped. ``learn_behaviour`` runs when an LM is
wrapped, the rest when first asked for. Every probe compares two ways to the same result and leaves the LM as
it was. Knows nothing of LoRA, packing or heads, which have probes of their own and take the tools from here.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omni_adapter.backbone import caches
from omni_adapter.backbone.fixed import CachePlan, plan_cache
from omni_adapter.backbone.inspection import class_name
from omni_adapter.backbone.runner import BackboneOutput, Runner, Steps
from omni_adapter.errors import BackboneError

logger = logging.getLogger(__name__)

PROBE_STEPS = 6

_TOLERANCE = 1e-4  # of the largest value, for float32 and wider
_TOLERANCE_HALF = 2e-2  # the same for the half-precision types
_CACHE_SLACK = 10.0  # how much further a cached step may be off: it adds up in another order

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Probe = Callable[Concatenate[Runner, _Arguments], _Result]


# --- tools ---


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; each module's mode as before afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def probe(function: _Probe[_Arguments, _Result]) -> _Probe[_Arguments, _Result]:
    """Let a function of a runner run quietly."""

    @wraps(function)
    def quietly(runner: Runner, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with quiet(runner):
            return function(runner, *args, **kwargs)

    return quietly


class Tolerated:
    """Takes an exception of the LM inside for a no: the block ends, and what comes after it is the answer."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow what other people's code may raise, but no interrupt."""
        if not isinstance(error, Exception):
            return False
        logger.debug("probe failed: %s", first_line(error))
        return True


def first_line(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def sample_ids(runner: Runner, steps: int = PROBE_STEPS) -> Tensor:
    """Ordinary ids, spread over the vocabulary, [1, steps]."""
    config = runner.lm.config.to_dict()
    special = {value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))}
    ordinary = [index for index in range(runner.embedding_table.shape[0]) if index not in special]
    stride = max(1, len(ordinary) // (steps + 1))
    ids = [ordinary[(index + 1) * stride % len(ordinary)] for index in range(steps)]
    return torch.tensor([ids], device=runner.device)


def sample(runner: Runner, steps: int = PROBE_STEPS) -> Tensor:
    """Embeddings of ordinary ids, [1, steps, D]."""
    return runner.embed(sample_ids(runner, steps))


def is_close(one: Tensor, other: Tensor, *, runner: Runner, slack: float = 1.0) -> bool:
    """Whether results differ by no more than rounding of the LM's type does, relative to the largest."""
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return False
    exact = runner.dtype in (torch.float32, torch.float64)  # the LM's, since some cast their logits up
    tolerance = slack * (_TOLERANCE if exact else _TOLERANCE_HALF)
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# --- when an LM is wrapped ---


@probe
def learn_behaviour(runner: Runner) -> None:
    """Refuse an LM that does not treat embeddings as a causal LM must, and note how it wants to be run.

    Raises:
        BackboneError: naming what the model lacks.
    """
    ids = sample_ids(runner)
    embeddings = runner.embed(ids)
    whole = _check_embeddings(runner, ids, embeddings)
    pair, pair_whole = _check_causal(runner, embeddings, whole)
    if "position_ids" in runner.accepts:
        offset = _find_position_offset(runner, embeddings, whole)
        if offset is None:
            runner.accepts -= {"position_ids"}
        else:
            runner.position_offset = offset
    _check_cache(runner, pair, pair_whole)


def _check_embeddings(runner: Runner, ids: Tensor, embeddings: Tensor) -> BackboneOutput:
    """Embeddings of ids must give the logits of the ids."""
    lm, name = runner.lm, class_name(runner.lm)
    try:
        with _lookups(lm) as by_ids:
            expected = lm(input_ids=ids, **runner.accepted(use_cache=False, return_dict=True))["logits"]
    except Exception as error:  # other people's code may raise anything
        raise BackboneError(f"{name} does not run on input_ids alone: {first_line(error)}") from error
    try:
        with _lookups(lm) as by_embeddings:
            whole = runner.run(Steps(embeddings))
    except BackboneError:
        raise
    except Exception as error:  # as above
        needs = sorted(by_ids - by_embeddings)
        reason = f"; it looks ids up in {', '.join(needs)}" if needs else ""
        raise BackboneError(
            f"{name} does not run on inputs_embeds alone, it needs input_ids: {first_line(error)}{reason}"
        ) from error
    if needs := sorted(by_ids - by_embeddings):
        raise BackboneError(f"{name} builds per-layer inputs from input_ids, in {', '.join(needs)}")
    if not is_close(whole.logits, expected, runner=runner):
        raise BackboneError(
            f"{name} gives other logits for embeddings than for the input_ids that they stand for"
        )
    return whole


@contextmanager
def _lookups(lm: PreTrainedModel) -> Iterator[set[str]]:
    """Collect the names of the embedding tables that are used inside, the input embedding excepted."""
    used: set[str] = set()
    tables = {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Embedding) and module is not lm.get_input_embeddings()
    }
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: used.add(name))
        for name, module in tables.items()
    ]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def _check_causal(runner: Runner, embeddings: Tensor, whole: BackboneOutput) -> tuple[Tensor, BackboneOutput]:
    """A step must not see the steps after it, and must take an embedding that stands for no id.

    Returns:
        Two rows of embeddings, [2, S, D], of which the first differs from ``embeddings`` in its last step,
        and what the LM makes of them.
    """
    name = class_name(runner.lm)
    foreign = embeddings[:, :2].mean(dim=1, keepdim=True)
    pair = torch.cat([torch.cat([embeddings[:, :-1], foreign], dim=1), embeddings.flip(1)])
    try:
        output = runner.run(Steps(pair))
    except Exception as error:  # other people's code may raise anything
        raise BackboneError(
            f"{name} takes no embeddings but those of its own ids: {first_line(error)}"
        ) from error
    if is_close(output.hidden[:1, :-1], whole.hidden[:, :-1], runner=runner):
        return pair, output
    if getattr(runner.lm.config, "is_decoder", True):
        raise BackboneError(f"{name} is bidirectional: steps see those after them; pass a causal LM")
    raise BackboneError(f"{name} is bidirectional: set is_decoder=True in its config")


def _find_position_offset(runner: Runner, embeddings: Tensor, whole: BackboneOutput) -> int | None:
    """Which position id means the first position to this LM; None if that cannot be told."""
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    padding_id: int | None = getattr(runner.lm.config.get_text_config(), "pad_token_id", None)
    for offset in (0, *([] if padding_id is None else [padding_id + 1])):
        with Tolerated():
            output = runner.run(Steps(embeddings, position_ids=positions + offset))
            if is_close(output.logits, whole.logits, runner=runner):
                return offset
    return None


def _check_cache(runner: Runner, embeddings: Tensor, whole: BackboneOutput) -> None:
    """A prefix must not depend on what follows it, and cached steps must come out as uncached ones do.

    An LM whose cache fails runs from the start again at each step.
    """
    prefix, last = Steps(embeddings[:, :-1]), Steps(embeddings[:, -1:])
    with Tolerated():
        first = runner.run(prefix, use_cache=True)
        second = runner.run(last, first.cache, use_cache=True)
        if is_close(second.logits, whole.logits[:, -1:], runner=runner, slack=_CACHE_SLACK):
            return
    name = class_name(runner.lm)
    if not is_close(runner.run(prefix).logits, whole.logits[:, :-1], runner=runner, slack=_CACHE_SLACK):
        raise BackboneError(f"{name} gives steps another result when more steps follow; pass a causal LM")
    runner.replays = True
    logger.warning(
        "%s has no cache that gives the logits of a full pass; each step will run all before it", name
    )


# --- when first asked for ---


@probe
def hidden_width(runner: Runner) -> int:
    """Width of the hidden states."""
    return int(runner.run(Steps(sample(runner, steps=1))).hidden.shape[-1])


@probe
def find_final_norm(runner: Runner) -> nn.Module:
    """Return the norm whose output is the last hidden state.

    Raises:
        BackboneError: if there is none.
    """
    made: list[tuple[nn.Module, Tensor, Tensor]] = []

    def collect(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            made.append((module, inputs[0], output))

    # A norm scales and shifts each number by itself: it has no matrix.
    plain = [part for part in runner.lm.modules() if all(weight.dim() < 2 for weight in part.parameters())]
    handles = [part.register_forward_hook(collect) for part in plain]
    try:
        hidden = runner.run(Steps(sample(runner))).hidden
    finally:
        for handle in handles:
            handle.remove()
    for module, before, after in reversed(made):
        same = before.numel() == after.numel() == hidden.numel()
        if same and torch.equal(after.flatten(), hidden.flatten()) and not torch.equal(before, after):
            return module
    raise BackboneError(
        f"{class_name(runner.lm)} has no norm that makes its last hidden state, so that nothing can read "
        'what comes before it; use tts.input="after_norm"'
    )


@probe
def padding_is_exact(runner: Runner) -> bool:
    """Compare a padded row with the same row alone, in a full pass and in a cached step."""
    row = sample(runner)
    padding = PROBE_STEPS // 2
    short = torch.cat([torch.zeros_like(row[:, :padding]), row[:, padding:]], dim=1)
    mask = torch.ones(2, PROBE_STEPS, dtype=torch.long, device=row.device)
    mask[0, :padding] = 0
    step = row[:, :1].repeat(2, 1, 1)
    with Tolerated():
        batch = runner.run(Steps(torch.cat([short, row]), mask), use_cache=True)
        after = runner.run(Steps(step, torch.cat([mask, mask[:, -1:]], dim=1)), batch.cache)
        same: list[bool] = []
        for index, start in enumerate((padding, 0)):
            own = slice(index, index + 1)
            alone = runner.run(Steps(row[:, start:]), use_cache=True)
            after_alone = runner.run(Steps(step[:1]), alone.cache)
            same.append(is_close(batch.hidden[own, start:], alone.hidden, runner=runner))
            same.append(is_close(after.hidden[own], after_alone.hidden, runner=runner, slack=_CACHE_SLACK))
        return all(same)
    return False


@probe
def chunks_are_exact(runner: Runner) -> bool:
    """Compare steps that follow a cache together with the same steps in a full pass."""
    embeddings = sample(runner)
    half = PROBE_STEPS // 2
    whole = runner.run(Steps(embeddings))
    with Tolerated():
        first = runner.run(Steps(embeddings[:, :half]), use_cache=True)
        second = runner.run(Steps(embeddings[:, half:]), first.cache, use_cache=True)
        return is_close(second.hidden, whole.hidden[:, half:], runner=runner, slack=_CACHE_SLACK)
    return False


@probe
def read_cache_plan(runner: Runner) -> CachePlan | None:
    """See what cache the LM makes; whether one of fixed memory is as good was found out before."""
    pair = sample(runner).repeat(2, 1, 1)
    cache = runner.run(Steps(pair), use_cache=True).cache
    return None if cache is None else plan_cache(cache.states, rows=2)


@probe
def find_cache_plan(runner: Runner) -> CachePlan | None:
    """See what cache the LM makes, make it with fixed memory, and compare what the LM computes with both."""
    pair = sample(runner).repeat(2, 1, 1)
    pair[1] = pair[1].flip(0)
    half = PROBE_STEPS // 2
    rest = [Steps(pair[:, index : index + 1]) for index in range(half, PROBE_STEPS)]
    with Tolerated():
        own = runner.run(Steps(pair[:, :half]), use_cache=True)
        plan = None if own.cache is None else plan_cache(own.cache.states, rows=2)
        if plan is None:
            return None
        fixed = runner.run(
            Steps(pair[:, :half]), caches.make(plan, rows=2, capacity=PROBE_STEPS), use_cache=True
        )
        for step in rest:
            if not _is_same(own, fixed, runner):
                return None
            own = runner.run(step, own.cache, use_cache=True)
            fixed = runner.run(step, fixed.cache, use_cache=True)
        return plan if _is_same(own, fixed, runner) else None
    return None


@probe
def joins_are_exact(runner: Runner, plan: CachePlan) -> bool:
    """Let a row join a longer one, which then leaves, and compare its steps with those of the same row alone.

    An LM that counts positions by the columns of its cache, whatever ``position_ids`` say, fails.
    """
    row = sample(runner)
    late = PROBE_STEPS // 2
    new = [row[:, index : index + 1] for index in range(late, late + 2)]

    def read(steps: Tensor) -> BackboneOutput:
        cache = caches.make(plan, rows=2, capacity=PROBE_STEPS + 2)
        return runner.run(Steps(steps), cache, use_cache=True)

    mask = torch.ones(2, PROBE_STEPS + 1, dtype=torch.long, device=row.device)
    mask[1, : PROBE_STEPS - late] = 0
    with Tolerated():
        alone, longer, joined = read(row[:, :late]), read(row.flip(1)), read(row[:, :late])
        assert alone.cache is not None
        assert longer.cache is not None
        assert joined.cache is not None
        positions = torch.tensor([[PROBE_STEPS], [late]], device=row.device)
        both = caches.join(longer.cache, joined.cache)
        first = runner.run(Steps(new[0].repeat(2, 1, 1), mask, positions), both, use_cache=True)
        assert first.cache is not None
        left = caches.trim(
            caches.keep_rows(caches.select_rows(first.cache, positions.new_tensor([1])), [0]),
            PROBE_STEPS - late,
        )
        own = torch.ones_like(mask[1:, : late + 2])
        second = runner.run(Steps(new[1], own, positions[1:] + 1), left)
        expected = runner.run(Steps(new[0]), alone.cache, use_cache=True)
        after = runner.run(Steps(new[1]), expected.cache)
        return is_close(first.hidden[1:], expected.hidden, runner=runner, slack=_CACHE_SLACK) and is_close(
            second.hidden, after.hidden, runner=runner, slack=_CACHE_SLACK
        )
    return False


def _is_same(own: BackboneOutput, fixed: BackboneOutput, runner: Runner) -> bool:
    """Whether two passes gave the same, but for the rounding that another place in memory may bring."""
    return is_close(fixed.hidden, own.hidden, runner=runner) and is_close(
        fixed.logits, own.logits, runner=runner
    )
