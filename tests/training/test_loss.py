"""The chunked loss equals the plain one in value and gradient, however batches are cut, packed or sharded."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from omni_adapter.config import parse
from omni_adapter.data.collator import Batch, collate
from omni_adapter.data.layout import TASKS, GridRules
from omni_adapter.data.packing import collate_packed
from omni_adapter.errors import BackboneError, ConfigError, PromptError
from omni_adapter.model import OmniModel
from omni_adapter.training.alignment import transcript_loss
from omni_adapter.training.loss import Losses, LossSettings, TrainingModel
from omni_adapter.training.stages import prepare_stage
from omni_adapter.vocab import IGNORE_INDEX
from tests.families import VOCAB_SIZE, build_fresh
from tests.training.talkers import FAMILIES, ROWS, build_model, make_batch, make_sample, make_samples

SMALL_CHUNKS = LossSettings(chunk_logits=3 * VOCAB_SIZE)  # three steps of text, six of codes
TEXT = ROWS  # row of the text, after the code rows


def rules_of(model: OmniModel) -> GridRules:
    return GridRules.of(model.config)


def plain_sums(model: OmniModel, batch: Batch) -> Tensor:
    """Summed cross-entropy of each row from the full logits of the model's own forward."""
    output = model(
        batch.grid,
        places=batch.places,
        clips=batch.clips,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    )
    rows = [*output.code_logits.unbind(1), output.text_logits]
    return torch.stack(
        [
            F.cross_entropy(
                logits[:, :-1].flatten(0, 1),
                batch.labels[:, row, 1:].flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            for row, logits in enumerate(rows)
        ]
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_equal_the_plain_loss(family):
    model = build_model(family)
    batch = make_batch(rules_of(model))
    plain = plain_sums(model, batch)
    losses = TrainingModel(model, SMALL_CHUNKS)(batch)
    torch.testing.assert_close(losses.sums, plain, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(losses.nll, plain.detach(), atol=1e-5, rtol=1e-6)
    counts = (batch.labels != IGNORE_INDEX).sum(dim=(0, 2))
    assert losses.counts.tolist() == counts.tolist()
    assert_same(gradients(model, losses.total()), gradients(model, plain.sum() / counts.sum()))


def test_how_each_family_s_text_is_learned():
    heads = {family: TrainingModel(build_model(family)) for family in FAMILIES}
    linear = {family for family, model in heads.items() if model._text_head}
    own = {family for family, model in heads.items() if model._projects}
    assert linear == {"llama", "qwen2", "mistral"}
    assert own == {"gemma2", "granite", "cohere"}


def test_logits_of_the_whole_forward_where_there_is_no_other_way():
    model = build_model("gemma2")
    batch = make_batch(rules_of(model))
    training = TrainingModel(model, SMALL_CHUNKS)
    expected = training(batch)
    wanted = gradients(model, expected.total())
    training._projects = False
    losses = training(batch)
    torch.testing.assert_close(losses.sums, expected.sums)
    assert_same(gradients(model, losses.total()), wanted)


def test_accuracy_counts_labels_with_the_largest_logit():
    model = build_model()
    batch = make_batch(rules_of(model))
    output = model(batch.grid, places=batch.places, clips=batch.clips)
    best = torch.cat((output.code_logits, output.text_logits[:, None, :, :64]), dim=1).argmax(-1)[:, :, :-1]
    best[:, TEXT] = output.text_logits.argmax(-1)[:, :-1]
    expected = (best == batch.labels[:, :, 1:]).sum(dim=(0, 2))
    losses = TrainingModel(model)(batch)
    assert losses.correct.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("normalisation", ["joint", "rows"])
def test_accumulated_micro_batches_equal_one_batch(family, normalisation):
    model = build_model(family)
    training = TrainingModel(model, LossSettings(normalisation=normalisation, text_weight=0.5))
    samples = make_samples(rules_of(model))
    whole = collate(samples, rules=rules_of(model), side="right")
    expected = gradients(model, training(whole).total())
    parts = [collate(samples[i:j], rules=rules_of(model), side="right") for i, j in ((0, 1), (1, 2), (2, 6))]
    counts = torch.stack([training.counts(part) for part in parts]).sum(dim=0)
    assert torch.equal(counts, training.counts(whole))
    for part in parts:
        training(part).total(counts).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected)


def losses_of(sums: list[float], counts: list[float], weights: list[float], normalisation: str) -> Losses:
    zeros = torch.zeros(len(sums))
    tensors = torch.tensor(sums), torch.tensor(counts), zeros, zeros, torch.tensor(weights)
    return Losses(*tensors, normalisation)


@pytest.mark.parametrize(
    ("normalisation", "weights", "expected"),
    [
        ("joint", [1, 1, 1], (6 + 8 + 20) / (2 + 4 + 10)),  # the paper: mean over all labels
        ("joint", [100, 1, 2], (600 + 8 + 40) / (200 + 4 + 20)),
        ("rows", [1, 1, 1], (3 + 2 + 2) / 3),  # SLAM-Omni: mean of the rows' means
        ("rows", [2, 0, 1], (2 * 3 + 2) / 3),
    ],
)
def test_total_weighs_rows(normalisation, weights, expected):
    assert losses_of([6, 8, 20], [2, 4, 10], weights, normalisation).total().item() == pytest.approx(expected)


@pytest.mark.parametrize("normalisation", ["joint", "rows"])
def test_rows_without_labels_add_nothing(normalisation):
    losses = losses_of([0, 0, 20], [0, 0, 10], [1, 1, 1], normalisation)
    assert losses.total().item() == pytest.approx(2 if normalisation == "joint" else 2 / 3)
    assert losses_of([0, 0, 0], [0, 0, 0], [1, 1, 1], normalisation).total().item() == 0


def test_total_takes_counts_and_scale_of_the_step():
    losses = losses_of([6, 8, 20], [2, 4, 10], [1, 1, 1], "joint")
    assert losses.total(torch.tensor([4, 8, 20]), scale=2).item() == pytest.approx(losses.total().item())


def test_weights_of_rows_reach_the_gradient():
    model = build_model()
    batch = make_batch(rules_of(model))
    plain = plain_sums(model, batch)
    weights = torch.tensor([100.0, 1.0, 0.5, 0.25])
    counts = (batch.labels != IGNORE_INDEX).sum(dim=(0, 2))
    expected = gradients(model, (weights * plain).sum() / (weights * counts).sum())
    settings = LossSettings(row_weights=(100, 1, 0.5), text_weight=0.25)
    assert_same(gradients(model, TrainingModel(model, settings)(batch).total()), expected, atol=1e-5)


def test_pads_weigh_what_was_set():
    model = build_model()
    rules = rules_of(model)
    batch = collate([make_sample("speech_to_speech", rules, frames=3)], rules=rules)
    without = TrainingModel(model)(batch)
    sums = {weight: TrainingModel(model, LossSettings(pad_weight=weight))(batch) for weight in (0.5, 1.0)}
    pads = torch.tensor([3.0, 3.0, 3.0, 0.0])  # rows lag by 1, 2 and 3 steps, and are silent for 2, 1 and 0
    torch.testing.assert_close(sums[1.0].counts - without.counts, pads)
    torch.testing.assert_close(sums[0.5].counts - without.counts, pads / 2)
    more, half = sums[1.0].sums - without.sums, sums[0.5].sums - without.sums
    torch.testing.assert_close(half, more / 2)
    assert (more[:ROWS] > 0).all()
    assert more[TEXT] == 0


class Watch(TorchDispatchMode):
    """Notes the sizes of all tensors that are made inside, views of ``known`` weights excepted."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in known.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("family", "lm_mode"), [("llama", "full"), ("llama", "lora"), ("gemma2", "lora")])
def test_logits_of_all_labels_never_exist(family, lm_mode):
    """Neither forward nor backward; and a frozen head has no gradient of its size."""
    vocabulary, labels, chunk = 3000, 24, 4
    lm = build_fresh(family, **FAMILIES[family] | {"vocab_size": vocabulary, "tie_word_embeddings": False})
    model = build_model(lm)
    prepare_stage(model, "finetune", lm_mode=lm_mode)
    rules = rules_of(model)
    samples = [make_sample("text_to_text", rules, text=range(10, 10 + labels - 1)) for _ in range(4)]
    batch = collate(samples, rules=rules, side="right")
    training = TrainingModel(model, LossSettings(chunk_logits=chunk * vocabulary))
    with Watch(model) as watch:
        training(batch).total().backward()
    width = model.backbone.width
    assert chunk * vocabulary <= watch.largest < 4 * labels * vocabulary / 2
    if lm_mode == "lora":
        assert watch.largest < vocabulary * width
        assert lm.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_weight_has_a_gradient_whatever_the_batch_holds(family, task):
    """Processes that train together must all send the same gradients, or they wait for ever."""
    model = build_model(family)
    prepare_stage(model, "finetune", lm_mode="full")
    losses = TrainingModel(model)(make_batch(rules_of(model), [task, task]))
    losses.total().backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    unheard = next(model.audio_adapter.parameters()).grad
    assert bool(unheard.any()) == TASKS[task].hears


def calls_of_modules(training: TrainingModel, batch: Batch) -> Counter[str]:
    """How often each module is called in a pass forward and back."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in training.named_modules()
    ]
    training(batch).total().backward()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_modules_are_called_equally_often_whatever_the_batch_holds(family):
    """Where weights are sharded, each call gathers some, and all processes must take part."""
    model = build_model(family)
    prepare_stage(model, "finetune")
    training = TrainingModel(model)
    batches = [["asr"] * 3, ["tts"], ["text_to_text"] * 2, ["speech_to_speech", "text_to_speech"]]
    first, *others = (calls_of_modules(training, make_batch(rules_of(model), tasks)) for tasks in batches)
    assert first["model.audio_adapter"] == first["model.code_heads.proj"] == 1
    assert all(other == first for other in others)


def test_text_stage_leaves_the_speaking_parts_out(monkeypatch):
    model = build_model()
    prepare_stage(model, "adapt")
    monkeypatch.setattr(model.tts_blocks, "forward", lambda *args, **kwargs: pytest.fail("TTS blocks ran"))
    losses = TrainingModel(model)(make_batch(rules_of(model), ["asr", "text_to_text"]))
    assert losses.sums[:ROWS].tolist() == [0] * ROWS


def test_reports_carry_no_gradient_and_need_none():
    model = build_model()
    batch = make_batch(rules_of(model))
    training = TrainingModel(model)
    losses = training(batch)
    assert [name for name, value in losses._asdict().items() if getattr(value, "requires_grad", False)] == [
        "sums"
    ]
    with torch.no_grad():
        again = training(batch)
    assert not again.sums.requires_grad
    torch.testing.assert_close(again.sums, losses.sums.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family):
    model = build_model(family)
    rules = rules_of(model)
    samples = make_samples(rules)
    training = TrainingModel(model)
    unpacked = training(collate(samples, rules=rules, side="right"))
    packed = training(collate_packed([samples[:2], samples[2:]], rules=rules))
    torch.testing.assert_close(packed.sums, unpacked.sums, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.counts, unpacked.counts)
    assert_same(gradients(model, packed.total()), gradients(model, unpacked.total()))


@pytest.mark.parametrize(
    ("family", "changes", "packing"),
    [
        ("llama", {"attn_implementation": "eager"}, "positions"),
        ("gemma2", {"sliding_window": 4}, "positions"),  # windows stay windows
        ("opt", {}, "mask"),
        ("gpt_oss", {"sliding_window": 128}, "mask"),
    ],
)
def test_packing_keeps_samples_apart_in_the_way_the_base_knows(family, changes, packing):
    model = build_model(build_fresh(family, **changes))
    assert model.backbone.packing == packing
    rules = rules_of(model)
    samples = make_samples(rules)
    with torch.no_grad():
        unpacked = TrainingModel(model)(collate(samples, rules=rules, side="right"))
        packed = TrainingModel(model)(collate_packed([samples], rules=rules))
    torch.testing.assert_close(packed.sums, unpacked.sums, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba2", {}, "cannot keep samples in one row apart"),
        ("gpt_oss", {"sliding_window": 8}, "no longer than its attention window of 8 steps"),
    ],
)
def test_packing_is_refused_where_samples_would_mix(family, changes, reason):
    model = build_model(build_fresh(family, **changes))
    packed = collate_packed([make_samples(rules_of(model))], rules=rules_of(model))
    with pytest.raises(BackboneError, match=reason):
        TrainingModel(model)(packed)


