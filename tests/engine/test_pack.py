"""A packed talker beside the plain one: same answers in float32, bounded ones in bfloat16 and 8 bits."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from examples.untrained_talker import make_parts
from omni_adapter import OmniAdapter
from omni_adapter.data.layout import TASKS
from omni_adapter.engine import PackedLinear, PackSettings, choose_precision, pack, relative_error
from omni_adapter.engine.pack import parts_of
from omni_adapter.engine.rehearsal import Part, cast
from omni_adapter.errors import CheckpointError, ConfigError, TrainingError
from omni_adapter.training.stages import prepare_stage
from tests.talkers import fresh_talker

SHORT = {"max_new_tokens": 14}
PLAIN = PackSettings(kernels=("plain-fp32",), fuse=False)
BOUNDS = {"fp32": 1e-5, "bf16": 5e-2, "int8": 0.15}
"""How far logits of the tiny random talker may move, as a share of their norm."""

ASKED = [{"role": "user", "content": "How are you today?"}]


@pytest.fixture(scope="module")
def hum():
    return np.sin(np.arange(16_000) * 0.2).astype(np.float32) * 0.3, 16_000


@torch.no_grad()
def outputs(talker) -> dict[str, torch.Tensor]:
    """What comes out of each part of a talker."""
    return {part.name: torch.cat([out.flatten() for out in part.run()]) for part in parts_of(talker.model)}


def steps_of(talker, hum, task: str) -> list[tuple[list[int], list[int], int]]:
    """Text ids, sound and its length of a short reply, chunk by chunk."""
    hears, words = TASKS[task].hears, "Say it."
    parts = [{"type": "audio", "audio": hum}] if hears else []
    messages = [{"role": "user", "content": parts or words}]
    chunks = talker.stream_many([messages], task=task, stride=2, **SHORT)
    return [(chunk.text, chunk.audio.tolist(), len(chunk.audio)) for _, chunk in chunks]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_plain_kernels_give_the_same_bits_in_every_task(talker, hum, task):
    packed = copy.deepcopy(talker).pack("fp32", settings=PLAIN)
    assert packed.precision == "fp32"
    assert steps_of(packed, hum, task) == steps_of(talker, hum, task)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("kernel", ["mixed-fp32", "packed-fp32"])
def test_float32_kernels_give_the_same_tokens_in_every_task(talker, hum, task, kernel):
    packed = copy.deepcopy(talker).pack("fp32", settings=PackSettings(kernels=(kernel,), fuse=True))
    ours, plain = steps_of(packed, hum, task), steps_of(talker, hum, task)
    assert [text for text, *_ in ours] == [text for text, *_ in plain]
    for (_, mine, length), (_, theirs, expected) in zip(ours, plain, strict=True):
        assert length == expected
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_narrow_kernels_give_replies_of_the_same_form(talker, hum, task, precision):
    packed = copy.deepcopy(talker).pack(precision)
    ours, plain = steps_of(packed, hum, task), steps_of(talker, hum, task)
    assert bool(ours) == bool(plain)
    assert any(length for *_, length in ours) == any(length for *_, length in plain)
    assert all(np.isfinite(sound).all() for _, sound, _ in ours)


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_errors_are_bounded_and_reported(precision):
    talker = fresh_talker()
    before = outputs(talker)
    report = talker.pack(precision).pack_report
    after = outputs(talker)
    for name, expected in before.items():
        assert relative_error(after[name], expected) <= BOUNDS[precision], name
    assert set(report.errors) == {"text", "codes", "hearing"}
    assert max(report.errors.values()) <= BOUNDS[precision]
    assert report.errors["text"] == pytest.approx(
        relative_error(after["backbone.lm"], before["backbone.lm"]), rel=1.0, abs=1e-6
    )
    if precision != "fp32":
        assert report.errors["codes"] > 0
        assert report.bytes_after < 0.75 * report.bytes_before


def test_everything_between_the_products_stays_as_it_was():
    talker = fresh_talker()
    before = {name: value.clone() for name, value in talker.model.state_dict().items()}
    talker.pack("int8")
    after = talker.model.state_dict()
    table = "backbone.lm.model.embed_tokens.weight"
    assert after[table].dtype == torch.bfloat16
    for name in after:
        if name != table:
            assert torch.equal(after[name], before[name]), name
    gone = {name for name in before if name not in after}
    assert all(before[name].dim() == 2 or name.endswith("bias") for name in gone)
    assert any("code_heads" in name for name in gone)
    assert any("tts_blocks" in name for name in gone)
    assert any("audio_adapter" in name for name in gone)
    assert any("audio_encoder" in name for name in gone)
    assert "backbone.lm.lm_head.weight" in gone


def test_siblings_are_found_without_names():
    report = fresh_talker().pack("int8").pack_report
    groups = {tuple(name.rpartition(".")[2] for name in layer.names) for layer in report.layers}
    assert {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value")} <= groups
    assert not report.kept


def test_a_base_in_half_precision_runs_in_float32_between_products():
    parts = make_parts()
    plain = fresh_talker()
    lm = parts.lm.bfloat16()
    talker = OmniAdapter.wrap(
        lm,
        tokenizer=parts.tokenizer,
        encoder=parts.whisper,
        codec=plain.codec,
        tts_layers=1,
        precision="bf16",
    )
    assert talker.pack_report.activations == "float32"
    assert talker.model.backbone.dtype == torch.float32
    norms = [value for name, value in lm.named_parameters() if "norm" in name]
    assert norms
    assert all(value.dtype == torch.float32 for value in norms)
    assert talker.chat(messages=ASKED, **SHORT).text == plain.chat(messages=ASKED, **SHORT).text
    cache = talker.model.backbone.new_cache(1, 64)
    assert cache is not None
    assert cache.capacity == 64


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_tied_heads_are_packed_and_the_table_is_kept(precision):
    parts = make_parts()
    config = copy.deepcopy(parts.lm.config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    lm = type(parts.lm)(config).eval()
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    codec = fresh_talker().codec
    talker = OmniAdapter.wrap(lm, tokenizer=parts.tokenizer, encoder=parts.whisper, codec=codec, tts_layers=1)
    before, table = outputs(talker), lm.model.embed_tokens.weight.detach().clone()
    talker.pack(precision, settings=PackSettings(kernels=("packed-fp32",)) if precision == "fp32" else None)
    assert isinstance(lm.lm_head, PackedLinear)
    kept = lm.model.embed_tokens.weight
    torch.testing.assert_close(kept.float(), table, rtol=8e-3, atol=0)
    assert relative_error(outputs(talker)["backbone.lm"], before["backbone.lm"]) <= BOUNDS[precision]


def with_lora(talker: OmniAdapter) -> OmniAdapter:
    talker.model.backbone.add_lora(rank=4)
    torch.manual_seed(1)
    for name, weight in talker.model.backbone.lm.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1)
    return talker


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_lora_becomes_part_of_the_packed_base(precision):
    without, talker = outputs(fresh_talker()), with_lora(fresh_talker())
    before = outputs(talker)
    assert relative_error(before["backbone.lm"], without["backbone.lm"]) > 2 * BOUNDS["int8"]
    talker.pack(precision)
    assert not talker.model.backbone.has_lora
    assert relative_error(outputs(talker)["backbone.lm"], before["backbone.lm"]) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("shared", [False, True])
def test_an_adapter_of_others_is_in_force(precision, shared):
    """Beside weights that several modules share it cannot be folded: the base below it is packed."""
    parts, plain = make_parts(), fresh_talker()
    lm = parts.lm
    if shared:
        layers = lm.model.layers
        layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    theirs = get_peft_model(
        lm, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
    )
    torch.manual_seed(1)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.1)
    talker = OmniAdapter.wrap(
        theirs, tokenizer=parts.tokenizer, encoder=parts.whisper, codec=plain.codec, tts_layers=1
    )
    before = outputs(talker)
    report = talker.pack(precision).pack_report
    assert talker.model.backbone.stacks == shared
    assert relative_error(outputs(talker)["backbone.lm"], before["backbone.lm"]) <= BOUNDS[precision]
    packed = {name for layer in report.layers for name in layer.names}
    assert any(name.endswith("down_proj.base_layer") for name in packed) == shared


class Peculiar(nn.Module):
    """Reads one weight itself, calls one layer never, and views a product as one row of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.read, self.idle = (nn.Linear(32, 32) for _ in range(4))
        self.router = nn.Linear(32, 4)

    def forward(self, x):
        x = self.left(x).view(-1) + self.right(x).view(-1)
        x = x.view(-1, 32)
        return x @ self.read.weight + self.read(x) + self.router(x).sum()


