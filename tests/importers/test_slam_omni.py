"""SLAM-Omni in Mini-Omni mode against a reference written from SLAM-LLM's own steps.

The reference keeps what the original has: one language model whose tables hold text ids and the ids of all
code rows, and prompts of joint ids.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from snac import SNAC
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperFeatureExtractor
from transformers.initialization import no_init_weights
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from examples.untrained_talker import make_parts
from omni_adapter import CheckpointError, ConfigError, OmniAdapter, PromptError, SnacCodec
from omni_adapter.data.collator import collate
from omni_adapter.data.layout import get_task
from omni_adapter.data.processor import OmniProcessor
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.importers import ImportOptions, import_talker

ROWS, STACK = 7, 5
END, PAD, INPUT, ANSWER = range(4)


@dataclass(frozen=True)
class Size:
    """Sizes of a checkpoint; 64 more ids of text and of each code row are kept for marks."""

    width: int = 32
    inside: int = 48
    heads: int = 4
    kv_heads: int = 2
    text_ids: int = 448
    code_ids: int = 64
    frame_width: int = 32
    projector_width: int = 40

    @property
    def text_rows(self) -> int:
        return self.text_ids + 64

    @property
    def code_rows(self) -> int:
        return self.code_ids + 64


SMALL = Size()
TRUE = Size(896, 4864, 14, 2, 151_936, 4096, 768, 2048)  # Qwen2-0.5B, Whisper small, two layers of each
SYSTEM = {
    "asr": "Transcribe the provided audio into accurate text. ",
    "tts": "Generate a natural and expressive spoken version of the given text. ",
    "speech_to_speech": "Conduct a spoken conversation with the user. ",
}
TEXT = "How are you?"
RATE = 16_000
STEPS = 10


def joint_lm(size: Size = SMALL, *, tied: bool) -> Qwen2ForCausalLM:
    config = lm_config(size, tied=tied)
    config.vocab_size = size.text_rows + ROWS * size.code_rows
    with torch.random.fork_rng(), no_init_weights():
        torch.manual_seed(3)
        lm = Qwen2ForCausalLM(config).eval()
        lm.tie_weights()
        for name, parameter in lm.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data = 1 + 0.2 * torch.randn_like(parameter)
            else:
                parameter.data.normal_(0, 1 if "embed" in name else parameter.shape[-1] ** -0.5)
    return lm


def lm_config(size: Size = SMALL, *, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=size.text_ids,
        hidden_size=size.width,
        intermediate_size=size.inside,
        num_hidden_layers=2,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )


def projector(size: Size = SMALL) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    return {
        "linear1.weight": normal(size.projector_width, STACK * size.frame_width, std=0.1),
        "linear1.bias": normal(size.projector_width, std=0.3),
        "linear2.weight": normal(size.width, size.projector_width, std=0.3),
        "linear2.bias": normal(size.width, std=0.3),
    }


def trained_state(size: Size = SMALL, *, tied: bool, lm=None) -> "OrderedDict[str, Tensor]":
    """What SLAM-LLM saves: every parameter that learned, by its name."""
    lm = lm or joint_lm(size, tied=tied)
    state = {f"llm.{name}": parameter.detach() for name, parameter in lm.named_parameters()}
    state |= {f"encoder_projector.{name}": tensor for name, tensor in projector(size).items()}
    return OrderedDict(state)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Encoder and codec as published; of the bases only config and tokenizer, as nothing else is read."""
    folder, made = tmp_path_factory.mktemp("parts"), make_parts()
    for name, tied in (("tied", True), ("untied", False)):
        lm_config(tied=tied).save_pretrained(folder / name)
        made.tokenizer.save_pretrained(folder / name)
    made.whisper.save_pretrained(folder / "encoder")
    SnacCodec.from_model(made.snac).save_pretrained(folder / "codec")
    return {name: folder / name for name in ("tied", "untied", "encoder", "codec")}


def imported(file: Path, parts, *, base: str = "tied", state=None, **options) -> OmniAdapter:
    if state is not None:
        torch.save(state, file)
    given = {"base": str(parts[base]), "encoder": str(parts["encoder"]), "codec": str(parts["codec"])}
    return import_talker("slam-omni", file, options=ImportOptions(**(given | options)))


