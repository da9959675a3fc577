"""Judge a talker of the tiny world: what it answers to questions it never met, in text and out loud.

    python examples/tiny_talker/evaluate.py --talker build/tiny/talker --world build/tiny/world \\
        --out build/tiny/report --lm build/tiny/lm --stages align=DIR adapt=DIR finetune=DIR

A talker and the held-out questions in; ``report.json``, ``report.md`` and ``index.html`` (players, plots)
out. Text answers count if every word is right. What is said counts by what pocketsphinx makes of the wav
(``judge.py``), beside what it makes of the synthesizer's own voice saying the right answer, and of that after
the codec: no reply can be expected to be clearer. Nothing that judges knows which answer is expected.

What the stages take from the text ability is little, and asking in writing is quick: it is measured with all
held-out questions.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from judge import SAMPLING_RATE, Clip, Interval, WordErrors, count_word_errors, share, transcribe_many
from page import Example, write_page, write_table

from omni_adapter import OmniAdapter
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.data.processor import Message
from omni_adapter.generation.streaming import Reply
from omni_adapter.hub import HubOptions, load_tokenizer
from omni_adapter.hub.files import read_datasets
from omni_adapter.hub.saving import save_card
from omni_adapter.model_card import CardFacts

VOICES = ("seen", "unseen")
MOST_STEPS = 160
"""Steps of a reply at most, 13 s of speech; the longest right answer takes a third of it."""

BATCH_SIZE = 32
TIMED_QUESTIONS = 12
EXAMPLES = 12
CARD_SAMPLES = 3
BARS: Mapping[str, float] = {
    "answer from text": 0.97,
    "answer from speech, seen voices": 0.92,
    "answer from speech, unseen voices": 0.70,
    "WER of the spoken reply above the codec's": 0.08,
    "WER of the codec above the synthesizer's": 0.05,
    "loss of text ability": 0.01,
    "replies that end by themselves": 1.0,
}
"""What a talker of the tiny world is meant to reach."""

AT_MOST = frozenset(name for name in BARS if "above" in name or "loss" in name)


class Question(NamedTuple):
    """A held-out question.

    Attributes:
        turns: earlier messages, as text.
        text: the question in words.
        answer: the one right answer.
        answer_wav: the answer in the synthesizer's own voice.
        wavs: the question as a recording, by key of ``VOICES``.
        voices: who asks it, likewise.
        codes: the answer in the codec's codes as rows of training have them, K lists; None if the world
            holds none.
    """

    id: str
    kind: str
    pair: str
    turns: tuple[Message, ...]
    text: str
    answer: str
    answer_wav: Path
    wavs: Mapping[str, Path]
    voices: Mapping[str, str]
    codes: Sequence[Sequence[int]] | None = None

    def written(self) -> list[Message]:
        """Return the conversation with the question in text."""
        return [*self.turns, {"role": "user", "content": self.text}]

    def spoken(self, voices: str) -> list[Message]:
        """Return the conversation with the question as a recording."""
        return [*self.turns, _recording(self.wavs[voices])]


def _recording(path: Path) -> Message:
    return {"role": "user", "content": [{"type": "audio", "audio": str(path)}]}


class World(NamedTuple):
    """Held-out questions, and every word that may occur."""

    questions: tuple[Question, ...]
    words: tuple[str, ...]


def read_world(folder: Path) -> World:
    """Read the held-out questions and the whole vocabulary from the folder of a world.

    Codes of the answers come from ``rows_heldout_seen_coded.jsonl``, if ``codec.py --encode`` has written it.

    Raises:
        FileNotFoundError: if the world was not built there.
    """
    rows = {voices: _read_lines(folder / f"rows_heldout_{voices}.jsonl") for voices in VOICES}
    by_id = {voices: {row["id"]: row for row in rows[voices]} for voices in VOICES}
    coded = folder / "rows_heldout_seen_coded.jsonl"
    codes = {row["id"]: row["codes_out"] for row in _read_lines(coded)} if coded.is_file() else {}
    questions = tuple(
        Question(
            id=row["id"],
            kind=row["kind"],
            pair=row["pair"],
            turns=tuple(row["turns"]),
            text=row["text_in"],
            answer=row["text_out"],
            answer_wav=folder / row["audio_out"],
            wavs={voices: folder / by_id[voices][row["id"]]["audio_in"] for voices in VOICES},
            voices={voices: by_id[voices][row["id"]]["voice"] for voices in VOICES},
            codes=codes.get(row["id"]),
        )
        for row in rows["seen"]
    )
    records = [record for split in ("train", "heldout") for record in _read_lines(folder / f"{split}.jsonl")]
    texts = [
        text
        for record in records
        for text in (record["question"], record["answer"], *(turn["content"] for turn in record["turns"]))
    ]
    return World(questions, tuple(sorted({word for text in texts for word in text.split()})))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; build the world with examples/tiny_talker/build_world.py"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose(questions: Iterable[Question], count: int, *, seed: int = 0) -> list[Question]:
    """Draw questions, of every kind as often while there are some; new pairs before further wordings."""
    kinds: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda question: question.id):
        kinds.setdefault(question.kind, []).append(question)
    rng = random.Random(seed)
    queues = {}
    for kind, members in sorted(kinds.items()):
        rng.shuffle(members)
        queues[kind] = _new_pairs_first(members)
    chosen: list[Question] = []
    for place in range(max(map(len, queues.values()), default=0)):
        chosen.extend(queue[place] for queue in queues.values() if place < len(queue))
    return chosen[:count]


def _new_pairs_first(questions: Iterable[Question]) -> list[Question]:
    """First one question of each pair, then a second one of each, and so on."""
    met: Counter[str] = Counter()
    rounds: list[tuple[int, Question]] = []
    for question in questions:
        rounds.append((met[question.pair], question))
        met[question.pair] += 1
    return [question for _, question in sorted(rounds, key=lambda entry: entry[0])]


def ask_all(
    talker: OmniAdapter, conversations: Sequence[Sequence[Message]], *, task: str, **options: Any
) -> list[Reply]:
    """Return the replies to many conversations, batch by batch; their sound is decoded at once."""
    replies: list[Reply] = []
    for start in range(0, len(conversations), BATCH_SIZE):
        batch = conversations[start : start + BATCH_SIZE]
        settings = {"max_new_tokens": MOST_STEPS, "stride": MOST_STEPS, **options}
        replies.extend(talker.chat_many(batch, task=task, **settings))
    return replies


def answer_with_lm(folder: Path, questions: Sequence[Question]) -> list[str]:
    """Return the answers of a bare causal LM, without anything that was added to it."""
    tokenizer = load_tokenizer(str(folder), HubOptions(local_files_only=True))
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="float32")
    lm.eval()
    answers = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            question.written(), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids: Tensor = lm.generate(
                prompt["input_ids"],
                attention_mask=torch.ones_like(prompt["input_ids"]),
                max_new_tokens=MOST_STEPS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        answers.append(
            str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
        )
    return answers


class Ears:
    """Understands replies and ceilings.

    Args:
        words: the whole vocabulary.
        jobs: processes that listen.
    """

    def __init__(self, words: Sequence[str], *, jobs: int = 1) -> None:
        self._words, self._jobs = words, jobs

    def hear(self, clips: Iterable[Clip]) -> list[str]:
        """Return the words heard in each clip."""
        return transcribe_many(self._words, clips, jobs=self._jobs)


def reply_clips(replies: Iterable[Reply]) -> list[Clip]:
    """Return the sound of replies."""
    return [Clip(reply.audio, reply.sampling_rate) for reply in replies]


def own_voice(talker: OmniAdapter, questions: Sequence[Question]) -> list[Clip]:
    """Return the right answers in the synthesizer's own voice."""
    rate = talker.sampling_rate
    return [Clip(read_waveform(q.answer_wav, sampling_rate=rate).numpy(), rate) for q in questions]