@torch.no_grad()
def test_what_others_cannot_stand_in_for_stays():
    model, x = Peculiar(), torch.randn(3, 32)
    casting = cast(Part("peculiar", model, lambda: (model(x),), rows=3))
    assert sorted(casting.groups) == [("left",), ("right",)], "a slice cannot be viewed as one row"
    assert casting.kept == {
        "idle": "its parent does not call it",
        "read": "its parent reads the weight itself",
        "router": "too small to pay",
    }
    assert type(model.left) is nn.Linear, "a rehearsal leaves the model as it was"


def test_a_packed_talker_refuses_to_learn_and_to_be_saved(tmp_path):
    talker = fresh_talker().pack("int8")
    with pytest.raises(
        TrainingError, match="packed for int8 cannot learn; load the talker without precision"
    ):
        prepare_stage(talker.model, "align") if False else talker.model.train()
    for write in (
        lambda: talker.save_pretrained(tmp_path / "saved"),
        lambda: talker.export(tmp_path / "exported"),
        lambda: talker.push_to_hub("somebody/talker"),
    ):
        with pytest.raises(CheckpointError, match=r"packed for this machine .int8. and cannot be written"):
            write()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="packed already"):
        talker.pack("bf16")
    with pytest.raises(ConfigError, match=r"packed for cpu .int8. and stay there"):
        talker.to("meta")
    assert talker.chat(messages=ASKED, **SHORT).text, "and it still runs"


