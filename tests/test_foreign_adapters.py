"""Bases that come with an adapter of PEFT, beside their weights or merged first; quantised bases."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor

from examples.untrained_talker import make_parts
from omni_adapter import OmniAdapter, SnacCodec
from omni_adapter.backbone import Backbone
from omni_adapter.errors import BackboneError, CheckpointError, ConfigError
from omni_adapter.model import ADDED_GROUPS
from omni_adapter.training.stages import prepare_stage

IDS = torch.tensor([[5, 17, 120, 33, 64, 2]])
THEIRS = ["q_proj", "v_proj", "down_proj"]
CAUSAL = TaskType.CAUSAL_LM


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base, an encoder and a codec in folders, and LoRA on the base as PEFT saves it."""
    folder, parts = tmp_path_factory.mktemp("world"), make_parts()
    parts.lm.save_pretrained(folder / "base")
    parts.tokenizer.save_pretrained(folder / "base")
    parts.whisper.save_pretrained(folder / "encoder")
    WhisperFeatureExtractor(feature_size=parts.whisper.config.num_mel_bins).save_pretrained(
        folder / "encoder"
    )
    SnacCodec.from_model(parts.snac).save_pretrained(folder / "codec")
    make_adapter(folder, LoraConfig(r=4, target_modules=THEIRS, task_type=CAUSAL)).save_pretrained(
        folder / "adapter"
    )
    return folder


def load_base(world: Path, **arguments):
    return AutoModelForCausalLM.from_pretrained(world / "base", **arguments).eval()


def make_adapter(world: Path, config, *, scale: float = 0.1) -> PeftModel:
    """The base with an adapter whose weights do something."""
    model = get_peft_model(load_base(world), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, mean=float("ia3" in name), std=scale)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    if isinstance(model, OmniAdapter):
        backbone = model.model.backbone
        return backbone(backbone.embed(IDS)).logits
    return model(IDS).logits


@pytest.fixture(scope="module")
def theirs(world) -> torch.Tensor:
    """What PEFT makes of base and adapter."""
    return logits(PeftModel.from_pretrained(load_base(world), world / "adapter"))


def wrap(base, world: Path, **settings) -> OmniAdapter:
    if not isinstance(base, str | Path):
        settings.setdefault("tokenizer", AutoTokenizer.from_pretrained(world / "base"))
    parts = {"encoder": str(world / "encoder"), "codec": str(world / "codec"), "tts_layers": 1}
    return OmniAdapter.wrap(base, **{**parts, **settings})


def teach(talker: OmniAdapter, steps: int = 2) -> None:
    """Let what learns learn something."""
    backbone = talker.model.backbone
    learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.5)
    for _ in range(steps):
        backbone(backbone.embed(IDS)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def as_folder(world):
    return world / "adapter", {}


def as_name_beside(world):
    return world / "base", {"base_adapter": world / "adapter"}


def as_peft_model(world):
    return PeftModel.from_pretrained(load_base(world), world / "adapter"), {}


def as_model_inside(world):
    return as_peft_model(world)[0].get_base_model(), {}


def as_transformers_loads_it(world):
    lm = load_base(world)
    lm.load_adapter(str(world / "adapter"))
    return lm.eval(), {}


WAYS = [as_folder, as_name_beside, as_peft_model, as_model_inside, as_transformers_loads_it]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merge", [False, True])
def test_text_is_that_of_base_and_adapter(world, theirs, tmp_path, way, merge):
    """However it comes, text is what PEFT makes of it; saved and loaded, too."""
    base, settings = way(world)
    talker = wrap(base, world, merge_base_adapter=merge, **settings)
    assert talker.model.backbone.stacks != merge
    assert not talker.model.groups()["lora"], "what others trained is not ours"
    if not merge:
        assert torch.equal(logits(talker), theirs)
    torch.testing.assert_close(logits(talker), theirs, atol=1e-5, rtol=1e-5)
    assert (logits(talker) - logits(load_base(world))).abs().max() > 0.1
    talker.save_pretrained(tmp_path / "talker", include=() if way in WAYS[:2] else ("base",))
    again = OmniAdapter.from_pretrained(tmp_path / "talker")
    assert torch.equal(logits(again), logits(talker))
    if way in WAYS[:2]:
        assert again.config.base_adapter.id == str(world / "adapter")
        assert again.config.merge_base_adapter == merge
        assert again.config.base_adapter.fingerprint["sha256"]
        assert not (tmp_path / "talker/base_adapter").exists()
    else:
        assert (tmp_path / "talker/base_adapter").exists() != merge, "merged, it is in the base"


def test_ours_learns_beside_theirs(world, theirs, tmp_path):
    """Stage 2: only our LoRA moves; off, text is theirs; saved, loaded and exported, both are there."""
    talker = wrap(world / "adapter", world)
    model, backbone = talker.model, talker.model.backbone
    table = prepare_stage(model, "adapt")
    assert {row.group for row in table.rows if row.trainable} == {"lora"}
    assert torch.equal(logits(talker), theirs), "what was not trained yet does nothing"
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    teach(talker)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert moved <= set(model.groups()["lora"])
    both = logits(talker)
    assert (both - theirs).abs().max() > 1e-3
    with backbone.lora_disabled():
        assert torch.equal(logits(talker), theirs)
    assert torch.equal(logits(talker), both)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(
        model.groups()["lora"]
    )

    talker.save_pretrained(tmp_path / "talker")
    again = OmniAdapter.from_pretrained(tmp_path / "talker")
    assert torch.equal(logits(again), both)
    with again.model.backbone.lora_disabled():
        assert torch.equal(logits(again), theirs)
    talker.save_pretrained(tmp_path / "with-base", include=("base",))
    alone = OmniAdapter.from_pretrained(tmp_path / "with-base")
    assert (alone.config.base.id, alone.config.base_adapter.id) == ("./base", "./base_adapter")
    assert torch.equal(logits(alone), both)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "with-base/base")), logits(load_base(world))
    )

    talker.export(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged/base")), both, atol=1e-5, rtol=1e-4
    )
    assert OmniAdapter.from_pretrained(tmp_path / "merged").config.base_adapter is None
    talker.export(tmp_path / "peft", form="peft")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "peft/base")
    torch.testing.assert_close(logits(plain), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain, tmp_path / "peft/lora")), both, atol=1e-5, rtol=1e-4
    )
    assert torch.equal(logits(talker), both), "nothing of this changed the talker"


