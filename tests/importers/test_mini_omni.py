"""The Mini-Omni importer against a reference in plain PyTorch, on checkpoints of the published layout."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import soundfile
import torch
from torch import Tensor

from examples.untrained_talker import make_parts, make_snac
from omni_adapter import OmniAdapter, SnacCodec
from omni_adapter.data.collator import collate
from omni_adapter.data.layout import get_task
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.importers import ImportOptions, import_talker
from tests.importers.mini_omni_checkpoint import (
    SMALL,
    Size,
    lit_config,
    lit_state,
    whisper_checkpoint,
    write_checkpoint,
)
from tests.importers.reference_mini_omni import ANSWER, ASR, END, PAD, ROWS, Reference

TEXT = "What is the capital of France?"
RATE = 16_000
KINDS = [
    pytest.param(replace(SMALL, tie_word_embeddings=True), id="tied"),
    pytest.param(replace(SMALL, post_adapter=True), id="untied, post_adapter"),
    pytest.param(SMALL, id="untied", marks=pytest.mark.slow),
    pytest.param(
        replace(SMALL, tie_word_embeddings=True, post_adapter=True),
        id="tied, post_adapter",
        marks=pytest.mark.slow,
    ),
]
STEPS = 24


class Case(NamedTuple):
    """An imported checkpoint beside the reference, and what the reference hears."""

    talker: OmniAdapter
    reference: Reference
    heard: Tensor


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """Folder of a small codec with the rows of the published one and 64 codes each."""
    folder = tmp_path_factory.mktemp("codec")
    SnacCodec.from_model(make_parts().snac).save_pretrained(folder)
    return str(folder)


def imported(folder, codec, samples: Tensor, size: Size, state: dict[str, Tensor] | None = None) -> Case:
    """Write a checkpoint, import it, save it, load it."""
    state = lit_state(size) if state is None else state
    source = write_checkpoint(folder / "published", size, state=state)
    import_talker("mini-omni", source, options=ImportOptions(codec=codec)).save_pretrained(folder / "talker")
    reference = Reference(state, lit_config(size), whisper_checkpoint(size.whisper_adapter_dim))
    return Case(OmniAdapter.from_pretrained(folder / "talker"), reference, reference.hear(samples))


@pytest.fixture(scope="module")
def samples(question) -> Tensor:
    """Half a second of real speech at 16 kHz."""
    values, rate = soundfile.read(question, dtype="float32")
    return torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=int(len(values) * RATE / rate), mode="linear"
    )[0, 0][4_000:12_123]


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory, codec, samples) -> Case:
    return imported(tmp_path_factory.mktemp("case"), codec, samples, request.param)


def assert_close(one: Tensor, other: Tensor) -> None:
    """Within 1e-4 of the largest number."""
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


def prompts(case: Case) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Streams of each task's prompt in the original, with what was heard."""
    reference = case.reference
    heard = case.heard
    ids = case.talker.tokenizer(TEXT)["input_ids"]

    def spoken(last_code: int, last_text: int) -> tuple[Tensor, Tensor]:
        return reference.speech_prompt(len(heard), last_code=last_code, last_text=last_text), heard

    return {
        "speech_to_speech": spoken(ANSWER, ANSWER),
        "speech_to_text": spoken(PAD, ANSWER),
        "asr": spoken(PAD, ASR),
        "text_to_speech": (reference.text_prompt(ids, last_code=ANSWER), None),
        "text_to_text": (reference.text_prompt(ids, last_code=PAD), None),
    }


TASKS = ("speech_to_speech", "speech_to_text", "asr", "text_to_speech", "text_to_text")


def sample_of(case: Case, samples: Tensor, task: str):
    """The same prompt as our processor lays it out."""
    hears = get_task(task).hears
    content = [{"type": "audio", "audio": (samples.numpy(), RATE)}] if hears else TEXT
    return case.talker.processor([{"role": "user", "content": content}], task=task)