@torch.no_grad()
def resynthesise(talker: OmniAdapter, clips: Iterable[Clip]) -> list[Clip]:
    """Return clips after the encoder and the decoder of the talker's codec."""
    device = talker.model.device
    coded = [talker.codec.encode(torch.from_numpy(clip.samples).to(device)) for clip in clips]
    return decode(talker, coded)


@torch.no_grad()
def decode(talker: OmniAdapter, coded: Iterable[Tensor]) -> list[Clip]:
    """Return codes [K, T] as sound."""
    device = talker.model.device
    return [
        Clip(talker.codec.decode(codes[None].to(device))[0].float().cpu().numpy(), talker.sampling_rate)
        for codes in coded
    ]


def words_of(text: str) -> str:
    """Return a text as plain words, as the world writes them."""
    return " ".join(text.lower().split())


def is_right(question: Question, text: str) -> bool:
    """Tell whether every word of an answer is right."""
    return words_of(text) == question.answer


class Heard(NamedTuple):
    """Replies to spoken questions of some voices, and what was understood of them."""

    replies: list[Reply]
    understood: list[str]
    transcripts: list[Reply]


class Ceiling(NamedTuple):
    """The right answers as sound, and what was understood of them."""

    clips: list[Clip]
    understood: list[str]


class Findings(NamedTuple):
    """Everything a talker said to the questions.

    Attributes:
        written: answers in text to questions in text.
        heard: by key of ``VOICES``.
        ceilings: what no reply can be expected to beat: the right answers in the synthesizer's voice, and
            after the codec, with what was understood of them.
    """

    questions: list[Question]
    written: list[Reply]
    heard: dict[str, Heard]
    ceilings: dict[str, Ceiling]