def test_precision_of_a_saved_talker(talker_folder, talker):
    assert talker.precision is None
    assert talker.pack_report is None
    plain = talker.chat(messages=ASKED, **SHORT)
    loaded = OmniAdapter.from_pretrained(talker_folder, precision="fp32")
    assert loaded.precision == "fp32"
    assert loaded.chat(messages=ASKED, **SHORT).text == plain.text
    with pytest.raises(ConfigError, match="precision must be one of fp32, bf16, int8, auto, got 'int3'"):
        OmniAdapter.from_pretrained(talker_folder, precision="int3")


def test_nothing_is_changed_without_precision(talker_folder):
    model = OmniAdapter.from_pretrained(talker_folder).model
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_packing_says_what_it_did_and_warns_of_nothing(caplog, talker_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        talker = fresh_talker()
        with caplog.at_level("INFO", logger="omni_adapter.engine"):
            talker.pack("auto")
        talker.chat(messages=ASKED, **SHORT)
    assert any("precision" in message and "auto: " in message for message in caplog.messages)
    line = str(talker.pack_report)
    assert talker.pack_report.reason in line
    assert "MB" in line
    json.dumps(dict(talker.pack_report.errors))


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"amx_bf16": True, "amx_int8": True}, "bf16"),
        ({"avx512_vnni": True, "avx512_bf16": False}, "int8"),
        ({"avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_goes_by_the_machine(capabilities, chosen):
    choice = choose_precision("auto", torch.device("cpu"), capabilities=capabilities)
    assert choice.precision == chosen
    assert choice.reason


def test_asking_wins_over_the_machine():
    assert choose_precision("int8", torch.device("cpu"), capabilities={}) == ("int8", "asked for")


def test_many_at_once_say_what_each_says_alone_in_8_bits(talker):
    """Rows are quantised apart, and what the base can do was found out before it was narrowed."""
    packed = copy.deepcopy(talker).pack("int8")
    assert packed.model.backbone.padding_is_exact
    asked = [[{"role": "user", "content": text}] for text in ("How are you?", "Yes", "Tell me a story.")]
    together = packed.chat_many(asked, **SHORT)
    assert [reply.text for reply in together] == [packed.chat_many([one], **SHORT)[0].text for one in asked]


def test_packing_twice_the_same_way_gives_the_same(talker):
    one, other = (copy.deepcopy(talker).pack("int8") for _ in range(2))
    assert outputs(one).keys() == outputs(other).keys()
    for name, value in outputs(one).items():
        assert torch.equal(value, outputs(other)[name]), name


def test_pack_is_a_function_of_a_model_too(talker):
    model = copy.deepcopy(talker).model
    report = pack(model, "bf16")
    assert report.precision == "bf16"
    assert sum(report.kernels.values()) == len(report.layers)