def as_grid(case: Case, streams: Tensor) -> Tensor:
    """Joint ids [8, T] as ids of their own rows."""
    config = case.reference.config
    offsets = torch.arange(ROWS)[:, None] * config["audio_vocab_size"] + config["text_vocab_size"]
    return torch.cat((streams[:ROWS] - offsets, streams[ROWS:]))


def decode(case: Case, samples: Tensor, task: str, **settings) -> list[list[int]]:
    """[text, codes] of each step of a greedy reply."""
    talker = case.talker
    decoder = Decoder(
        talker.model,
        rules=talker.processor.rules,
        task=get_task(task),
        text_end_ids=talker.config.text_end_ids,
        settings=GenerationSettings(**{"max_new_tokens": STEPS, **settings}),
    )
    steps = decoder.run([sample_of(case, samples, task)])
    return [[int(step.text), *step.codes[0].tolist()] for step in steps]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_logits_are_the_originals(case, samples, task):
    streams, heard = prompts(case)[task]
    sample = sample_of(case, samples, task)
    assert torch.equal(sample.layout.grid, as_grid(case, streams))
    text, codes = case.reference.logits(streams[None], heard)
    batch = collate([sample], rules=case.talker.processor.rules)
    with torch.inference_mode():
        output = case.talker.model(batch.grid, places=batch.places, clips=batch.clips)
    assert_close(output.text_logits, text)
    assert_close(output.code_logits, codes)


def test_steps_of_a_batch_in_parallel_are_the_originals(case, samples):
    """Prompt and eight steps through the caches: codes from the first row, text from the second."""
    talker, reference = case.talker, case.reference
    streams, heard = prompts(case)["speech_to_speech"]
    silent, _ = prompts(case)["speech_to_text"]
    rows = torch.stack((streams, silent))
    decoder = Decoder(
        talker.model,
        rules=talker.processor.rules,
        task=get_task("speech_to_speech"),
        text_end_ids=talker.config.text_end_ids,
        settings=GenerationSettings(max_new_tokens=STEPS),
    )
    batch = collate([sample_of(case, samples, "speech_to_speech")], rules=talker.processor.rules)
    state = decoder.prefill(batch)
    assert [row.role for row in state.rows] == ["speech", "text"]
    for _ in range(8):
        text, codes = reference.logits(rows, heard)
        assert_close(state.text_logits[1], text[1, -1])
        assert_close(state.code_logits[0], codes[0, :, -1])
        step = decoder.choose(state)
        columns = [reference.column(ids, int(step.text)) for ids in (step.codes[0], None)]
        rows = torch.cat((rows, torch.stack(columns)), dim=-1)
        decoder.advance(state)


@pytest.mark.parametrize("task", ["speech_to_text", "asr", "text_to_text"])
def test_texts_are_the_originals(case, samples, task):
    streams, heard = prompts(case)[task]
    written = [step[0] for step in decode(case, samples, task)]
    end = case.talker.config.text_end_ids[0]
    assert [token for token in written if token != end] == case.reference.write(streams, heard, most=STEPS)


@pytest.mark.parametrize("task", ["speech_to_speech", "text_to_speech"])
@pytest.mark.parametrize("batch_parallel", [True, False])
def test_spoken_replies_are_the_originals(case, samples, task, batch_parallel):
    streams, heard = prompts(case)[task]
    speak = case.reference.speak_in_parallel if batch_parallel else case.reference.speak
    said = decode(case, samples, task, batch_parallel=batch_parallel)
    if (
        said[-1][-1] == case.talker.config.vocabulary.end
    ):  # the step that ends speech, which the original drops
        said = said[:-1]
    assert said == speak(streams, heard, most=STEPS)


def swap(state: dict[str, Tensor], head: str, one: int, other: int) -> None:
    """Let a head write an id where it wrote another one."""
    weights = state[head]
    weights[[one, other]] = weights[[other, one]]


