"""Every causal-LM family of transformers behind ``Backbone``, tiny and random.

A check is one function of a backbone; a new one is a new entry of ``CHECKS``. ``POPULAR`` families run
always, all of them with ``-m all_families``, which also prints which was wrapped and why others were refused.
"""

import copy
import gc
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.backbone import Backbone, caches
from omni_adapter.errors import BackboneError
from tests.families import ALL_FAMILIES, POPULAR, build_family, build_fresh

REFUSED = {
    "blt": "input_ids is required for entropy-based patching",
    "cpmant": "takes no inputs_embeds",
    "deepseek_v4": "does not run on inputs_embeds alone, it needs input_ids",
    "gemma3n_text": r"builds per-layer inputs from input_ids, in model.embed_tokens_per_layer",
    "gemma4": "takes no embeddings but those of its own ids",
    "gemma4_text": "takes no embeddings but those of its own ids",
    "gemma4_unified_assistant": "shared_kv_states cannot be None",
    "musicgen": "get_input_embeddings.. of MusicgenForCausalLM gives ModuleList",
    "musicgen_melody": "get_input_embeddings.. of MusicgenMelodyForCausalLM gives ModuleList",
    "prophetnet": "another result when more steps follow",
    "xlm": "is bidirectional",
    "xlnet": "is bidirectional",
}
"""Families that cannot be wrapped, and what the error must say."""

NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "its config demands that all layers share another model's cache",
}
"""Entries of the mapping whose tiny model cannot be built here, and why."""

INEXACT_PADDING = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "git", "marian", "mbart", "mvp", "pegasus",
    "plbart", "reformer", "rwkv", "trocr",
}  # fmt: skip
"""Families whose learned positions or states do not heed left padding."""

