"""The tiny talker's language model and encoder: they learn, go on where they stopped, and fit together."""

import json
import random
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_talker"
sys.path.append(str(FOLDER))

import encoder as encoder_training  # noqa: E402
import lm as lm_training  # noqa: E402
import part_training  # noqa: E402
import world  # noqa: E402

from omni_adapter import OmniAdapter, SnacCodec  # noqa: E402
from omni_adapter.modules.audio_encoder import AudioEncoder  # noqa: E402

LM_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ENCODER_SIZES = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
SCHEDULE = part_training.Schedule(
    num_steps=8, learning_rate=5e-3, warmup_steps=2, weight_decay=0.1, check_every=4
)
TEXTS = ("what is one plus two", "spell owl", "good night", "say red house")
LISTS = ("owl night", "two rome", "house say", "rome", "owl", "night")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small parts, whose encoder soon turns from letters to words, and no bars."""
    logging.disable_progress_bar()
    for name, value in LM_SIZES.items():
        monkeypatch.setitem(lm_training.SIZES, name, value)
    for name, value in ENCODER_SIZES.items():
        monkeypatch.setitem(encoder_training.SIZES, name, value)
    monkeypatch.setattr(lm_training, "ORDER_STEPS", 3)
    monkeypatch.setattr(encoder_training, "FLAT_STEPS", 3)
    monkeypatch.setattr(encoder_training, "LETTER_STEPS", 6)


@pytest.fixture(scope="module")
def tokenizer():
    return lm_training.make_tokenizer(world.vocabulary())


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory, question) -> Path:
    """A slice of the world: some records of each split, and a real voice that asks."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for split, count in (("train", 60), ("heldout", 20)):
        records = [json.dumps(record.as_row()) for record in world.records(split)[:count]]
        (folder / f"{split}.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    samples, rate = soundfile.read(question)
    for index, text in enumerate(TEXTS):
        part = samples[index * 1000 : len(samples) - 2000 + index * 500]
        soundfile.write(folder / f"{index}.wav", part, rate)
        rows.append(json.dumps({"audio_in": f"{index}.wav", "text_in": text}))
    for name in ("train", "heldout_seen", "heldout_unseen"):
        (folder / f"rows_{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    lists = [{"audio_in": f"{i % 4}.wav", "text_in": text} for i, text in enumerate(LISTS)]
    (folder / "rows_dictation.jsonl").write_text("\n".join(map(json.dumps, lists)), encoding="utf-8")
    return folder


@pytest.fixture
def clips(world_folder) -> encoder_training.Clips:
    log_mel = encoder_training.make_encoder().log_mel()
    return encoder_training.Clips(encoder_training.read_clips(world_folder / "rows_train.jsonl"), log_mel)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(a, b) for (name, a), (again, b) in pairs)


# ---- tokenizer


def test_every_word_of_the_world_is_one_token(tokenizer):
    assert [word for word in world.vocabulary() if len(tokenizer.encode(word)) != 1] == []


def test_texts_of_the_world_come_back_as_they_were(tokenizer):
    for record in (*world.records("heldout"), *world.records("train")[:500]):
        ids = tokenizer.encode(record.question)
        assert len(ids) == len(record.question.split())
        assert tokenizer.decode(ids) == record.question


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("What's 7 + 12?", "what is seven plus twelve"),
        ("I'm Anna, and I'm happy!", "i am anna and i am happy"),
        ("20 - 3", "twenty minus three"),
        ("  Hello,\n\nWorld  ", "hello world"),
        ("Zürich 東京 😀", "zürich 東京 😀"),
        ("", ""),
    ],
)
def test_writing_is_put_into_the_form_of_the_world(tokenizer, written, read):
    assert tokenizer.decode(tokenizer.encode(written)) == read