def first_new(ids: list[int], *, start: int) -> int:
    """First step from ``start`` on whose id did not come before."""
    return next(step for step in range(start, len(ids)) if ids[step] not in ids[:step])


@pytest.mark.parametrize(
    ("post_adapter", "batch_parallel", "seed"),
    [(False, True, 9), (True, True, 11), pytest.param(False, False, 9, marks=pytest.mark.slow)],
)
def test_replies_end_where_the_originals_do(tmp_path, codec, samples, post_adapter, batch_parallel, seed):
    """A text ends alone; the end mark of the last code row ends the reply, whatever the other rows do."""
    size = replace(SMALL, post_adapter=post_adapter)
    state, config = lit_state(size, seed=seed), lit_config(size)
    reference = Reference(state, config, whisper_checkpoint(size.whisper_adapter_dim))
    heard = reference.hear(samples)
    streams = reference.speech_prompt(len(heard), last_code=ANSWER, last_text=ANSWER)
    speak = reference.speak_in_parallel if batch_parallel else reference.speak
    said = speak(streams, heard, most=STEPS)
    text_step = first_new([step[0] for step in said], start=1)
    swap(state, "lm_head.weight", said[text_step][0], reference.text_mark + END)
    said = speak(streams, heard, most=STEPS)  # from the text's end on another text is read
    last = first_new([step[-1] for step in said], start=text_step + 3)
    head = "transformer.post_adapter_audio_lm_head.weight" if post_adapter else "lm_head.weight"
    first_row = 6 * config["audio_vocab_size"] + (0 if post_adapter else config["text_vocab_size"])
    swap(state, head, first_row + said[last][-1], first_row + reference.code_mark + END)
    expected = speak(streams, heard, most=STEPS)
    assert len(expected) == last
    case = imported(tmp_path, codec, samples, size, state)
    ours = decode(case, samples, "speech_to_speech", batch_parallel=batch_parallel)
    assert ours[:-1] == expected
    assert (ours[-1][0], ours[-1][-1]) == (reference.text_mark + PAD, reference.code_mark + END)
    assert {step[0] for step in expected[text_step + 1 :]} == {reference.text_mark + PAD}


def parity_at(size: Size, folder, samples: Tensor) -> None:
    """Compare the logits of a spoken question and the first steps of the reply, at any size."""
    codec_folder = folder / "codec"
    SnacCodec.from_model(make_snac(codebook_size=size.audio_vocab_size - 64)).save_pretrained(codec_folder)
    case = imported(folder, str(codec_folder), samples, size)
    assert case.talker.model.backbone.vocab_size == size.text_vocab_size
    assert case.talker.config.text_end_ids == (size.text_vocab_size - 64,)
    streams, heard = prompts(case)["speech_to_speech"]
    text, codes = case.reference.logits(streams[None], heard)
    batch = collate([sample_of(case, samples, "speech_to_speech")], rules=case.talker.processor.rules)
    with torch.inference_mode():
        output = case.talker.model(batch.grid, places=batch.places, clips=batch.clips)
    assert_close(output.text_logits, text)
    assert_close(output.code_logits, codes)
    said = decode(case, samples, "speech_to_speech", max_new_tokens=8)
    assert said == case.reference.speak_in_parallel(streams, heard, most=8)


def test_published_tables_at_small_width(tmp_path, samples):
    """All 152000 + 7 x 4160 rows, with the ids of the released checkpoint."""
    parity_at(Size(n_layer=1, tie_word_embeddings=True), tmp_path, samples)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layers", "post_adapter"), [(24, False), (4, True)])
def test_published_width(tmp_path, samples, layers, post_adapter):
    """The released checkpoint's sizes; with the post_adapter fewer layers, to save memory."""
    size = Size(
        n_embd=896,
        n_head=14,
        n_query_groups=2,
        n_layer=layers,
        intermediate_size=4864,
        whisper_adapter_dim=768,
        tie_word_embeddings=True,
        post_adapter=post_adapter,
    )
    parity_at(size, tmp_path, samples)
