"""The world of the tiny talker: what is held out stays out, and its speech is real and repeatable."""

import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_adapter.data.rows import read_row

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_talker"
sys.path.append(str(FOLDER))

import build_world  # noqa: E402
import voices  # noqa: E402
import world  # noqa: E402

TRAIN, HELD_OUT = world.records("train"), world.records("heldout")
KINDS = tuple(dict.fromkeys(pair.kind for pair in world.pairs()))
programs = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite or espeak-ng is not installed"
)


def texts(record: world.Record) -> list[str]:
    return [*(turn.content for turn in record.turns), record.question, record.answer]


def words_of(records: tuple[world.Record, ...]) -> set[str]:
    return {word for record in records for text in texts(record) for word in text.split()}


# ---- texts


def test_the_world_is_the_same_in_every_process():
    code = "import world; print([record.as_row() for record in world.records('heldout')] == eval(input()))"
    rows = repr([record.as_row() for record in HELD_OUT])
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, input=rows, env={"PYTHONHASHSEED": "7"}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert run.stdout == "True\n"


def test_size():
    assert 3000 <= len(world.pairs()) <= 5000
    assert 6000 <= len(TRAIN) <= 9000
    assert 200 <= len(world.vocabulary()) <= 350
    assert all(1 <= len(record.answer.split()) <= 10 for record in (*TRAIN, *HELD_OUT))


