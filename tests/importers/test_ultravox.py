"""Ultravox's projector against a reference in plain PyTorch, on checkpoints of the published layout."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from examples.untrained_talker import make_parts
from omni_adapter import CheckpointError, ConfigError, OmniAdapter, SnacCodec, cli
from omni_adapter.config import AudioAdapterConfig
from omni_adapter.data.collator import collate
from omni_adapter.importers import ImportOptions, import_talker
from omni_adapter.importers.port import Source, load_weights
from omni_adapter.importers.ultravox import UltravoxConfig, UltravoxImporter, adapter_weights
from omni_adapter.modules.audio_adapter import AudioAdapter

SHORT = {"max_new_tokens": 12}
WIDTH, FRAME_WIDTH = 64, 32  # of the small base, of the small encoder


@dataclass(frozen=True)
class Version:
    """What differs between the published versions."""

    projector_act: str = "swiglu"
    projector_ln_mid: bool = True
    stack_factor: int = 8
    hidden_size: int = 48

    @property
    def inside(self) -> int:
        return self.hidden_size // 2 if self.projector_act == "swiglu" else self.hidden_size


V04 = Version(projector_ln_mid=False)
V05 = Version()
VERSIONS = [
    pytest.param(V04, id="v0.4"),
    pytest.param(V05, id="v0.5"),
    pytest.param(Version(projector_act="gelu", stack_factor=5), id="gelu"),
]


def projector_state(version: Version) -> dict[str, Tensor]:
    """The projector as they save it."""
    generator = torch.Generator().manual_seed(0)
    stacked = FRAME_WIDTH * version.stack_factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    norm = {"ln_mid": version.inside} if version.projector_ln_mid else {"ln_post": WIDTH}
    state = {
        "ln_pre.weight": 0.4 + 0.1 * normal(stacked),
        "linear_1.weight": normal(version.hidden_size, stacked) * 0.2,
        "linear_2.weight": normal(WIDTH, version.inside) * 0.3,
        **{f"{name}.weight": 0.4 + 0.1 * normal(width) for name, width in norm.items()},
    }
    return {f"multi_modal_projector.{name}": tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Base, encoder and codec as their makers published them."""
    folder, made = tmp_path_factory.mktemp("parts"), make_parts()
    made.lm.save_pretrained(folder / "base")
    made.tokenizer.save_pretrained(folder / "base")
    made.whisper.save_pretrained(folder / "encoder")
    SnacCodec.from_model(made.snac).save_pretrained(folder / "codec")
    return {name: folder / name for name in ("base", "encoder", "codec")}


def write_checkpoint(
    folder: Path, parts: dict[str, Path], version: Version = V05, *, state=None, **changes
) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "ultravox",
        "architectures": ["UltravoxModel"],
        "text_model_id": str(parts["base"]),
        "audio_model_id": str(parts["encoder"]),
        "audio_token_index": 128256,
        "norm_init": 0.4,
        "stack_factor": version.stack_factor,
        "hidden_size": version.hidden_size,
        "projector_act": version.projector_act,
        "projector_ln_mid": version.projector_ln_mid,
        "audio_latency_block_size": None,
        "torch_dtype": "bfloat16",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(projector_state(version) if state is None else state, folder / "model.safetensors")
    return folder


def imported(folder: Path, parts: dict[str, Path], **options) -> OmniAdapter:
    return import_talker("ultravox", folder, options=ImportOptions(codec=str(parts["codec"]), **options))


def clips_of(talker: OmniAdapter, sample):
    return collate([sample], rules=talker.processor.rules).clips