REPLAYED = {"openai-gpt", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv"}
"""Families that keep no state, keep it inside the model, or get cached batches wrong."""

POSITIONS_BY_COLUMN = {"roformer"}
"""Families that count positions by the columns of their cache, so that no row can join later."""

NO_FIXED_CACHE = REPLAYED | {
    "axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4", "inkling2_text",
    "inkling_text", "megatron-bert", "minimax", "reformer", "rembert", "roc_bert", "xlstm",
}  # fmt: skip
"""Families whose state is of a kind of its own, so that its memory cannot be fixed."""

INFERENCE_ONLY = {"reformer"}
"""Families through which no gradient flows in evaluation mode."""

POSITIONS_OF_GENERATE_DIFFER = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Families whose generate() counts positions from 0 where their forward counts from after the padding id."""

HEADS_WITH_A_TRANSFORM = {"electra", "modernbert-decoder"}
"""Families whose head is more than one linear layer, the last of which is not nested in it."""


def sample_ids(rows: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 100, (rows, steps), generator=generator)


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


def greedy(backbone: Backbone, ids: Tensor, count: int) -> list[int]:
    output = backbone(backbone.embed(ids), use_cache=True, logits_to_keep=1)
    chosen = [int(output.logits[0, -1].argmax())]
    while len(chosen) < count:
        last = torch.tensor([[chosen[-1]]])
        output = backbone(backbone.embed(last), cache=output.cache, use_cache=True, logits_to_keep=1)
        chosen.append(int(output.logits[0, -1].argmax()))
    return chosen


@torch.no_grad()
def check_embeddings_give_the_logits_of_ids(backbone: Backbone) -> None:
    ids = sample_ids(2, 7)
    expected = backbone.lm(input_ids=ids).logits
    assert torch.equal(backbone(backbone.embed(ids)).logits, expected)
    assert backbone.vocab_size == expected.shape[-1]


@torch.no_grad()
def check_hidden_is_what_enters_the_head(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(1, 7))
    seen: list[Tensor] = []
    head = backbone.lm.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        whole = backbone(embeddings)
    last = backbone(embeddings, logits_to_keep=1)
    assert last.logits.shape[1] == 1
    assert last.hidden.shape == (1, 7, backbone.hidden_width)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    assert torch.equal(last.hidden, whole.hidden)
    family = backbone.lm.config.model_type
    name = next(name for name, module in backbone.lm.named_modules() if module is head)
    # No transform comes before a head at the top of the model, but some LMs scale the hidden state.
    if "." not in name and family not in HEADS_WITH_A_TRANSFORM:
        kept = whole.hidden.abs() > 1e-2
        ratio = (seen[0] / whole.hidden)[kept]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def check_the_head_can_be_run_apart(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(2, 7))
    whole = backbone(embeddings, use_cache=True)
    apart = backbone(embeddings, use_cache=True, logits_to_keep=None)
    assert apart.logits.shape == (2, 0, backbone.vocab_size)
    assert torch.equal(apart.hidden, whole.hidden)
    step = backbone.embed(sample_ids(2, 1))
    after = backbone(step, cache=whole.cache)
    after_apart = backbone(step, cache=apart.cache, logits_to_keep=None)
    assert torch.equal(after_apart.hidden, after.hidden)
    if backbone.projects:
        assert_close(backbone.project(after_apart.hidden), after.logits)


@torch.no_grad()
def check_greedy_text_is_that_of_generate(backbone: Backbone) -> None:
    ids = sample_ids(1, 7)
    lm = backbone.lm
    if lm.config.model_type in POSITIONS_OF_GENERATE_DIFFER:
        return
    expected = lm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    banned = lm.generation_config.eos_token_id  # generate keeps it away for min_new_tokens
    chosen = greedy(backbone, ids, 12)
    if banned not in chosen:
        assert chosen[:-1] == expected[0, 7:-1].tolist()  # some families force the end onto the last


@torch.no_grad()
def check_cached_steps_equal_the_full_pass(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(2, 14))
    whole = backbone(embeddings)
    outputs = [backbone(embeddings[:, :5], use_cache=True)]
    for start, stop in ((5, 6), (6, 7), (7, 10), (10, 11), (11, 14)):
        outputs.append(backbone(embeddings[:, start:stop], cache=outputs[-1].cache, use_cache=True))
        assert outputs[-1].cache is not None
        assert outputs[-1].cache.steps == stop
    assert_close(torch.cat([output.logits for output in outputs], dim=1), whole.logits)
    assert_close(torch.cat([output.hidden for output in outputs], dim=1), whole.hidden)


@torch.no_grad()
def check_padded_rows_equal_single_ones(backbone: Backbone) -> None:
    if not backbone.padding_is_exact:
        return
    embeddings = backbone.embed(sample_ids(2, 12))
    padding, past = 4, 10
    embeddings[0, :padding] = 0
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :padding] = 0
    outputs = [backbone(embeddings[:, :past], attention_mask=mask[:, :past], use_cache=True)]
    for index in range(past, 12):
        step = embeddings[:, index : index + 1]
        outputs.append(
            backbone(step, attention_mask=mask[:, : index + 1], cache=outputs[-1].cache, use_cache=True)
        )
    hidden = torch.cat([output.hidden for output in outputs], dim=1)
    for row, start in ((0, padding), (1, 0)):
        assert_close(hidden[row : row + 1, start:], backbone(embeddings[row : row + 1, start:]).hidden)


@torch.no_grad()
def check_rows_of_a_cache_can_be_selected(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(3, 10))
    whole = backbone(embeddings)
    first = backbone(embeddings[:, :6], use_cache=True)
    assert first.cache is not None
    chosen = backbone.select_rows(first.cache, torch.tensor([2, 0, 0, 1]))
    assert chosen.rows == 4
    order = [2, 0, 0, 1]
    second = backbone(embeddings[order, 6:7], cache=chosen, use_cache=True)
    assert_close(second.hidden, whole.hidden[order, 6:7])
    fewer = backbone.select_rows(second.cache, torch.tensor([3]))
    assert_close(backbone(embeddings[[1], 7:8], cache=fewer).hidden, whole.hidden[[1], 7:8])
    # The source is as it was.
    assert_close(backbone(embeddings[:, 6:7], cache=first.cache).hidden, whole.hidden[:, 6:7])


@torch.no_grad()
def check_a_cache_of_fixed_size_gives_the_same_bits(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(2, 20))
    fixed = backbone.new_cache(2, 20)
    assert (fixed is None) == (backbone.lm.config.model_type in NO_FIXED_CACHE)
    bound = backbone.cache_nbytes(2, 20)
    if fixed is None:
        assert bound is None
        return
    own, start = None, 0
    for stop in (5, 6, 7, 8, 9, 10, 14, 15, 19, 20):  # past the windows, which are 8
        new = embeddings[:, start:stop]
        expected = backbone(new, cache=own, use_cache=True)
        got = backbone(new, cache=fixed, use_cache=True)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.hidden, expected.hidden)
        own, fixed, start = expected.cache, got.cache, stop
        assert fixed.nbytes <= bound
    assert fixed.nbytes == bound
    assert (fixed.capacity, fixed.steps) == (20, 20)


class Seats:
    """A batch with room for a few conversations, which come and go."""

    def __init__(self, backbone: Backbone, *, rows: int, capacity: int) -> None:
        self.backbone = backbone
        empty = backbone.new_cache(rows, capacity)
        assert empty is not None
        self.cache = caches.keep_rows(empty, [])
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.names: list[str] = []
        self.hidden: dict[str, list[Tensor]] = {}

    def admit(self, name: str, prompt: Tensor) -> None:
        steps = prompt.shape[1]
        read = self.backbone(prompt, cache=self.backbone.new_cache(1, steps), use_cache=True)
        self.cache = caches.join(self.cache, read.cache)
        columns = self.cache.steps
        old = F.pad(self.mask, (columns - self.mask.shape[1], 0))
        new = F.pad(self.mask.new_ones(1, steps), (columns - steps, 0))
        self.mask = torch.cat((old, new))
        self.names.append(name)
        self.hidden[name] = [read.hidden]

    def step(self, new: Tensor) -> None:
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.names), 1)), dim=1)
        positions = self.mask.sum(dim=1, keepdim=True) - 1
        output = self.backbone(
            new, attention_mask=self.mask, position_ids=positions, cache=self.cache, use_cache=True
        )
        self.cache = output.cache
        for name, hidden in zip(self.names, output.hidden, strict=True):
            self.hidden[name].append(hidden[None])

    def leave(self, name: str) -> None:
        kept = [index for index, other in enumerate(self.names) if other != name]
        self.names, self.mask = [self.names[index] for index in kept], self.mask[kept]
        self.cache = caches.keep_rows(self.cache, kept)
        empty = int((self.mask.sum(dim=0) == 0).long().cumprod(dim=0).sum())
        self.cache, self.mask = caches.trim(self.cache, empty), self.mask[:, empty:]
        assert self.cache.steps == self.mask.shape[1]


@torch.no_grad()
def check_conversations_that_come_and_go_equal_themselves_alone(backbone: Backbone) -> None:
    able = backbone.padding_is_exact and backbone.cache_nbytes(1, 1) is not None
    assert backbone.rows_can_join == (able and backbone.lm.config.model_type not in POSITIONS_BY_COLUMN)
    if not backbone.rows_can_join:
        return
    embeddings = dict(zip("abcd", backbone.embed(sample_ids(4, 30)).split(1), strict=True))
    seats, read = Seats(backbone, rows=3, capacity=24), {}

    def admit(name: str, steps: int) -> None:
        seats.admit(name, embeddings[name][:, :steps])
        read[name] = steps

    def advance(steps: int) -> None:
        for _ in range(steps):
            seats.step(torch.cat([embeddings[name][:, read[name] : read[name] + 1] for name in seats.names]))
            read.update({name: read[name] + 1 for name in seats.names})

    admit("a", 5)
    advance(3)
    admit("b", 12)
    advance(2)
    admit("c", 3)
    advance(3)
    seats.leave("a")
    advance(1)
    admit("d", 4)
    advance(2)
    seats.leave("b")
    advance(3)
    seats.leave("d")
    advance(1)
    assert seats.cache.steps == read["c"]  # no columns but its own
    assert seats.cache.nbytes <= backbone.cache_nbytes(3, 24)
    for name, steps in read.items():
        assert_close(torch.cat(seats.hidden[name], dim=1), backbone(embeddings[name][:, :steps]).hidden)


def check_gradient_reaches_the_embeddings(backbone: Backbone) -> None:
    embeddings = backbone.embed(sample_ids(1, 5)).detach().requires_grad_()
    if backbone.lm.config.model_type in INFERENCE_ONLY:
        return
    output = backbone(embeddings)
    (output.hidden.square().mean() + output.logits.square().mean()).backward()
    backbone.zero_grad(set_to_none=True)
    assert embeddings.grad is not None
    assert bool(torch.isfinite(embeddings.grad).all())
    assert bool((embeddings.grad.abs().amax(dim=-1) > 0).all())


CHECKS = (
    check_embeddings_give_the_logits_of_ids,
    check_hidden_is_what_enters_the_head,
    check_the_head_can_be_run_apart,
    check_greedy_text_is_that_of_generate,
    check_cached_steps_equal_the_full_pass,
    check_padded_rows_equal_single_ones,
    check_rows_of_a_cache_can_be_selected,
    check_a_cache_of_fixed_size_gives_the_same_bits,
    check_conversations_that_come_and_go_equal_themselves_alone,
    check_gradient_reaches_the_embeddings,
)
"""What every family that wraps must pass; none of them may change the model."""


def run_all_checks(family: str) -> None:
    backbone = Backbone(build_family(family))
    assert backbone.padding_is_exact == (family not in INEXACT_PADDING)
    assert backbone.replays == (family in REPLAYED)
    before = {name: value.clone() for name, value in backbone.lm.state_dict().items()}
    for check in CHECKS:
        check(backbone)
    after = backbone.lm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def check_lora(family: str) -> None:
    # Frozen first, as torch picks other kernels, and so other last bits, for weights that learn.
    lm = build_fresh(family).requires_grad_(False)
    twin = copy.deepcopy(lm)
    backbone = Backbone(lm)
    ids = sample_ids(2, 6)
    with torch.no_grad():
        base = backbone(backbone.embed(ids)).logits
    assert backbone.add_lora(rank=2)
    torch.manual_seed(1)
    learned = [value for name, value in backbone.lm.named_parameters() if "lora_" in name]
    for value in learned:
        nn.init.normal_(value, std=0.3)
    with torch.no_grad():
        changed = backbone(backbone.embed(ids)).logits
        with backbone.lora_disabled():
            assert torch.equal(backbone(backbone.embed(ids)).logits, base)
    assert not torch.equal(changed, base)
    backbone(backbone.embed(ids)).logits.square().mean().backward()
    assert all(value.grad is not None for name, value in backbone.lm.named_parameters() if "lora_" in name)
    weights = backbone.lora_state_dict()
    other = Backbone(twin)
    other.add_lora(rank=2)
    other.load_lora_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(other(other.embed(ids)).logits, changed)
        other.merge_lora()
        assert_close(other(other.embed(ids)).logits, changed)


def check_refused(family: str) -> str:
    with pytest.raises(BackboneError, match=REFUSED[family]) as caught:
        Backbone(build_family(family))
    return str(caught.value)


@pytest.mark.parametrize("family", POPULAR)
def test_popular_family(family):
    run_all_checks(family)


@pytest.mark.parametrize("family", POPULAR)
def test_popular_family_takes_lora(family):
    check_lora(family)


@pytest.mark.all_families
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in POPULAR])
def test_family(family):
    if family in NOT_BUILT:
        pytest.skip(NOT_BUILT[family])
    try:
        if family in REFUSED:
            check_refused(family)
        else:
            run_all_checks(family)
            if family not in INFERENCE_ONLY:
                check_lora(family)
    finally:
        build_family.cache_clear()
        gc.collect()


@pytest.mark.all_families
def test_every_family_is_wrapped_or_refused_with_a_reason(capsys):
    lines: list[str] = []
    unexpected: list[str] = []
    for family in ALL_FAMILIES:
        if family in NOT_BUILT:
            lines.append(f"{family:28} not built  {NOT_BUILT[family]}")
            continue
        try:
            Backbone(build_fresh(family))
            lines.append(f"{family:28} wrapped")
        except BackboneError as error:
            lines.append(f"{family:28} refused    {error}")
            unexpected += [] if re.search(REFUSED.get(family, "^$"), str(error)) else lines[-1:]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert not unexpected
    wrapped = sum(line.endswith("wrapped") for line in lines)
    assert wrapped == len(ALL_FAMILIES) - len(REFUSED) - len(NOT_BUILT)