class Reference:
    """The original's model and prompts."""

    def __init__(self, size: Size = SMALL, *, tied: bool, encoder=None) -> None:
        made = make_parts()
        self.size, self.lm, self.tokenizer = size, joint_lm(size, tied=tied), made.tokenizer
        self.encoder = encoder or made.whisper.encoder
        self.projector = projector(size)

    def hear(self, samples: np.ndarray) -> Tensor:
        """Embeddings [A, D] of the whole window of 30 s."""
        mel = WhisperFeatureExtractor()(samples, sampling_rate=RATE, return_tensors="pt").input_features
        frames = self.encoder(mel).last_hidden_state[0]
        frames = frames[: len(frames) // STACK * STACK].reshape(-1, STACK * frames.shape[1])
        hidden = torch.relu(frames @ self.projector["linear1.weight"].T + self.projector["linear1.bias"])
        return hidden @ self.projector["linear2.weight"].T + self.projector["linear2.bias"]

    def prompt(self, system: str, *, heard: Tensor | None = None, text: str | None = None) -> Tensor:
        """Joint ids [8, T]."""

        def code(mark: int, row: int) -> int:
            return self.size.text_rows + row * self.size.code_rows + self.size.code_ids + mark

        told = self.tokenizer.encode(f"<SYSTEM>: {system}\n ", add_special_tokens=False)
        asked = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        length = len(asked) if heard is None else len(heard)
        rows = []
        for row in range(ROWS):
            rows.append([code(PAD, row)] * (len(told) + 2))
            rows[row] += [code(INPUT, row), *[code(PAD, row)] * length, code(END, row), code(ANSWER, row)]
        mark = self.size.text_ids
        question = [mark + PAD] * length if heard is not None else asked
        last = [mark + INPUT, *told, mark + END, mark + INPUT, *question, mark + END, mark + ANSWER]
        return torch.tensor([*rows, last])

    def logits(self, ids: Tensor, heard: Tensor | None, *, start: int) -> tuple[Tensor, Tensor]:
        """Text logits [T, V] and code logits [7, T, V'] of joint ids [8, T]; heard from ``start`` on."""
        embeddings = self.lm.get_input_embeddings()(ids)
        if heard is not None:
            embeddings[:ROWS, start : start + len(heard)] = heard
        logits = self.lm(inputs_embeds=embeddings.mean(dim=0)[None]).logits[0]
        codes = logits[:, self.size.text_rows :].unflatten(-1, (ROWS, self.size.code_rows))
        return logits[:, : self.size.text_rows], codes.transpose(0, 1)

    def generate(self, ids: Tensor, heard: Tensor | None, *, start: int) -> list[list[int]]:
        """[text, codes] of each step of a greedy reply, before anything ends."""
        said = []
        offsets = self.size.text_rows + torch.arange(ROWS) * self.size.code_rows
        for _ in range(STEPS):
            text, codes = self.logits(ids, heard, start=start)
            word, row_ids = text[-1].argmax(), codes[:, -1].argmax(-1)
            assert word != self.size.text_ids + END
            assert self.size.code_ids + END not in row_ids
            said.append([int(word), *row_ids.tolist()])
            ids = torch.cat((ids, torch.cat((row_ids + offsets, word[None]))[:, None]), dim=1)
        return said


def as_grid(ids: Tensor, size: Size = SMALL) -> Tensor:
    """Joint ids as ids of their own rows."""
    offsets = torch.tensor([size.text_rows + row * size.code_rows for row in range(ROWS)] + [0])
    return ids - offsets[:, None]


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """A second of a rising tone at 16 kHz."""
    seconds = np.arange(RATE) / RATE
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds)).astype(np.float32)


@pytest.fixture(scope="module", params=["tied", "untied"])
def case(request, parts, tmp_path_factory) -> tuple[OmniAdapter, Reference]:
    """A checkpoint imported, saved and loaded, beside the reference."""
    folder, tied = tmp_path_factory.mktemp("case"), request.param == "tied"
    talker = imported(folder / "model.pt", parts, base=request.param, state=trained_state(tied=tied))
    talker.save_pretrained(folder / "talker")
    return OmniAdapter.from_pretrained(folder / "talker"), Reference(tied=tied)


def assert_close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("task", ["speech_to_speech", "asr", "speech_to_text", "tts", "text_to_speech"])
def test_prompts_and_logits_are_theirs(case, samples, task):
    check_logits(*case, samples, task)