def test_chat_template(tokenizer):
    turns = [
        {"role": "user", "content": "good night"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how are you"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>good night<|end|><|assistant|>hello<|end|><|user|>how are you<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 7 + 6
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == "good night hello how are you".split()


def test_chat_template_refuses_other_roles(tokenizer):
    with pytest.raises(Exception, match="the roles are system, user and assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "hello"}], tokenize=False)


# ---- lessons


@pytest.fixture(scope="module")
def lessons(tokenizer):
    """Everything that the LM learns from."""
    records = [record.as_row() for record in world.records("train")]
    records += world.lessons()
    return lm_training.make_lessons(records, tokenizer)


def test_no_lesson_is_held_out(tokenizer, lessons):
    held_out = lm_training.make_lessons((r.as_row() for r in world.records("heldout")), tokenizer)
    assert {lesson.prompt for lesson in lessons} & {lesson.prompt for lesson in held_out} == set()
    assert {lesson.prompt for lesson in lessons} >= {
        lesson.prompt
        for lesson in lm_training.make_lessons((r.as_row() for r in world.records("train")), tokenizer)
    }


def test_long_counts_go_on_where_the_world_stops():
    counts = {record["question"]: record["answer"] for record in world.long_counts()}
    assert counts["count from nine until three"] == "nine eight seven six five four three"
    assert "count from three until eight" not in counts
    assert "please count from zero until twenty" in counts


def test_days_and_months_are_gone_through_in_order():
    counts = {record["question"]: record["answer"] for record in world.calendar_counts()}
    assert counts["count from may until march"] == "may april march"
    for question, answer in counts.items():
        first, last = answer.split()[0], answer.split()[-1]
        assert question.split()[-3:] == [first, "until", last]
        unit = "day" if first in world.DAYS else "month"
        assert world._key(unit, first, last) not in world.held_out()
    assert len(counts) == len(world.calendar_counts()) > 250


def test_rare_and_hard_kinds_are_drawn_more_often():
    kinds = ["color"] * 100 + ["work"] * 25 + ["day"] * 25
    chances = world.chances(kinds)
    assert sum(chances[:100]) == pytest.approx(10)
    assert sum(chances[100:125]) == pytest.approx(5)
    assert sum(chances[125:]) == pytest.approx(5 * world.HARDER["day"])


def make_training(lm, lessons, tokenizer, **settings):
    words = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    marks = lm_training.Marks.of(tokenizer)
    return lm_training.LmTraining(lm, lessons, tokenizer.pad_token_id, marks, words, **settings)


def lesson_of(tokenizer, question: str, answer: str, turns=()):
    record = {"kind": "any", "turns": turns, "question": question, "answer": answer}
    (lesson,) = lm_training.make_lessons([record], tokenizer)
    return lesson


def test_drawing_out_keeps_words_and_their_order(tokenizer):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    lesson = lesson_of(tokenizer, "what is one plus two", "the answer is three", turns)
    marks = lm_training.Marks.of(tokenizer)
    lengths = set()
    for seed in range(20):
        drawn_out = marks.draw_out(lesson, random.Random(seed))
        start, after = drawn_out.drawn_out
        said = [i for i in drawn_out.prompt[start:after] if i != marks.pause]
        assert tokenizer.decode([i for i, _ in groupby(said)]) == "what is one plus two"
        assert drawn_out.prompt[:start] == lesson.prompt[: len(lesson.prompt) - 2 - 5]
        assert drawn_out.prompt[after:] == lesson.prompt[-2:]
        assert drawn_out.answer == lesson.answer
        lengths.add(after - start)
    assert min(lengths) >= 5
    assert len(lengths) > 5


def test_what_is_repeated_comes_after_its_own_mark(tokenizer):
    marks = lm_training.Marks.of(tokenizer)
    lesson = lesson_of(tokenizer, "what is one plus two", "the answer is three")
    repeated = marks.repeating(lesson.prompt[slice(*marks.question(lesson))])
    assert tokenizer.decode(repeated.prompt) == "<|user|> what is one plus two<|end|><|repeat|>"
    assert tokenizer.decode(repeated.answer) == "what is one plus two<|end|>"


def test_lessons_come_as_they_are_drawn_out_and_to_be_repeated(tokenizer, lessons):
    training = make_training(lm_training.make_lm("llama", tokenizer), lessons, tokenizer)
    chance = random.Random(0)
    varied = [training.vary(lesson, chance) for lesson in lessons[:1000]]
    repeated = [v for v in varied if v.kind == "repeated"]
    plain = [v for v in varied if v in set(lessons)]
    assert abs(len(repeated) / 1000 - lm_training.REPEATED_SHARE) < 0.05
    assert abs(len(plain) / 1000 - (1 - lm_training.REPEATED_SHARE - lm_training.DRAWN_OUT_SHARE)) < 0.05
    lists = [v for v in repeated if set(v.answer[:-1]) <= set(training.words)]
    assert abs(len(lists) / len(repeated) - lm_training.LISTED_SHARE) < 0.1
    batch = lm_training.make_batch(varied[:50], pad=tokenizer.pad_token_id)
    assert not batch.weights[batch.drawn_out].any()
    assert batch.drawn_out[[v.drawn_out != (0, 0) for v in varied[:50]]].any(-1).all()


def test_a_step_takes_the_same_lessons_every_time(tokenizer, lessons):
    lm = lm_training.make_lm("llama", tokenizer)
    one, other = (make_training(lm, lessons, tokenizer, seed=s) for s in (0, 1))
    assert torch.equal(one.batch(21).ids, one.batch(21).ids)
    assert one.batch(21).ids.shape != one.batch(22).ids.shape or not torch.equal(
        one.batch(21).ids, one.batch(22).ids
    )
    assert not torch.equal(one.batch(21).ids[:, :4], other.batch(21).ids[:, :4])


def test_batches_weigh_answers(tokenizer):
    (lesson,) = lm_training.make_lessons(
        [{"kind": "any", "turns": [], "question": "what is one plus two", "answer": "the answer is three"}],
        tokenizer,
    )
    ids, weights, drawn_out = lm_training.make_batch([lesson], pad=tokenizer.pad_token_id)
    assert not drawn_out.any()
    assert tokenizer.decode(ids[0][weights[0] == 1]) == "the answer is three<|end|>"
    assert tokenizer.decode(ids[0][weights[0] == 0]) == "<|pad|>" * int((weights[0] == 0).sum())
    assert torch.allclose(weights[0, : len(lesson.prompt)], torch.tensor(lm_training.QUESTION_WEIGHT))


# ---- language model


@pytest.mark.parametrize("kind", lm_training.KINDS)
def test_the_lm_learns_and_goes_on_where_it_stopped(kind, world_folder, tmp_path):
    def train(name: str, until: int | None = None) -> None:
        schedule = replace(SCHEDULE, average=0.5)
        lm_training.train_lm(world_folder, tmp_path / name, kind=kind, schedule=schedule, until=until)

    train("straight")
    train("stopped", until=4)
    assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped-training" / "so-far" / "model.safetensors").is_file()
    train("stopped")
    straight, stopped = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("straight", "stopped"))
    assert straight.config.model_type == kind
    assert same_weights(straight, stopped)


def test_the_loss_of_the_lm_falls(world_folder, tokenizer, tmp_path):
    lessons = lm_training.make_lessons(lm_training.read_records(world_folder / "train.jsonl"), tokenizer)
    lm = lm_training.make_lm("llama", tokenizer)
    training = make_training(lm, lessons, tokenizer, batch_size=16)
    group = lm_training._GROUP  # its batches hold lessons of all lengths between them
    schedule = replace(SCHEDULE, num_steps=5 * group, check_every=5 * group)
    trainer = part_training.PartTrainer(lm, schedule=schedule, folder=tmp_path)
    losses = trainer.run(training.loss, lambda: "")
    assert sum(losses[-group:]) < 0.75 * sum(losses[:group])


def test_exact_match_is_what_greedy_decoding_does(world_folder, tokenizer, tmp_path):
    lessons = lm_training.make_lessons(lm_training.read_records(world_folder / "train.jsonl"), tokenizer)[:6]
    pad = tokenizer.pad_token_id
    lm = lm_training.make_lm("llama", tokenizer, hidden_size=64)
    training = make_training(lm, lessons[:3], tokenizer, batch_size=8)
    schedule = replace(SCHEDULE, num_steps=100, check_every=100)
    part_training.PartTrainer(lm, schedule=schedule, folder=tmp_path).run(training.loss, lambda: "")
    lm.eval()
    written = [
        tuple(lm.generate(torch.tensor([lesson.prompt]), max_new_tokens=12, do_sample=False)[0].tolist())
        for lesson in lessons
    ]
    right = [w == (*lesson.prompt, *lesson.answer) for w, lesson in zip(written, lessons, strict=True)]
    assert 0 < sum(right) < len(right)
    shares = lm_training.exact_match(lm, lessons, pad=pad, batch_size=4)
    assert shares["all"] == pytest.approx(sum(right) / len(right))


# ---- encoder


def test_the_encoder_learns_and_goes_on_where_it_stopped(world_folder, tmp_path):
    def train(name: str, until: int | None = None) -> dict[str, float]:
        return encoder_training.train_encoder(
            world_folder,
            tmp_path / name,
            schedule=SCHEDULE,
            lists_schedule=SCHEDULE,
            until=until,
            batch_size=4,
        )

    rates = train("straight")
    assert set(rates) == {"seen", "unseen", "lists"}
    for until in (4, 8, 12):
        train("stopped", until=until)
        assert not (tmp_path / "stopped").exists()
    train("stopped")
    straight, stopped = (AudioEncoder.from_pretrained(tmp_path / name) for name in ("straight", "stopped"))
    assert same_weights(straight, stopped)
    assert all(torch.equal(p, p.half().float()) for p in straight.parameters())


def test_a_reader_of_more_words_reads_those_that_it_knew_alike(world_folder, clips):
    reader = encoder_training.make_reader(clips.clips)
    recordings = encoder_training.read_recordings(world_folder, clips.log_mel)
    assert {name: len(found.clips) for name, found in recordings.train.items()} == {
        "questions": 4, "lists": 2, "alone": 3,
    }  # fmt: skip
    assert [clip.text for clip in recordings.heldout["lists"].clips] == ["owl night"]
    every = [clip for found in recordings.train.values() for clip in found.clips]
    wider = encoder_training.with_words_of(reader, every, seed=3)
    assert set(wider.word_list) - set(reader.word_list) == {"rome"}
    batch = encoder_training.make_batch(clips, [0])
    with torch.no_grad():
        scores, more = (one(batch.features, batch.lengths).words for one in (reader, wider))
    known = [0, *(1 + wider.word_list.index(word) for word in reader.word_list)]
    assert torch.equal(scores, more[..., known])


def test_sources_are_drawn_by_their_shares(clips):
    reader = encoder_training.make_reader(clips.clips)
    training = encoder_training.EncoderTraining(reader, clips, ((1, 0.75), (3, 0.25)))
    assert training.chances[0] == pytest.approx(0.75)
    assert training.chances[1:].sum() == pytest.approx(0.25)


@pytest.mark.parametrize("what", ["letters", "words"])
def test_the_encoder_learns_to_write_what_it_hears(what, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_training, "LETTER_STEPS", 0 if what == "words" else 100)
    reader = encoder_training.make_reader(clips.clips)
    training = encoder_training.EncoderTraining(reader, clips, batch_size=8)
    schedule = replace(SCHEDULE, num_steps=30, check_every=30)
    trainer = part_training.PartTrainer(reader, schedule=schedule, folder=tmp_path)
    losses = trainer.run(training.loss, lambda: "")
    assert reader.reads_words is (what == "words")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("reads_words", [True, False])
def test_a_recording_is_heard_the_same_alone_and_beside_others(reads_words, clips):
    reader = encoder_training.make_reader(clips.clips)
    reader.reads_words = reads_words
    together = encoder_training.transcribe(reader, clips)
    assert together == encoder_training.transcribe(reader, clips, batch_size=1)
    assert len(set(together)) > 1
    known = encoder_training.make_reader(clips.clips).word_list if reads_words else None
    assert known is None or {word for text in together for word in text.split()} <= set(known)


def test_letters_are_spread_over_the_frames(clips):
    batch = encoder_training.make_batch(clips, [1, 2])
    assert batch.texts == ("spell owl", "good night")
    spread = encoder_training.spread_letters(batch, torch.tensor([18, 5]), size=18)
    ids = encoder_training.letter_ids("spell owl")
    assert spread[0].tolist() == ids.repeat_interleave(2).tolist()
    assert spread[1].tolist() == encoder_training.letter_ids("go ih").tolist() + [0] * 13


def test_variations_differ_and_are_repeatable(clips):
    batch = encoder_training.make_batch(clips, [0, 1, 2, 3])
    one, again, other = (
        encoder_training.vary(batch, part_training.step_generator(0, step)) for step in (5, 5, 6)
    )
    assert torch.equal(one.features, again.features)
    assert one.features.shape != other.features.shape or not torch.equal(one.features, other.features)
    assert one.features.shape[-1] == int(one.lengths.max())
    ratio = one.lengths / batch.lengths
    assert bool(((ratio > 0.86) & (ratio < 1.16)).all())
    assert len(set(ratio.tolist())) > 1


def test_without_variation_the_features_stay(clips, monkeypatch):
    """Axes that are stretched by 1 are read from where they are written."""
    batch = encoder_training.make_batch(clips, [0, 3])
    monkeypatch.setattr(encoder_training, "SPEEDS", (1.0, 1.0))
    monkeypatch.setattr(encoder_training, "VOICES", (1.0, 1.0))
    monkeypatch.setattr(encoder_training, "CHANNEL", 0.0)
    monkeypatch.setattr(encoder_training, "MASKS", ())
    same = encoder_training.vary(batch, part_training.step_generator(0, 0))
    assert torch.allclose(same.features, batch.features, atol=1e-3)
    assert torch.equal(same.lengths, batch.lengths)


@pytest.mark.parametrize(
    ("said", "heard", "rate"),
    [
        (["one two three"], ["one two three"], 0.0),
        (["one two three"], ["one three"], 1 / 3),
        (["one two"], ["one four two"], 1 / 2),
        (["one two", "three"], ["one too", "three"], 1 / 3),
        (["one"], [""], 1.0),
    ],
)
def test_word_error_rate(said, heard, rate):
    assert encoder_training.word_error_rate(said, heard) == pytest.approx(rate)


def test_letters_are_numbered_after_the_blank():
    assert encoder_training.letter_ids("a b").tolist() == [2, 1, 3]
    assert set("".join(world.vocabulary())) <= set(encoder_training.LETTERS)


# ---- both in a talker


def test_the_parts_make_a_talker(world_folder, tmp_path, parts, question):
    schedule = replace(SCHEDULE, num_steps=1, check_every=1)
    lm_training.train_lm(world_folder, tmp_path / "lm", schedule=schedule)
    encoder_training.train_encoder(
        world_folder, tmp_path / "encoder", schedule=schedule, lists_schedule=schedule, batch_size=4
    )
    codec = SnacCodec.from_model(parts.snac)
    talker = OmniAdapter.wrap(tmp_path / "lm", encoder=tmp_path / "encoder", codec=codec, tts_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert tokenizer.decode(tokenizer.encode("What is 2 plus 3?")) == "what is two plus three"
    assert talker.config.text_end_ids[0] == tokenizer.eos_token_id
    reply = talker.transcribe(question, max_new_tokens=4)
    assert isinstance(reply.text, str)


def test_what_comes_out_is_the_average_of_the_weights(tmp_path):
    module = torch.nn.Linear(1, 1, bias=False)
    schedule = replace(SCHEDULE, num_steps=3, check_every=1, average=0.5)
    trainer = part_training.PartTrainer(module, schedule=schedule, folder=tmp_path)
    before: list[float] = []
    checked: list[float] = []

    def loss(step: int) -> torch.Tensor:
        before.append(module.weight.item())
        return (module.weight - 100).square().sum()

    trainer.run(loss, lambda: str(checked.append(module.weight.item())))
    first, second, third = (*before[1:], module.weight.item())
    averages = [first, (first + second) / 2, ((first + second) / 2 + third) / 2]
    assert checked == pytest.approx(averages)
    with trainer.averaged():
        assert module.weight.item() == checked[-1]
    assert module.weight.item() == third != checked[-1]


def test_the_schedule_rises_and_falls():
    rates = [SCHEDULE.rate(step) for step in range(SCHEDULE.num_steps + 1)]
    assert rates[0] == pytest.approx(SCHEDULE.learning_rate / 2)
    assert max(rates) == rates[1] == rates[2] == SCHEDULE.learning_rate
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(SCHEDULE.final_share * SCHEDULE.learning_rate)