def test_ours_is_taken_off_and_put_on_again(world, theirs):
    talker = wrap(world / "adapter", world)
    backbone = talker.model.backbone
    targets = backbone.add_lora(rank=2)
    assert targets == Backbone(load_base(world)).add_lora(rank=2), "the same layers as without theirs"
    teach(talker)
    backbone.drop_lora()
    assert torch.equal(logits(talker), theirs)
    assert backbone.add_lora(rank=2, targets="v_proj") == tuple(t for t in targets if t.endswith("v_proj"))
    backbone.drop_lora()
    backbone.drop_carried()
    assert torch.equal(logits(talker), logits(load_base(world)))


def test_a_talker_loads_with_base_and_adapter_from_elsewhere(world, theirs, tmp_path):
    wrap(world / "adapter", world).save_pretrained(tmp_path / "talker")
    shared = as_peft_model(world)[0]
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    again = OmniAdapter.from_pretrained(tmp_path / "talker", base=shared, tokenizer=tokenizer)
    assert torch.equal(logits(again), theirs)
    again = OmniAdapter.from_pretrained(
        tmp_path / "talker", base=world / "base", base_adapter=world / "adapter"
    )
    assert torch.equal(logits(again), theirs)
    other = make_adapter(world, LoraConfig(r=4, target_modules=THEIRS, task_type=CAUSAL), scale=0.2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"this base adapter is not the one .* sha256 was"):
        OmniAdapter.from_pretrained(tmp_path / "talker", base_adapter=tmp_path / "other")
    wrap(world / "base", world).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="made with a base that carries no adapter"):
        OmniAdapter.from_pretrained(tmp_path / "plain", base=other, tokenizer=tokenizer)