@torch.no_grad()
@pytest.mark.slow
def test_logits_of_true_width_are_theirs(tmp_path, samples):
    torch.manual_seed(0)
    sizes = {"d_model": TRUE.frame_width, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
    encoder = WhisperEncoder(WhisperConfig(encoder_layers=2, **sizes)).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    codec = SNAC(
        sampling_rate=24_000,
        encoder_dim=4,
        encoder_rates=[2, 4, 8, 8],
        decoder_dim=64,
        decoder_rates=[8, 8, 4, 2],
        attn_window_size=None,
        codebook_size=TRUE.code_ids,
        vq_strides=[4, 2, 1],
    )
    SnacCodec.from_model(codec).save_pretrained(tmp_path / "codec")
    lm_config(TRUE, tied=True).save_pretrained(tmp_path / "tied")
    make_parts().tokenizer.save_pretrained(tmp_path / "tied")
    parts = {name: tmp_path / name for name in ("tied", "encoder", "codec")}
    reference = Reference(TRUE, tied=True, encoder=encoder)
    state = trained_state(TRUE, tied=True, lm=reference.lm)
    talker = imported(tmp_path / "model.pt", parts, state=state)
    check_logits(talker, reference, samples, "speech_to_speech")


def check_logits(talker: OmniAdapter, reference: Reference, samples: np.ndarray, task: str) -> None:
    """Prompt, what is heard, and all logits of one question."""
    system = SYSTEM.get(task, SYSTEM["speech_to_speech"])
    hears = get_task(task).hears
    heard = reference.hear(samples) if hears else None
    content = [{"type": "audio", "audio": (samples, RATE)}] if hears else TEXT
    sample = talker.processor([{"role": "user", "content": content}], task=task)
    ids = reference.prompt(system, heard=heard, text=None if hears else TEXT)
    assert torch.equal(sample.layout.grid, as_grid(ids, reference.size))
    start = sample.layout.spans[0].start if hears else 0
    text, codes = reference.logits(ids, heard, start=start)
    batch = collate([sample], rules=talker.processor.rules)
    if hears:
        (own,) = talker.model.hear(batch.clips)
        assert len(own) == 300  # the silence of the window is heard as well
        assert_close(own, heard)
    output = talker.model(batch.grid, places=batch.places, clips=batch.clips)
    assert_close(output.text_logits[0], text)
    assert_close(output.code_logits[0], codes)


@torch.no_grad()
def test_greedy_replies_are_theirs(case, samples):
    talker, reference = case
    config = replace(talker.config, code_rule="free")  # the original draws ids that the delay rules out
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    message = {"role": "user", "content": [{"type": "audio", "audio": (samples, RATE)}]}
    sample = processor([message], task="speech_to_speech")
    decoder = Decoder(
        talker.model,
        rules=processor.rules,
        task=get_task("speech_to_speech"),
        text_end_ids=config.text_end_ids,
        settings=GenerationSettings(max_new_tokens=STEPS, batch_parallel=False),
    )
    said = [[int(step.text), *step.codes[0].tolist()] for step in decoder.run([sample])]
    heard = reference.hear(samples)
    ids = reference.prompt(SYSTEM["speech_to_speech"], heard=heard)
    assert said == reference.generate(ids, heard, start=sample.layout.spans[0].start)


def test_a_conversation_is_told_as_they_tell_it(case, samples):
    talker, _ = case
    sound = {"type": "audio", "audio": (samples, RATE)}
    messages = [
        {"role": "system", "content": "Be short. "},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": [sound]},
    ]
    (told, recording), _ = talker.processor.apply_chat_template(messages)
    text = "<SYSTEM>: Be short. \n <USER>: How are you? <ASSISTANT>: Fine.\n "
    assert talker.tokenizer.decode(told.ids) == text
    assert recording.num_steps == 300
    with pytest.raises(PromptError, match="put recordings into user turns"):
        talker.processor.apply_chat_template([*messages, {"role": "user", "content": "And now?"}])


def test_it_speaks_in_every_way(case, samples):
    talker, _ = case
    for options in ({}, {"batch_parallel": False}, {"speak": False}):
        reply = talker.chat((samples, RATE), max_new_tokens=16, **options)
        assert reply.steps
        assert bool(len(reply.audio)) == options.get("speak", True)
    assert len(talker.say("Good morning.", max_new_tokens=16).audio)
    assert talker.transcribe((samples, RATE), max_new_tokens=8).steps


def test_parts_are_named_and_the_base_stays_inside(case, parts, tmp_path):
    talker, _ = case
    config = talker.config
    assert config.base.id == "./base"
    assert config.encoder.id == str(parts["encoder"])
    assert config.codec.id == str(parts["codec"])
    assert config.audio_adapter.stack == STACK
    assert config.text_end_ids == (SMALL.text_ids + END,)
    assert talker.model.backbone.vocab_size == SMALL.text_rows


def test_all_weights_or_a_second_process_make_no_difference(tmp_path, parts, caplog):
    """Files with every weight hold a tied table twice; some wrappers prefix all names."""
    state = trained_state(tied=True)
    state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
    state["tts_adapter.h.0.norm_1.weight"] = torch.ones(4)
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    with caplog.at_level(logging.WARNING):
        full = imported(tmp_path / "full.pt", parts, state=state)
    assert "1 tensors that the original never runs are left out, such as tts_adapter.h.0" in caplog.text
    plain = imported(tmp_path / "plain.pt", parts, state=trained_state(tied=True))
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name
    half = imported(tmp_path / "plain.pt", parts, dtype="bfloat16")
    assert half.model.code_heads.proj.weight.dtype == half.model.backbone.dtype == torch.bfloat16


ONE = torch.ones(1)
LINEAR, TABLE = "encoder_projector.linear1", "llm.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        ({"group_decode_adapter.linear.weight": ONE}, ConfigError, "writes codes in groups"),
        ({"encoder.conv1.bias": ONE}, ConfigError, "audio encoder was trained too"),
        ({"llm.base_model.model.x.lora_A.default.weight": ONE}, ConfigError, "trained with LoRA"),
        ({"encoder_projector.conv1d.weight": ONE}, ConfigError, "projector is cov1d-linear"),
        ({"vision.weight": ONE}, CheckpointError, r"holds vision\.weight, which no SLAM-Omni has"),
        ({"llm.model.norm.weight": ONE / 0}, CheckpointError, "holds NaN or infinity in: llm"),
        ({f"{LINEAR}.weight": torch.ones(40, 33)}, CheckpointError, "takes 33 numbers, .* frames have 32"),
        ({TABLE: torch.ones(900, 32)}, CheckpointError, "has 900 rows, of which the codec's ids take 896"),
        ({TABLE: torch.ones(1409, 32)}, CheckpointError, "has 449 text ids .* the base has 448"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(tmp_path, parts, add, error, message):
    with pytest.raises(error, match=message):
        imported(tmp_path / "model.pt", parts, state=trained_state(tied=True) | add)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("llm.", r"holds no language model \(llm\.\*\): it was frozen"),
        ("encoder_projector.", "holds no projector"),
        (TABLE, r"holds no llm\.model\.embed_tokens\.weight, where the ids of the codes are"),
        (f"{LINEAR}.bias", r"the projector must be linear1\.weight, linear1\.bias"),
        ("llm.model.norm", r"missing: model\.norm\.weight"),
    ],
)
def test_what_is_no_whole_talker_is_refused(tmp_path, parts, prefix, message):
    state = {name: value for name, value in trained_state(tied=True).items() if not name.startswith(prefix)}
    with pytest.raises(CheckpointError, match=message):
        imported(tmp_path / "model.pt", parts, state=state)


def test_a_head_of_its_own_does_not_fit_a_base_whose_head_is_tied(tmp_path, parts):
    state = trained_state(tied=True)
    state["llm.lm_head.weight"] = state[TABLE] + 1
    with pytest.raises(CheckpointError, match=r"llm\.lm_head\.weight, which the base ties to .*embed_tokens"):
        imported(tmp_path / "model.pt", parts, state=state)


def test_folders_without_the_file_and_files_of_another_form(tmp_path, parts):
    with pytest.raises(CheckpointError, match="must hold tensors by name"):
        imported(tmp_path / "nested.pt", parts, state={"model": trained_state(tied=True)})
    with pytest.raises(CheckpointError, match=r"holds no model\.pt; pass the folder or Hub id that has it"):
        imported(tmp_path, parts)
    torch.save({"llm.x": Path}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        imported(tmp_path, parts)