def test_keys_and_ids_are_unique():
    assert len({pair.key for pair in world.pairs()}) == len(world.pairs())
    ids = [record.id for record in (*TRAIN, *HELD_OUT)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pair_in_ten_of_each_kind_is_held_out(kind):
    keys = [pair.key for pair in world.pairs() if pair.kind == kind and not pair.fact]
    share = len(world.held_out() & set(keys)) / len(keys)
    assert world.HELD_OUT * 0.8 <= share <= (0.35 if kind.startswith("two turns") else world.HELD_OUT * 1.2)
    assert {record.pair for record in HELD_OUT if record.kind == kind} == world.held_out() & set(keys)


def test_no_fact_is_held_out():
    assert not world.held_out() & {pair.key for pair in world.pairs() if pair.fact}


def test_no_held_out_pair_is_in_training():
    assert not {record.pair for record in TRAIN} & {record.pair for record in HELD_OUT}
    asked = {(record.turns, record.question) for record in TRAIN}
    assert not asked & {(record.turns, record.question) for record in HELD_OUT}


def test_no_earlier_turn_of_training_asks_what_is_held_out():
    held_out = {exchange.question for pair in world.pairs() if pair.key in world.held_out() and not pair.uses
                for exchange in pair.exchanges if not exchange.turns}  # fmt: skip
    assert len(held_out) > 300
    assert not held_out & {turn.content for record in TRAIN for turn in record.turns}
    assert not held_out & set(world.sentences())


def options(record: world.Record) -> tuple[str, ...] | None:
    """What a question combines, read from its words alone, in no order; None where it is no sum or choice."""
    content = record.question.split()
    for between in ("plus", "or"):
        if not record.turns and content.count(between) == 1 and content[0] != "and":
            at = content.index(between)
            return tuple(sorted((content[at - 1], content[-1])))
    return None


@pytest.mark.parametrize("kind", ["plus", "comparison", "day", "month"])
def test_swapping_the_order_finds_no_held_out_pair_in_training(kind):
    trained, held_out = (
        {options(record) for record in split if record.kind == kind} - {None} for split in (TRAIN, HELD_OUT)
    )
    assert held_out
    assert not trained & held_out


def test_orders_of_numbers_are_right_and_hold_no_held_out_pair():
    orders = world.number_orders()
    place = {name: index for index, name in enumerate(world.NUMBERS)}
    for order in orders:
        _, _, _, relation, *named = order["question"].split()
        answer = order["answer"].split()[0]
        if relation in ("after", "before"):
            assert place[answer] - place[named[0]] == (1 if relation == "after" else -1)
            pair = (named[0], answer)
        else:
            pair = (named[0], named[2])
            assert answer == (min if relation == "first" else max)(pair, key=place.__getitem__)
        assert world._key("comparison", *pair) not in world.held_out()
    asked = {order["question"] for order in orders}
    assert {"which number comes first six or two", "which number comes after three"} <= asked
    assert len(asked) == len(orders) > 700


def test_no_sum_of_two_turns_in_training_needs_a_held_out_sum():
    for record in TRAIN:
        if record.kind == "two turns sum":
            first = record.turns[0].content.split()
            total, (_, word, step) = record.turns[1].content.split()[-1], record.question.split()
            assert world._plus_key(world.NUMBERS.index(first[2]), world.NUMBERS.index(first[4])) not in (
                world.held_out()
            )
            assert world._key(word, total, step) not in world.held_out()


def test_answers_are_right():
    number = {word: value for value, word in enumerate(world.NUMBERS)}
    checked = 0
    for record in (*TRAIN, *HELD_OUT):
        asked, answer = record.question.split(), record.answer.split()
        if record.kind == "plus":
            assert number[answer[-1]] == number[asked[-3]] + number[asked[-1]]
        elif record.kind == "minus":
            numbers = [number[word] for word in asked if word in number]
            assert number[answer[-1]] == numbers[0] - numbers[1]
        elif record.kind == "two turns sum":
            before, step = number[record.turns[-1].content.split()[-1]], number[asked[-1]]
            assert number[answer[-1]] == before + (step if "plus" in asked else -step)
        elif record.kind == "comparison":
            numbers = [number[word] for word in asked if word in number]
            assert number[answer[0]] == (max if "bigger" in asked else min)(numbers)
        elif record.kind == "counting":
            values = [number[word] for word in answer]
            assert (values[0], values[-1]) == (number[asked[-3]], number[asked[-1]])
            assert {abs(b - a) for a, b in pairwise(values)} == {1}
        elif record.kind == "spelling":
            assert "".join(answer) == "".join(word for word in asked if word in world.SPELLED)
        else:
            continue
        checked += 1
    assert checked > 2500


def test_a_question_has_one_answer():
    answers: dict[object, set[str]] = {}
    for record in (*TRAIN, *HELD_OUT):
        answers.setdefault((record.turns, record.question), set()).add(record.answer)
    assert {len(found) for found in answers.values()} == {1}


def test_choices_stand_in_either_order():
    right_first = [
        record.question.split("is bigger ")[1].split()[0] == record.answer.split()[0]
        for record in TRAIN
        if record.question.startswith("which is bigger")
    ]
    assert 0.4 < np.mean(right_first) < 0.6


def test_every_word_is_lower_case_and_learned_in_training():
    assert all(word.isascii() and word.isalpha() and word.islower() for word in world.vocabulary())
    assert words_of(HELD_OUT) <= words_of(TRAIN) == set(world.vocabulary())
    answered = {word for record in TRAIN for word in record.answer.split()}
    assert {word for record in HELD_OUT for word in record.answer.split()} <= answered


def test_no_two_words_of_answers_sound_the_same():
    get_model_path = pytest.importorskip("pocketsphinx").get_model_path
    words = {word for record in (*TRAIN, *HELD_OUT) for word in record.answer.split()}
    sounds: dict[str, set[str]] = {}
    for line in Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines():
        word, _, sound = line.partition(" ")
        if word.split("(")[0] in words:
            sounds.setdefault(sound, set()).add(word.split("(")[0])
    assert [found for found in sounds.values() if len(found) > 1] == []
    assert words <= set().union(*sounds.values())


def test_the_table_is_printed(capsys):
    world.main()
    assert f"{len(world.vocabulary())} words" in capsys.readouterr().out


# ---- speech


def test_roles_of_the_voices():
    assert voices.ANSWER.name == "flite:slt"
    assert not set(voices.SEEN) & set(voices.UNSEEN)
    for group in (voices.SEEN, voices.UNSEEN):
        assert {voice.program for voice in group} == set(voices.LICENSES)
        assert {voice.sex for voice in group} == {"female", "male"}


@programs
@pytest.mark.parametrize("voice", [voices.ANSWER, *voices.UNSEEN], ids=lambda voice: voice.name)
def test_a_voice_speaks_at_its_rate_and_speed(voice):
    samples, rate = voices.speak("hello anna", voice)
    slow, _ = voices.speak("hello anna", voice, speed=0.7)
    assert rate == voice.sampling_rate
    assert 0.3 < len(samples) / rate < 2
    assert len(slow) > 1.2 * len(samples)


def pitch_hz(samples: np.ndarray, rate: int) -> float:
    """Median frequency at which voiced stretches of 40 ms repeat themselves."""
    width, found = round(0.04 * rate), []
    for start in range(0, len(samples) - width, width // 2):
        part = samples[start : start + width] - samples[start : start + width].mean()
        alike = np.correlate(part, part, "full")[width - 1 :]
        lag = rate // 400 + int(alike[rate // 400 : rate // 60].argmax())
        if alike[lag] > 0.6 * alike[0] > 1e-3:
            found.append(rate / lag)
    return float(np.median(found))


@programs
@pytest.mark.parametrize("name", ["flite:slt", "espeak-ng:en-us+f2"])
def test_pitch_is_a_factor(name):
    voice = voices.voice_named(name)
    low, high = (pitch_hz(*voices.speak("hello anna how are you", voice, pitch=p)) for p in (0.85, 1.2))
    assert 1.25 < high / low < 1.6


@programs
def test_a_word_that_is_read_out_sounds_alike_wherever_it_stands():
    say = partial(voices.read_out, voice=voices.ANSWER, sampling_rate=24_000, multiple=2048)
    two, three = say("two"), say("three")
    assert len(two) % 2048 == len(three) % 2048 == 0
    assert 0.3 < len(three) / 24_000 < 1
    np.testing.assert_array_equal(say("two three two"), np.concatenate((two, three, two)))


@programs
@pytest.mark.parametrize("voice", [voices.SEEN[0], voices.SEEN[-1]], ids=lambda voice: voice.name)
def test_questions_are_seeded_and_do_not_clip(voice):
    def ask(seed: int) -> np.ndarray:
        rng = voices.generator(seed)
        return voices.ask("what is two plus three", voices.draw_manner(voice, rng), rng)

    first, again, other = ask(0), ask(0), ask(1)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other)
    for samples in (first, other):
        assert 10 ** (-31 / 20) < np.abs(samples).max() < 10 ** (-2.9 / 20)
        assert 0.8 < len(samples) / voices.QUESTION_RATE < 4


@pytest.mark.parametrize("color", ["white", "pink"])
def test_noise_has_unit_power_and_its_color(color):
    samples = voices.noise(1 << 15, voices.generator(color), color=color)
    power = np.abs(np.fft.rfft(samples)) ** 2
    octaves = [power[1 << k : 2 << k].sum() for k in (8, 13)]
    assert np.mean(samples**2) == pytest.approx(1, rel=1e-3)
    assert octaves[1] / octaves[0] == pytest.approx(1 if color == "pink" else 32, rel=0.3)


def test_trim_leaves_a_margin():
    tone = np.sin(np.arange(1600) + 1).astype(np.float32)
    for silence in (0, 50, 4000):
        trimmed = voices.trim(np.pad(tone, silence), 16_000, margin_s=0.01)
        assert abs(len(trimmed) - 1920) <= 4
    assert len(voices.trim(np.zeros(100, np.float32), 16_000, margin_s=0.01)) == 0


def test_the_table_of_voices_is_printed(capsys):
    voices.main()
    table = capsys.readouterr().out
    assert all(voice.name in table for voice in voices.VOICES)


# ---- the folder


@pytest.fixture
def small(monkeypatch):
    """A world of a few records."""
    world.sentences()  # is kept; not of the few
    lists = {name: getattr(world, name)(3) for name in ("dictations", "readings")}
    codec_clips, few = build_world.codec_clips, {"train": TRAIN[:3], "heldout": HELD_OUT[:2]}
    monkeypatch.setattr(world, "records", few.__getitem__)
    monkeypatch.setattr(world, "vocabulary", lambda: ("one", "moon"))
    for name, few_lists in lists.items():
        monkeypatch.setattr(world, name, lambda few_lists=few_lists: few_lists)
    monkeypatch.setattr(build_world, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(build_world, "codec_clips", lambda out: codec_clips(out, 1))


class InProcess:
    """Runs in this process what a pool would."""

    def __init__(self, max_workers: int) -> None:
        self.max_workers = max_workers

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function, items, chunksize):
        return map(function, items)


@programs
def test_the_folder_holds_rows_that_the_recipes_read(small, tmp_path, capsys):
    build_world.build(tmp_path, renditions=2)
    rows = [json.loads(line) for line in (tmp_path / "rows_train.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert len({row["id"] for row in rows}) == 6
    assert len({row["voice"] for row in rows if row["text_in"] == rows[0]["text_in"]}) == 2
    for row in rows:
        parsed = read_row({**row, "task": "speech_to_speech"}, root=tmp_path)
        assert parsed.text_in == row["text_in"]
        assert len(parsed.turns) == len(row["turns"])
        question, answer = (soundfile.info(tmp_path / row[name]) for name in ("audio_in", "audio_out"))
        assert (question.samplerate, answer.samplerate) == (16_000, 24_000)
        assert (question.channels, answer.channels) == (1, 1)
    seen, unseen = (
        {
            json.loads(line)["voice"]
            for line in (tmp_path / f"rows_heldout_{name}.jsonl").read_text().splitlines()
        }
        for name in ("seen", "unseen")
    )
    assert seen <= {voice.name for voice in voices.SEEN}
    assert unseen <= {voice.name for voice in voices.UNSEEN}
    assert sorted(json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])) == sorted(
        ["id", "kind", "pair", "turns", "question", "answer"]
    )


@programs
def test_some_kinds_are_taught_in_more_voices(small, tmp_path, monkeypatch, capsys):
    kind = TRAIN[0].kind
    monkeypatch.setattr(build_world, "MORE_RENDITIONS", {kind: 4})
    build_world.build(tmp_path, renditions=2)
    train, taught = (
        [json.loads(line) for line in (tmp_path / f"rows_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "taught")
    )
    assert taught[: len(train)] == train
    more = taught[len(train) :]
    assert {row["kind"] for row in more} == {kind}
    assert len(more) == 2 * sum(record.kind == kind for record in TRAIN[:3])
    assert len({row["id"] for row in taught}) == len(taught)
    assert len({row["voice"] for row in taught if row["text_in"] == more[0]["text_in"]}) == 4
    assert all((tmp_path / row["audio_in"]).is_file() for row in taught)


def test_what_is_written_is_drawn_as_the_language_model_drew_it():
    rows = list(build_world.written_rows(3000))
    assert rows == list(build_world.written_rows(3000))
    assert len({row["id"] for row in rows}) == len(rows)
    kinds = {lesson["question"]: lesson["kind"] for lesson in world.lessons()}
    chances = world.chances([lesson["kind"] for lesson in world.lessons()])
    counted = sum(
        chance
        for lesson, chance in zip(world.lessons(), chances, strict=True)
        if lesson["kind"] == "counting"
    )
    share = sum(kinds[row["text_in"]] == "counting" for row in rows) / len(rows)
    assert share == pytest.approx(counted / sum(chances), rel=0.15)


@programs
def test_a_stopped_build_goes_on_and_changes_nothing(small, tmp_path, capsys):
    build_world.build(tmp_path, renditions=1)
    wavs = sorted(tmp_path.rglob("*.wav"))
    before = {path: path.read_bytes() for path in wavs}
    kept = wavs[0].stat().st_mtime_ns
    wavs[-1].unlink()
    capsys.readouterr()
    build_world.build(tmp_path, renditions=1)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.wav"))} == before
    assert wavs[0].stat().st_mtime_ns == kept
    assert capsys.readouterr().out.count("; 1 new") == 1
    assert not list(tmp_path.rglob("*.part"))