class Reference:
    """Their model, from its formulas: encoder, projector, language model."""

    def __init__(self, state: dict[str, Tensor], version: Version, *, parts) -> None:
        self.weights = {name.split(".", 1)[1]: tensor.double() for name, tensor in state.items()}
        self.version = version
        self.lm, self.tokenizer, whisper, _ = parts
        self.encoder = whisper.encoder

    def encode(self, mel: Tensor) -> Tensor:
        """Frames [A', E] of features [M, F], unmasked, as long as they are."""
        encoder = self.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None])))).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for layer in encoder.layers:
            x = layer(x, None)
        return encoder.layer_norm(x)[0]

    def norm(self, values: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in self.weights:
            return values
        variance = values.pow(2).mean(-1, keepdim=True)
        return self.weights[f"{name}.weight"] * values * torch.rsqrt(variance + 1e-6)

    def project(self, frames: Tensor) -> Tensor:
        """Embeddings [A, D] of frames [A', E]."""
        stack = self.version.stack_factor
        frames = torch.cat((frames.double(), torch.zeros(-len(frames) % stack, frames.shape[1])))
        hidden = (
            self.norm(frames.reshape(-1, stack * frames.shape[1]), "ln_pre")
            @ self.weights["linear_1.weight"].T
        )
        if self.version.projector_act == "swiglu":
            value, gate = hidden[:, : self.version.inside], hidden[:, self.version.inside :]
            hidden = gate / (1 + torch.exp(-gate)) * value
        else:
            hidden = F.gelu(hidden)
        return self.norm(self.norm(hidden, "ln_mid") @ self.weights["linear_2.weight"].T, "ln_post").float()

    def prompt(self, text: str, heard: Tensor) -> Tensor:
        """Embeddings of a rendered prompt whose ``<|audio|>`` stands for the recording, [1, S, D]."""
        before, after = (
            self.lm.get_input_embeddings()(
                torch.tensor(self.tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.long)
            )
            for part in text.split("<|audio|>")
        )
        return torch.cat((before, heard, after))[None]

    def answer(self, embeddings: Tensor, *, steps: int) -> list[int]:
        """Likeliest ids, one by one, without a cache."""
        ids: list[int] = []
        for _ in range(steps):
            token = int(self.lm(inputs_embeds=embeddings).logits[0, -1].argmax())
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                break
            step = self.lm.get_input_embeddings()(torch.tensor([[token]]))
            embeddings = torch.cat((embeddings, step), dim=1)
        return ids


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_heard_and_answered_is_theirs(tmp_path, parts, version, question):
    folder = write_checkpoint(tmp_path / "published", parts, version)
    imported(folder, parts).save_pretrained(tmp_path / "talker")
    talker = OmniAdapter.from_pretrained(tmp_path / "talker")
    reference = Reference(projector_state(version), version, parts=make_parts())

    frames = torch.randn(1, 51, FRAME_WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        talker.model.audio_adapter(frames)[0], reference.project(frames[0]), rtol=1e-4, atol=1e-5
    )

    content = [{"type": "text", "text": "Answer: "}, {"type": "audio", "audio": question}]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": content}]
    sample = talker.processor(messages, task="speech_to_text")
    (window,) = sample.recordings[0]
    heard = reference.project(reference.encode(window.values))
    assert len(heard) == -(-window.length // (2 * version.stack_factor))
    turns = [messages[0], {"role": "user", "content": "Answer: <|audio|>"}]
    text = reference.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    embeddings = reference.prompt(text, heard)
    (own,) = talker.model.hear(clips_of(talker, sample))
    torch.testing.assert_close(own, heard, rtol=1e-4, atol=1e-5)
    assert sample.layout.grid.shape[1] == embeddings.shape[1]
    places = [(0, span.start, span.length) for span in sample.layout.spans]
    output = talker.model(sample.layout.grid[None], places=places, clips=clips_of(talker, sample))
    logits = reference.lm(inputs_embeds=embeddings).logits
    assert float((output.text_logits - logits).abs().max() / logits.abs().max()) < 1e-4

    ids = reference.answer(embeddings, steps=SHORT["max_new_tokens"])
    reply = talker.chat(messages=messages, speak=False, **SHORT)
    assert reply.text == reference.tokenizer.decode(ids, skip_special_tokens=True)
    for options in ({"batch_parallel": True}, {"batch_parallel": False}):
        spoken = talker.chat(messages=messages, **options, **SHORT)
        if options["batch_parallel"]:
            assert spoken.text == reply.text  # a voice beside it changes no word
        assert len(spoken.audio)


def test_the_first_word_is_theirs_in_every_task_and_parts_are_named(tmp_path, parts, question):
    talker = imported(write_checkpoint(tmp_path / "published", parts), parts)
    assert talker.config.base.id == str(parts["base"])
    assert talker.config.encoder.id == str(parts["encoder"])
    assert talker.config.prompt_format == "chat"
    assert not talker.config.recording_marks
    messages = [{"role": "user", "content": [{"type": "audio", "audio": question}]}]
    logits = []
    for task in ("speech_to_text", "speech_to_speech", "asr"):
        sample = talker.processor(messages, task=task)
        places = [(0, span.start, span.length) for span in sample.layout.spans]
        with torch.no_grad():
            logits.append(
                talker.model(
                    sample.layout.grid[None], places=places, clips=clips_of(talker, sample)
                ).text_logits
            )
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_an_encoder_that_was_trained_too_comes_along(tmp_path, parts):
    trained = make_parts(seed=1).whisper.encoder
    tower = {f"audio_tower.{name}": tensor for name, tensor in trained.state_dict().items()}
    config = trained.config.to_dict() | {"_name_or_path": "openai/whisper-large-v3-turbo"}
    folder = write_checkpoint(
        tmp_path / "published",
        parts,
        state=projector_state(V05) | tower,
        audio_model_id=None,
        audio_config=config,
    )
    imported(folder, parts).save_pretrained(tmp_path / "talker")
    assert (tmp_path / "talker" / "encoder").is_dir()
    talker = OmniAdapter.from_pretrained(tmp_path / "talker")
    for name, weight in talker.model.audio_encoder.encoder.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name])
    del tower["audio_tower.layers.1.fc1.weight"]
    with pytest.raises(CheckpointError, match=r"audio_tower of .* missing: layers\.1\.fc1\.weight"):
        imported(
            write_checkpoint(
                tmp_path / "half", parts, state=projector_state(V05) | tower, audio_config=config
            ),
            parts,
        )