def test_adapters_of_the_hub_are_named_by_commit(world, theirs, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from tests.fake_hub import FakeHub

    with FakeHub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        commit = server.commit("them/base", world / "base")
        files = {file.name: file.read_bytes() for file in (world / "adapter").iterdir()}
        values = json.loads(files["adapter_config.json"])
        files["adapter_config.json"] = json.dumps({**values, "base_model_name_or_path": "them/base"}).encode()
        pinned = server.commit("them/chat-lora", {**files, "adapter_model.bin": b"a pickle"})
        talker = wrap("them/chat-lora", world)
        config = talker.config
        assert (config.base.id, config.base.revision) == ("them/base", commit)
        assert (config.base_adapter.id, config.base_adapter.revision) == ("them/chat-lora", pinned)
        assert torch.equal(logits(talker), theirs)
        assert not any(name.endswith(".bin") for name in server.downloads())
        talker.save_pretrained(tmp_path / "talker")
        # The adapter moves on; the talker stays with what it was made of.
        server.commit("them/chat-lora", {"README.md": b"gone"})
        assert torch.equal(logits(OmniAdapter.from_pretrained(tmp_path / "talker")), theirs)
        with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
            wrap("them/base", world, base_adapter="them/chat-lora")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=THEIRS, use_dora=True, task_type=CAUSAL),
        LoraConfig(r=4, target_modules=[*THEIRS, "lm_head", "embed_tokens"], task_type=CAUSAL),
        LoraConfig(r=4, target_modules=THEIRS, rank_pattern={"v_proj": 2}, use_rslora=True, task_type=CAUSAL),
    ],
    ids=["dora", "tables", "pattern"],
)
def test_kinds_of_lora(world, tmp_path, config):
    """Beside the base, with ours on top and saved, from a file and from memory alike."""
    model = make_adapter(world, config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    talker = wrap(tmp_path / "adapter", world)
    assert torch.equal(logits(talker), expected)
    loaded = wrap(model, world)
    assert torch.equal(logits(loaded), expected)
    ours, others = (t.config.base_adapter.fingerprint for t in (talker, loaded))
    assert ours == others
    talker.model.backbone.add_lora(rank=2)
    teach(talker)
    both = logits(talker)
    talker.save_pretrained(tmp_path / "talker")
    assert torch.equal(logits(OmniAdapter.from_pretrained(tmp_path / "talker")), both)
    talker.export(tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged/base"))
    torch.testing.assert_close(merged, both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, target_modules=THEIRS, task_type=CAUSAL),
        LoraConfig(r=4, target_modules=THEIRS, modules_to_save=["lm_head"], task_type=CAUSAL),
    ],
    ids=["ia3", "loha", "whole-head"],
)  # fmt: skip
def test_other_kinds_are_merged_first(world, tmp_path, config):
    model = make_adapter(world, config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BackboneError, match="say merge_base_adapter=True"):
        wrap(tmp_path / "adapter", world)
    talker = wrap(tmp_path / "adapter", world, merge_base_adapter=True)
    torch.testing.assert_close(logits(talker), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits(wrap(model, world, merge_base_adapter=True)), expected, atol=1e-5, rtol=1e-5
    )
    prepare_stage(talker.model, "adapt")
    teach(talker)
    both = logits(talker)
    talker.save_pretrained(tmp_path / "talker")
    assert torch.equal(logits(OmniAdapter.from_pretrained(tmp_path / "talker")), both)


def test_full_learning_needs_one_set_of_weights(world, tmp_path):
    with pytest.raises(ConfigError, match="wrap it with merge_base_adapter=True before it learns fully"):
        prepare_stage(wrap(world / "adapter", world).model, "adapt", lm_mode="full")
    talker = wrap(world / "adapter", world, merge_base_adapter=True)
    prepare_stage(talker.model, "adapt", lm_mode="full")
    teach(talker)
    expected = logits(talker)
    talker.save_pretrained(tmp_path / "talker", include=("base",))
    again = OmniAdapter.from_pretrained(tmp_path / "talker")
    assert torch.equal(logits(again), expected)
    assert again.config.base_adapter is None