def test_padding_side_does_not_matter():
    model = build_model()
    rules = rules_of(model)
    right, left = (
        TrainingModel(model)(collate(make_samples(rules), rules=rules, side=side))
        for side in ("right", "left")
    )
    torch.testing.assert_close(right.sums, left.sums, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model, right.total()), gradients(model, left.total()))


HEARD = ["asr", "speech_to_text", "speech_to_speech"]


def heard_and_read(rules: GridRules) -> tuple[Batch, Batch]:
    """Answers after recordings, and the same answers after text."""
    samples = [make_sample(task, rules, text=(9, 8, 7, 10 + index)) for index, task in enumerate(HEARD)]
    teaching = [make_sample("text_to_text", rules, text=(9, 8, 7, 10 + index)) for index in range(len(HEARD))]
    return (collate(samples, rules=rules, side="right"), collate(teaching, rules=rules, side="right"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_distillation_equals_plain_divergence(family):
    model = build_model(family)
    prepare_stage(model, "adapt")
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    batch, teacher = heard_and_read(rules_of(model))
    temperature = 2.0
    output = model(batch.grid, places=batch.places, clips=batch.clips)
    with torch.no_grad(), model.backbone.lora_disabled():
        theirs = model.backbone.lm(inputs_embeds=model.backbone.embed(teacher.grid[:, -1]))["logits"]
    ours_at, theirs_at = (
        batch.labels[:, TEXT, 1:] != IGNORE_INDEX,
        teacher.labels[:, TEXT, 1:] != IGNORE_INDEX,
    )
    plain = F.kl_div(
        F.log_softmax(output.text_logits[:, :-1][ours_at] / temperature, dim=-1),
        F.softmax(theirs[:, :-1][theirs_at] / temperature, dim=-1),
        reduction="sum",
    )
    settings = LossSettings(
        distil=True, temperature=temperature, chunk_logits=4 * VOCAB_SIZE, row_weights=(0, 0, 0)
    )
    losses = TrainingModel(model, settings)(replace(batch, teacher=teacher))
    torch.testing.assert_close(losses.sums[TEXT], plain, atol=1e-5, rtol=1e-5)
    assert losses.nll[TEXT].item() == pytest.approx(plain_sums(model, batch)[TEXT].item(), rel=1e-5)
    assert_same(gradients(model, losses.total()), gradients(model, plain / ours_at.sum()))


def test_what_recordings_say_adds_to_the_loss_of_text():
    """The rest of the report, and the gradients of what does not hear, stay as they are."""
    model = build_model()
    prepare_stage(model, "align")
    samples = [
        sample._replace(transcript=(5 + index, 9) if sample.recordings else None)
        for index, sample in enumerate(make_samples(rules_of(model)))
    ]
    batch = collate(samples, rules=rules_of(model), side="right")
    heard = model.hear(batch.clips)
    said = transcript_loss(heard, batch.transcripts, model.backbone.embed, device=batch.grid.device)
    plain, with_words = (TrainingModel(model, LossSettings(ctc_weight=w))(batch) for w in (0.0, 0.5))
    assert said > 1
    expected = plain.sums + 0.5 * F.pad(said[None], (ROWS, 0))
    torch.testing.assert_close(with_words.sums, expected)
    torch.testing.assert_close(with_words.nll, plain.nll)
    torch.testing.assert_close(with_words.counts, plain.counts)
    before, after = (gradients(model, losses.total()) for losses in (plain, with_words))
    assert before.keys() == after.keys()
    for name in before:
        moved = not torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-6)
        assert moved == name.startswith("audio_adapter"), name


def test_an_adapter_that_does_not_learn_is_told_no_words():
    model = build_model()
    prepare_stage(model, "adapt", lm_mode="full")
    batch = make_batch(rules_of(model))
    batch = replace(batch, transcripts=((5, 6),) * len(batch.places))
    plain, with_words = (TrainingModel(model, LossSettings(ctc_weight=w))(batch) for w in (0.0, 0.5))
    torch.testing.assert_close(with_words.sums, plain.sums)


def test_base_has_nothing_to_learn_from_itself():
    """A text prompt is its own teacher: no divergence."""
    model = build_model()
    prepare_stage(model, "align")
    _, teacher = heard_and_read(rules_of(model))
    losses = TrainingModel(model, LossSettings(distil=True))(replace(teacher, teacher=teacher))
    assert losses.sums[TEXT].item() == pytest.approx(0, abs=1e-5)
    assert losses.nll[TEXT] > 1


def test_batches_without_lessons_learn_the_rest():
    """The base runs all the same, so that processes with other batches do not wait for it."""
    model = build_model()
    prepare_stage(model, "align")
    batch = make_batch(rules_of(model), ["tts"])
    training, calls = TrainingModel(model, LossSettings(distil=True)), []
    with model.backbone.lm.register_forward_hook(lambda *_: calls.append(1)):
        taught = training(batch)
    assert len(calls) == 2
    plain = TrainingModel(model)(batch)
    torch.testing.assert_close(taught.sums, plain.sums)
    assert taught.counts[TEXT] == 0


def test_teacher_must_hold_the_same_answers():
    model = build_model()
    prepare_stage(model, "align")
    batch, teacher = heard_and_read(rules_of(model))
    other = make_batch(rules_of(model), ["text_to_text"])
    with pytest.raises(
        PromptError, match="the same answers in the same order: expected 15 labels of text, got"
    ):
        TrainingModel(model, LossSettings(distil=True))(replace(batch, teacher=other))
    prepare_stage(model, "finetune", lm_mode="full")
    with pytest.raises(ConfigError, match="the base cannot teach while it learns itself"):
        TrainingModel(model, LossSettings(distil=True))(replace(batch, teacher=teacher))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_is_near(family):
    """Under autocast with float32 weights, and with bfloat16 weights throughout."""
    model = build_model(family)
    batch = make_batch(rules_of(model))
    training = TrainingModel(model, SMALL_CHUNKS)
    exact = training(batch)
    head = model.backbone.lm.get_output_embeddings().weight
    wanted = gradients(model, exact.total())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = training(batch)
    torch.testing.assert_close(losses.sums, exact.sums, rtol=2e-2, atol=0)
    found = gradients(model, losses.total())
    assert found["code_heads.proj.weight"].dtype == torch.float32
    model.bfloat16()
    halves = training(batch)
    assert halves.sums.dtype == torch.float32
    torch.testing.assert_close(halves.sums, exact.sums, rtol=5e-2, atol=0)
    for other in (found, gradients(model, halves.total())):
        for name in ("code_heads.proj.weight", "audio_adapter.down.weight"):
            cosine = F.cosine_similarity(other[name].float().flatten(), wanted[name].flatten(), dim=0)
            assert cosine > 0.98, name
    assert head.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"row_weights": (1, 1)}, "row_weights needs 3 entries, one per code row, got 2"),
        ({"row_weights": (0, 0, 0), "text_weight": 0}, "all zero, so nothing would be learned"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainingModel(build_model(), LossSettings(**settings))


def test_settings_are_read_from_plain_values():
    assert parse(LossSettings, {"normalisation": "rows"}, source="loss").normalisation == "rows"
    with pytest.raises(ConfigError, match="unknown key 'text_wieght'; did you mean 'text_weight'"):
        parse(LossSettings, {"text_wieght": 2}, source="loss")
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        parse(LossSettings, {"text_weight": -1}, source="loss")


def on_rank(rank: int, work: Callable[[int], dict[str, Tensor]], folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(work: Callable[[int], dict[str, Tensor]], folder) -> list[dict[str, Tensor]]:
    """Run ``work`` in two processes that know each other; return what each made."""
    torch.multiprocessing.start_processes(on_rank, args=(work, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_two_ranks_equal_one(family, tmp_path):
    """Although one hears, and the other speaks."""
    model = build_model(family)
    prepare_stage(model, "finetune", lm_mode="full")
    training = TrainingModel(model, SMALL_CHUNKS)
    samples = make_samples(
        rules_of(model), ["asr", "speech_to_text", "tts", "text_to_speech", "text_to_speech"]
    )
    expected = gradients(model, training(collate(samples, rules=rules_of(model), side="right")).total())

    def work(rank: int) -> dict[str, Tensor]:
        batch = collate(samples[:2] if rank == 0 else samples[2:], rules=rules_of(model), side="right")
        counts = training.counts(batch)
        dist.all_reduce(counts)
        wrapped = DistributedDataParallel(training)
        return gradients(model, wrapped(batch).total(counts, scale=2))

    for found in on_two_ranks(work, tmp_path):
        assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sharded_weights_are_whole_where_they_are_used(family, tmp_path):
    """Blocks, heads and all sharded: each is gathered when its own module is called."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = build_model(family)
    prepare_stage(model, "finetune", lm_mode="full")
    training = TrainingModel(model, SMALL_CHUNKS)
    batch = make_batch(rules_of(model))
    expected = gradients(model, training(batch).total())

    def work(rank: int) -> dict[str, Tensor]:
        lm = model.backbone.lm
        tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        parts = [*lm.model.layers, model.tts_blocks, model.code_heads.proj]
        for module in (*parts, *([] if tied else [lm.get_output_embeddings()])):
            fully_shard(module)
        fully_shard(training)
        training(batch).total().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {
            name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()
        }

    for found in on_two_ranks(work, tmp_path):
        assert_same(found, expected)


def test_first_loss_is_that_of_guessing():
    """Codes are as likely as each other before anything is learned."""
    model = build_model()
    torch.nn.init.zeros_(model.code_heads.proj.weight)
    losses = TrainingModel(model)(make_batch(rules_of(model)))
    assert losses.losses[:ROWS].tolist() == pytest.approx([math.log(model.config.vocabulary.size)] * ROWS)