def examine(
    talker: OmniAdapter,
    questions: list[Question],
    ears: Ears,
    *,
    voices: Sequence[str] = VOICES,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Findings:
    """Ask a talker every question in text and by each kind of voice, and listen to what it says.

    Args:
        talker: who answers.
        questions: what is asked.
        ears: who listens.
        voices: which keys of ``VOICES``.
        say: is told what is done.
        **options: fields of ``GenerationSettings``, such as ``batch_parallel``.
    """
    say(f"{len(questions)} questions in text")
    written = ask_all(talker, [q.written() for q in questions], task="text_to_text", **options)
    heard = {}
    for name in voices:
        say(f"{len(questions)} spoken questions, {name} voices")
        spoken = [question.spoken(name) for question in questions]
        replies = ask_all(talker, spoken, task="speech_to_speech", **options)
        alone = [[_recording(question.wavs[name])] for question in questions]
        transcripts = ask_all(talker, alone, task="asr", **options)
        say("listening to the replies")
        heard[name] = Heard(replies, ears.hear(reply_clips(replies)), transcripts)
    say("listening to the synthesizer's own voice, and to it after the codec")
    ceilings = {
        name: Ceiling(clips, ears.hear(clips)) for name, clips in make_ceilings(talker, questions).items()
    }
    return Findings(questions, written, heard, ceilings)


def make_ceilings(talker: OmniAdapter, questions: Sequence[Question]) -> dict[str, list[Clip]]:
    """Return the right answers as sound: of the synthesizer, and after the talker's codec.

    ``codec`` has the codes that training has. Where they were made by something better than the codec's own
    encoder, so that the world holds them, what that encoder makes is a third one.
    """
    made = {"synthesizer": own_voice(talker, questions)}
    again = resynthesise(talker, made["synthesizer"])
    given = [torch.tensor(question.codes) for question in questions if question.codes is not None]
    if len(given) < len(questions):
        return {**made, "codec": again}
    return {**made, "codec": decode(talker, given), "codec with its own encoder": again}


def summarise(found: Findings) -> dict[str, Any]:
    """Return the figures of what a talker said, as JSON."""
    questions, answers = found.questions, [question.answer for question in found.questions]
    ceilings = {name: count_word_errors(answers, made.understood) for name, made in found.ceilings.items()}
    voice, codec = ceilings["synthesizer"], ceilings["codec"]
    text_answers = {"from text": _right(questions, [reply.text for reply in found.written])}
    spoken, asr = {}, {}
    for name, heard in found.heard.items():
        texts = [words_of(reply.text) for reply in heard.replies]
        text_answers[f"from speech, {name} voices"] = _right(questions, texts)
        errors = count_word_errors(answers, heard.understood)
        spoken[name] = {
            "wer": _interval(errors.interval()),
            "wer_against_own_text": _interval(count_word_errors(texts, heard.understood).interval()),
            "above_codec": _interval(errors.above(codec)),
            "wer_by_kind": _by_kind(questions, errors),
            "silent": sum(not len(reply.audio) or not reply.audio.any() for reply in heard.replies),
            "seconds": round(sum(reply.duration_s for reply in heard.replies), 2),
        }
        said = [words_of(reply.text) for reply in heard.transcripts]
        asr[name] = {"wer": _interval(count_word_errors([q.text for q in questions], said).interval())}
    return {
        "questions": len(questions),
        "kinds": dict(sorted(Counter(question.kind for question in questions).items())),
        "text_answers": text_answers,
        "spoken_replies": spoken,
        "ceilings": {
            name: {
                "wer": _interval(errors.interval()),
                "above_synthesizer": _interval(errors.above(voice)),
                "wer_by_kind": _by_kind(questions, errors),
            }
            for name, errors in ceilings.items()
        },
        "transcripts": asr,
        "endings": _endings(found),
    }


def _interval(value: Interval) -> dict[str, float]:
    return {name: round(number, 5) for name, number in value._asdict().items()}


def _right(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, Any]:
    """Share of right answers, of all and of each kind."""
    outcomes = [is_right(question, text) for question, text in zip(questions, texts, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for question, outcome in zip(questions, outcomes, strict=True):
        kinds.setdefault(question.kind, []).append(outcome)
    return {
        **_interval(share(outcomes)),
        "count": len(outcomes),
        "by_kind": {
            kind: {"value": sum(found) / len(found), "count": len(found)}
            for kind, found in sorted(kinds.items())
        },
    }


def _by_kind(questions: Sequence[Question], errors: WordErrors) -> dict[str, float]:
    wrong: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for question, bad, total in zip(questions, *errors, strict=True):
        wrong[question.kind] += bad
        words[question.kind] += total
    return {kind: round(wrong[kind] / max(1, words[kind]), 5) for kind in sorted(words)}


def _endings(found: Findings) -> dict[str, Any]:
    """How replies ended: by themselves (``end``) or not."""
    replies = {"text": found.written}
    for name, heard in found.heard.items():
        replies[f"speech, {name} voices"] = heard.replies
        replies[f"transcript, {name} voices"] = heard.transcripts
    reasons = {name: Counter(reply.finish_reason for reply in group) for name, group in replies.items()}
    everything = sum(reasons.values(), Counter())
    return {
        **_interval(share([reason == "end" for reason in everything.elements()])),
        "count": everything.total(),
        "reasons": {name: dict(counts) for name, counts in reasons.items()},
    }


def measure_speed(talker: OmniAdapter, questions: Sequence[Question]) -> dict[str, Any]:
    """Time streamed replies to single spoken questions, after one that warms up."""
    replies: list[Reply] = []
    for question in (questions[0], *questions[:TIMED_QUESTIONS]):
        chunks = talker.stream(messages=question.spoken(VOICES[0]), max_new_tokens=MOST_STEPS)
        replies.append(Reply.collect(chunks))
    timed = replies[1:]
    first = [reply.first_audio_s for reply in timed if reply.first_audio_s is not None]
    factors = [reply.real_time_factor for reply in timed if reply.real_time_factor is not None]
    return {
        "replies": len(timed),
        "first_audio_s": _spread(first),
        "real_time_factor": _spread(factors),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 90th percentile; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {"median": round(statistics.median(ordered), 4), "p90": round(high, 4)}


def check_bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare a report with ``BARS``; what was not measured is left out."""
    ability = report["text_ability"]
    reached: dict[str, float | None] = {
        "answer from text": report["text_answers"]["from text"]["value"],
        **{
            f"answer from speech, {name} voices": report["text_answers"][f"from speech, {name} voices"][
                "value"
            ]
            for name in report["spoken_replies"]
        },
        "WER of the spoken reply above the codec's": report["spoken_replies"]["seen"]["above_codec"]["value"],
        "WER of the codec above the synthesizer's": report["ceilings"]["codec"]["above_synthesizer"]["value"],
        "loss of text ability": (
            ability["base LM"]["value"] - ability["talker"]["value"] if "base LM" in ability else None
        ),
        "replies that end by themselves": report["endings"]["value"],
    }
    return [
        {
            "name": name,
            "bar": bar,
            "sense": "at most" if name in AT_MOST else "at least",
            "reached": round(value, 5),
            "met": value <= bar + 1e-9 if name in AT_MOST else value >= bar - 1e-9,
        }
        for name, bar in BARS.items()
        if (value := reached.get(name)) is not None
    ]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the times were measured on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "device": str(device),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def card_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a report for a model card."""
    data = "held-out questions of the tiny world"
    answers = report["text_answers"].items()
    return {
        **{f"exact match of the text answer {name}, {data}": entry["value"] for name, entry in answers},
        **{
            f"WER of the spoken reply by pocketsphinx ({name} voices ask), {data}": entry["wer"]["value"]
            for name, entry in report["spoken_replies"].items()
        },
        **{
            f"WER of the right answer by pocketsphinx ({name}), {data}": entry["wer"]["value"]
            for name, entry in report["ceilings"].items()
        },
        **{
            f"WER of the transcript ({name} voices), {data}": entry["wer"]["value"]
            for name, entry in report["transcripts"].items()
        },
    }


def talker_folder(folder: Path) -> Path:
    """Return the talker's folder of a run, or the folder itself if it is one."""
    inner = folder / "talker"
    return inner if (inner / "omni_config.json").is_file() else folder


def make_examples(found: Findings) -> Iterator[Example]:
    """Yield some questions with everything that was said, of different kinds, voices in turn."""
    names = list(found.heard)
    for place, question in enumerate(found.questions[:EXAMPLES]):
        name = names[place % len(names)]
        heard = found.heard[name]
        reply = heard.replies[place]
        yield Example(
            kind=question.kind,
            turns=tuple(f"{turn['role']}: {turn['content']}" for turn in question.turns),
            question=question.text,
            voice=f"{question.voices[name]} ({name})",
            transcript=words_of(heard.transcripts[place].text),
            expected=question.answer,
            text=words_of(reply.text),
            understood=heard.understood[place],
            sounds={
                "question": Clip(
                    read_waveform(question.wavs[name], sampling_rate=SAMPLING_RATE).numpy(), SAMPLING_RATE
                ),
                "reply": Clip(reply.audio, reply.sampling_rate),
                **{name: found.ceilings[name].clips[place] for name in ("synthesizer", "codec")},
            },
        )


class Wanted(NamedTuple):
    """What is to be judged.

    Attributes:
        talker: folder of the talker.
        world: folder of the world.
        out: folder of the report.
        lm: folder of the bare LM; None leaves it out.
        stages: talkers of earlier stages, or their runs, by name.
        questions: how many are asked.
        written_questions: how many are asked in writing alone, for the text ability; None asks all.
        device: where the talker runs.
        jobs: processes that listen.
        card: write figures and samples into the talker's folder, for its card.
    """

    talker: Path
    world: Path
    out: Path
    lm: Path | None = None
    stages: Mapping[str, Path] = {}
    questions: int = 240
    written_questions: int | None = None
    device: str = "cpu"
    jobs: int = 1
    card: bool = False


def evaluate(wanted: Wanted) -> dict[str, Any]:
    """Judge a talker, write the report and return it."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    world = read_world(wanted.world)
    questions = choose(world.questions, wanted.questions)
    talker = OmniAdapter.from_pretrained(wanted.talker, dtype="float32").to(wanted.device)
    found = examine(talker, questions, Ears(world.words, jobs=wanted.jobs), say=say)
    report: dict[str, Any] = {
        "talker": str(wanted.talker),
        "world": str(wanted.world),
        "machine": describe_machine(talker.model.device),
        **summarise(found),
    }
    say("speed of single replies")
    report["speed"] = measure_speed(talker, questions)
    count = wanted.written_questions
    to_write = world.questions if count is None else choose(world.questions, count)
    report["text_ability"] = _text_ability(wanted, talker, to_write, say)
    report["bars"] = check_bars(report)
    report["seconds"] = round(time.monotonic() - started, 1)
    report["answers"] = list(_answers(found))
    _write(wanted, report, found, talker)
    say(f"{wanted.out / 'index.html'} is ready")
    return report


def _text_ability(
    wanted: Wanted, talker: OmniAdapter, questions: Sequence[Question], say: Callable[[str], None]
) -> dict[str, Any]:
    """Right answers from text: of the bare LM, after each stage, and of the talker."""
    ability = {}

    def ask(talker: OmniAdapter) -> dict[str, Any]:
        replies = ask_all(talker, [question.written() for question in questions], task="text_to_text")
        return _right(questions, [reply.text for reply in replies])

    if wanted.lm is not None:
        say(f"the bare LM, {len(questions)} questions in text")
        ability["base LM"] = _right(questions, answer_with_lm(wanted.lm, questions))
    for name, folder in wanted.stages.items():
        say(f"the talker after the stage {name}, the same questions")
        stage = OmniAdapter.from_pretrained(talker_folder(folder), dtype="float32")
        ability[f"after {name}"] = ask(stage.to(wanted.device))
    say("the talker, the same questions")
    ability["talker"] = ask(talker)
    return ability


def _answers(found: Findings) -> Iterator[dict[str, Any]]:
    """Every question with all that was written and understood."""
    for place, question in enumerate(found.questions):
        yield {
            "id": question.id,
            "question": question.text,
            "expected": question.answer,
            "from text": words_of(found.written[place].text),
            **{f"{name}, understood": made.understood[place] for name, made in found.ceilings.items()},
            **{
                f"{name} voices": {
                    "voice": question.voices[name],
                    "transcript": words_of(heard.transcripts[place].text),
                    "text": words_of(heard.replies[place].text),
                    "understood": heard.understood[place],
                    "finish_reason": heard.replies[place].finish_reason,
                }
                for name, heard in found.heard.items()
            },
        }


def _write(wanted: Wanted, report: Mapping[str, Any], found: Findings, talker: OmniAdapter) -> None:
    """Write the report's files, and the talker's card if it is wanted."""
    wanted.out.mkdir(parents=True, exist_ok=True)
    (wanted.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (wanted.out / "report.md").write_text(write_table(report), encoding="utf-8")
    runs = {name: folder for name, folder in wanted.stages.items() if (folder / "log.jsonl").is_file()}
    parents = {name: folder.parent for name, folder in wanted.stages.items() if name not in runs}
    runs.update((name, folder) for name, folder in parents.items() if (folder / "log.jsonl").is_file())
    in_order = {name: runs[name] for name in wanted.stages if name in runs}
    examples = list(make_examples(found))
    write_page(wanted.out, report, examples, runs=in_order)
    if wanted.card:
        samples = sorted((wanted.out / "sounds").glob("*-reply.flac"))[:CARD_SAMPLES]
        facts = CardFacts(
            name=wanted.talker.resolve().name,
            num_added=sum(tensor.numel() for _, tensor in talker.model.added_parameters()),
            evaluation=card_figures(report),
            samples=samples,
            datasets=read_datasets(wanted.talker),
        )
        save_card(wanted.talker, config=talker.config, facts=facts)


def read_arguments(words: Sequence[str] | None = None) -> Wanted:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Judge a talker of the tiny world.")
    parser.add_argument("--talker", type=Path, default=Path("build/tiny/talker"), help="folder of the talker")
    parser.add_argument("--world", type=Path, default=Path("build/tiny/world"), help="folder of the world")
    parser.add_argument("--out", type=Path, default=Path("build/tiny/report"), help="folder of the report")
    parser.add_argument("--lm", type=Path, help="folder of the bare LM, for its text ability")
    parser.add_argument(
        "--stages", nargs="*", default=[], metavar="NAME=DIR", help="talkers of earlier stages, or their runs"
    )
    parser.add_argument(
        "--questions", type=int, default=240, help="held-out questions that are spoken; all are asked in text"
    )
    parser.add_argument("--quick", type=int, metavar="N", help="only N questions")
    parser.add_argument("--device", default="cpu", help="where the talker runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that listen")
    parser.add_argument("--card", action="store_true", help="add figures and samples to the talker's card")
    given = parser.parse_args(words)
    stages = dict(entry.partition("=")[::2] for entry in given.stages)
    if not all(stages.values()):
        parser.error(f"--stages takes NAME=DIR, got {' '.join(given.stages)}")
    return Wanted(
        given.talker,
        given.world,
        given.out,
        lm=given.lm,
        stages={name: Path(folder) for name, folder in stages.items()},
        questions=given.questions if given.quick is None else given.quick,
        written_questions=given.quick,
        device=given.device,
        jobs=given.jobs,
        card=given.card,
    )


def main() -> None:
    """Judge, and print the table."""
    wanted = read_arguments()
    evaluate(wanted)
    print(f"\n{(wanted.out / 'report.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