def changed(world: Path, folder: Path, **values) -> Path:
    folder.mkdir()
    config = json.loads((world / "adapter/adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
    weights = load_file(world / "adapter/adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, BackboneError, "kind PREFIX_TUNING puts steps before the prompt"),
        ({"peft_type": "NO_SUCH"}, BackboneError, "no adapter that PEFT knows"),
        ({"init_lora_weights": "pissa"}, BackboneError, "'pissa' belongs to a changed base"),
        ({"loftq_config": {"loftq_bits": 4}}, CheckpointError, "sets loftq_config; convert it"),
        ({"layer_replication": [[0, 1], [0, 2]]}, BackboneError, "repeats layers"),
        ({"target_modules": ".*(q|v)_proj"}, CheckpointError, "target_modules must be a list of names"),
        ({"target_modules": ["nowhere"]}, BackboneError, "the adapter does not fit LlamaForCausalLM"),
        ({"target_modules": ["q_proj"]}, BackboneError, "weights do not fit"),
        ({"r": 8}, BackboneError, r"expected \[8, 64\], got \[4, 64\]"),
        ({"r": 1 << 20}, CheckpointError, "ranks must be at most"),
        ({"bias": "all"}, BackboneError, r"replaces weights of the base itself \(bias\)"),
        ({"base_model_name_or_path": "/nowhere/base"}, BackboneError, "cannot be looked up; pass the base"),
        ({"base_model_name_or_path": None}, BackboneError, "names the base None"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_carried(world, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        wrap(changed(world, tmp_path / "adapter", **values), world)


def test_broken_and_unsafe_files_are_refused(world, tmp_path):
    folder = changed(world, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        wrap(folder, world)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors.*pickles are never read"):
        wrap(folder, world)
    with pytest.raises(CheckpointError, match="does not exist"):
        wrap(world / "base", world, base_adapter=tmp_path / "nowhere")


def test_states_of_a_loaded_model_that_cannot_be_carried(world):
    model, _ = as_peft_model(world)
    model.merge_adapter()
    with pytest.raises(
        BackboneError, match=r"merged into LlamaForCausalLM for now; call unmerge_adapter\(\)"
    ):
        wrap(model, world)
    model.unmerge_adapter()
    model.load_adapter(world / "adapter", adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(BackboneError, match=r"2 adapters are in force .*\(default, second\).*set_adapter"):
        wrap(model, world)
    prompts = get_peft_model(load_base(world), PromptTuningConfig(num_virtual_tokens=3, task_type=CAUSAL))
    with pytest.raises(BackboneError, match="kind PROMPT_TUNING puts steps before the prompt"):
        wrap(prompts, world)
    with pytest.raises(BackboneError, match="carries an adapter already"):
        wrap(as_peft_model(world)[0], world, base_adapter=world / "adapter")
    with pytest.raises(ConfigError, match="the base comes with no adapter"):
        wrap(world / "base", world, merge_base_adapter=True)


def test_what_cannot_be_merged_is_said(world, tmp_path):
    """DoRA beside theirs; a table that two modules share; tables of another size."""
    with pytest.raises(BackboneError, match="DoRA rescales whole weights"):
        wrap(world / "adapter", world).model.backbone.add_lora(use_dora=True)
    tied = load_base(world)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    model = get_peft_model(tied, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type=CAUSAL))
    expected = logits(model.eval())
    with pytest.raises(BackboneError, match=r"LoRA on lm_head of LlamaForCausalLM cannot be merged"):
        wrap(copy.deepcopy(model), world, merge_base_adapter=True)
    assert torch.equal(logits(wrap(model, world)), expected)
    larger = load_base(world)
    larger.resize_token_embeddings(larger.config.vocab_size + 3)
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type=CAUSAL)
    get_peft_model(larger, config).save_pretrained(tmp_path / "larger")
    with pytest.raises(BackboneError, match=r"is not that of LlamaForCausalLM.*merge the two with PEFT"):
        wrap(tmp_path / "larger", world)


# quantised bases


def four_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def eight_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def needs(package: str):
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"{package} is in the extra quantized, which is not installed"
    )


QUANTIZED = [
    pytest.param(four_bits, marks=needs("bitsandbytes")),
    pytest.param(eight_bits, marks=needs("bitsandbytes")),
    pytest.param(torchao_int8, marks=needs("torchao")),
]


@pytest.mark.parametrize("make", QUANTIZED)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_quantised_bases(world, tmp_path, make, adapter):
    """Text is the quantised base's; LoRA learns on top; the base is a reference, or saved as it is."""
    expected = load_base(world, quantization_config=make())
    if adapter:
        expected = PeftModel.from_pretrained(expected, world / "adapter").eval()
    expected = logits(expected)
    source = world / ("adapter" if adapter else "base")
    talker = wrap(source, world, quantization_config=make())
    backbone = talker.model.backbone
    assert backbone.is_quantized
    assert torch.equal(logits(talker), expected)
    with pytest.raises(ConfigError, match=r"quantised, and such weights|carries an adapter beside"):
        prepare_stage(talker.model, "adapt", lm_mode="full")
    prepare_stage(talker.model, "adapt")
    teach(talker)
    both = logits(talker)
    assert (both - expected).abs().max() > 1e-4
    with backbone.lora_disabled():
        assert torch.equal(logits(talker), expected)

    talker.save_pretrained(tmp_path / "talker")
    assert not (tmp_path / "talker/base").exists()
    again = OmniAdapter.from_pretrained(tmp_path / "talker", quantization_config=make())
    assert torch.equal(logits(again), both)
    whole = OmniAdapter.from_pretrained(tmp_path / "talker")
    assert not whole.model.backbone.is_quantized, "the same talker on the base as it is"
    with pytest.raises(BackboneError, match="is quantised: merging LoRA would round"):
        talker.export(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    if backbone.can_be_saved:
        talker.save_pretrained(tmp_path / "with-base", include=("base",))
        alone = OmniAdapter.from_pretrained(tmp_path / "with-base")
        assert alone.model.backbone.is_quantized
        assert torch.equal(logits(alone), both)
    else:
        assert make is four_bits
        with pytest.raises(CheckpointError, match="save the talker without the base"):
            talker.save_pretrained(tmp_path / "with-base", include=("base",))
    assert torch.equal(logits(talker), both), "saving changed nothing"
    if adapter:
        with pytest.raises(BackboneError, match="is quantised: merging an adapter would round"):
            wrap(source, world, quantization_config=make(), merge_base_adapter=True)


def test_groups_of_a_carried_adapter(world):
    """The adapter counts to the language model, whatever it is called in the LM."""
    groups = wrap(world / "adapter", world).model.groups()
    names = [name for name in groups["language_model"] if "lora_" in name]
    assert names
    assert all(".carried." in name for name in names)
    assert set(groups) == {*ADDED_GROUPS, "lora", "language_model", "audio_encoder"}