def test_sharded_weights_are_found_by_their_index(tmp_path, parts):
    folder = write_checkpoint(tmp_path / "published", parts)
    (folder / "model.safetensors").unlink()
    state = projector_state(V05)
    names = sorted(state)
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    talker = imported(folder, parts)
    assert torch.equal(
        talker.model.audio_adapter.in_norm.weight, state["multi_modal_projector.ln_pre.weight"]
    )
    index.write_text(json.dumps({"weight_map": {names[0]: "../../secret.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"names '\.\./\.\./secret\.safetensors', which is no file beside"
    ):
        imported(folder, parts)
    index.write_text(json.dumps({"weight_map": {"language_model.model.norm.weight": "x"}}))
    with pytest.raises(CheckpointError, match="holds weights of its language model"):
        imported(folder, parts)


def test_the_command_imports_and_the_talker_answers(tmp_path, parts, question):
    folder, out = write_checkpoint(tmp_path / "published", parts), tmp_path / "talker"
    words = ["import", "ultravox", str(folder), "--codec", str(parts["codec"]), "--out", str(out)]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.stderr
    asked = ["talk", str(question), "--no-speech", "--json", "--max-new-tokens", "12", "--model", str(out)]
    reply = CliRunner().invoke(cli.app, asked)
    assert (
        json.loads(reply.stdout)["text"] == imported(folder, parts).chat(question, speak=False, **SHORT).text
    )


@pytest.mark.slow
def test_the_projector_of_true_width():
    """v0.5 for a base of width 2048: 8 frames of 1280, 4096 inside."""
    config = UltravoxConfig(projector_ln_mid=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"ln_pre": (10240,), "linear_1": (4096, 10240), "ln_mid": (2048,), "linear_2": (2048, 2048)}
    state = {
        f"multi_modal_projector.{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    settings = AudioAdapterConfig(stack=8, norms=("in", "hidden"))
    adapter = AudioAdapter(in_width=1280, out_width=2048, hidden_width=config.inside, rms=1, config=settings)
    load_weights(adapter, adapter_weights(state, config), source="test")
    frames = torch.randn(1, 27, 1280, generator=generator)
    reference = Reference(state, Version(hidden_size=4096), parts=make_parts())
    expected = reference.project(frames[0])
    with torch.no_grad():
        difference = (adapter(frames)[0] - expected).abs().max()
    assert float(difference / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_act": "tanh"}, "projector_act='tanh' instead of one of swiglu, relu, gelu, silu"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size=100 instead of null"),
        ({"num_projector_layers": 2}, "num_projector_layers=2 instead of 0"),
        ({"model_type": "llava"}, "model_type='llava' instead of 'ultravox'"),
        ({"hidden_size": 47}, "hidden_size=47, which swiglu cannot halve"),
        ({"stack_factor": 0}, "stack_factor: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_settings_that_a_talker_cannot_have_are_named(tmp_path, parts, changes, message):
    with pytest.raises(ConfigError, match=message):
        imported(write_checkpoint(tmp_path / "published", parts, **changes), parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_2.weight": None}, r"missing: down\.weight"),
        ({"linear_2.weight": torch.ones(WIDTH, 25)}, r"down\.weight \[64, 25\] instead of \[64, 24\]"),
        ({"ln_post.weight": torch.ones(WIDTH)}, r"unknown: out_norm\.weight"),
        ({"conv.weight": torch.ones(3)}, r"unknown: conv\.weight"),
        ({"ln_pre.weight": torch.full((256,), torch.nan)}, "holds NaN or infinity"),
    ],
)
def test_broken_projectors_are_refused(tmp_path, parts, change, message):
    state = projector_state(V05)
    for name, tensor in change.items():
        state[f"multi_modal_projector.{name}"] = tensor
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        imported(write_checkpoint(tmp_path / "published", parts, state=state), parts)


def test_a_checkpoint_of_the_hub_names_nothing_on_this_machine(tmp_path, parts):
    folder = write_checkpoint(tmp_path / "published", parts)
    options = ImportOptions(codec=str(parts["codec"]))
    with pytest.raises(
        CheckpointError, match=r"names the base '/.*', which is no Hub id; pass it as an option"
    ):
        UltravoxImporter().read(Source(folder, "org/ultravox", "org/ultravox"), options=options)
    with pytest.raises(CheckpointError, match="does not name its base; pass it as an option"):
        imported(write_checkpoint(tmp_path / "nameless", parts, text_model_id=None), parts)
    given = imported(tmp_path / "nameless", parts, base=str(parts["base"]), dtype="bfloat16")
    assert given.model.backbone.dtype == torch.bfloat16
    assert given.model.audio_adapter.down.weight.dtype == torch.bfloat16
