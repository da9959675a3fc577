"""The judgement of the tiny talker: errors counted right, speech understood, a whole report, ablations."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("jiwer", reason="jiwer is not installed; pip install jiwer")
pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed; pip install pocketsphinx")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_talker"
sys.path.append(str(FOLDER))

import ablations  # noqa: E402
import evaluate  # noqa: E402
import judge  # noqa: E402
import page  # noqa: E402
import voices  # noqa: E402

from omni_adapter.training.settings import load_settings  # noqa: E402

WORDS = (
    "a",
    "banana",
    "capital",
    "eleven",
    "france",
    "is",
    "madrid",
    "of",
    "paris",
    "seven",
    "the",
    "yellow",
)
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")


# ---- counting


@pytest.mark.parametrize(
    ("expected", "heard", "rate"),
    [
        (["the sky is blue"], ["the sky is blue"], 0.0),
        (["the sky is blue"], ["the sky is red"], 1 / 4),
        (["the sky is blue"], ["sky is blue blue"], 2 / 4),
        (["the sky is blue"], [""], 1.0),
        (["one two", "three four five six"], ["one two", "nine"], 4 / 6),
    ],
)
def test_word_error_rate(expected: list[str], heard: list[str], rate: float) -> None:
    assert judge.word_error_rate(expected, heard) == pytest.approx(rate)


def test_words_where_none_were_expected_are_errors() -> None:
    assert judge.count_word_errors(["", "yes"], ["oh no", "yes"]) == judge.WordErrors((2, 0), (0, 1))


def test_an_interval_of_errors_shrinks_with_more_utterances() -> None:
    few, many = (judge.WordErrors((0, 1) * count, (4, 4) * count).interval() for count in (5, 500))
    assert few.value == many.value == 1 / 8
    assert few.low < many.low < 1 / 8 < many.high < few.high


def test_a_difference_is_of_the_same_utterances() -> None:
    worse, better = judge.WordErrors((2, 1, 3), (5, 5, 5)), judge.WordErrors((1, 0, 2), (5, 5, 5))
    assert worse.above(better) == pytest.approx((3 / 15, 3 / 15, 3 / 15))
    with pytest.raises(ValueError, match="3 utterances cannot be compared to 1"):
        worse.above(judge.WordErrors((1,), (5,)))


def test_share_is_wilsons_interval() -> None:
    assert judge.share([True] * 9 + [False]) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-4)
    assert judge.share([True] * 20).high == 1.0


# ---- hearing


def test_a_word_without_a_pronunciation_is_refused() -> None:
    with pytest.raises(ValueError, match="no pronunciation of flurb, qwrtz"):
        judge.Recogniser(["house", "qwrtz", "flurb"])


def test_letters_are_spelled_by_their_names() -> None:
    assert judge._dictionary(("k", "s")).splitlines() == ["k K EY", "s EH S"]


def test_nothing_is_heard_in_silence_and_in_no_samples() -> None:
    recogniser = judge.Recogniser(WORDS)
    assert recogniser.transcribe(np.zeros(24_000, dtype=np.float32), 24_000) == ""
    assert recogniser.transcribe(np.zeros(0, dtype=np.float32), 24_000) == ""
    broken = np.full(2400, np.nan, dtype=np.float32)
    assert recogniser.transcribe(broken, 24_000) == ""


@needs_flite
def test_the_answer_voice_is_understood_whoever_listens() -> None:
    texts = ["the capital of france is paris", "the banana is yellow"]
    clips = [judge.Clip(*voices.speak(text, voices.ANSWER)) for text in texts]
    assert judge.transcribe_many(WORDS, clips) == texts
    assert judge.transcribe_many(WORDS, clips, jobs=2) == texts


# ---- questions


def _question(name: str, kind: str, pair: str) -> evaluate.Question:
    return evaluate.Question(name, kind, pair, (), name, "yes", Path(), {}, {})


def test_questions_are_drawn_evenly_over_kinds_and_pairs() -> None:
    many = [_question(f"many-{i}", "many", f"pair {i // 2}") for i in range(20)]
    few = [_question(f"few-{i}", "few", f"pair {i}") for i in range(3)]
    chosen = evaluate.choose([*many, *few], 13)
    assert sum(question.kind == "few" for question in chosen) == 3
    assert len({question.pair for question in chosen if question.kind == "many"}) == 10
    assert chosen == evaluate.choose([*few, *reversed(many)], 13)
    assert chosen != evaluate.choose([*many, *few], 13, seed=1)


# ---- the report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two held-out questions, spoken, and a third that is one too many where two are asked."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    folder = tmp_path_factory.mktemp("world")
    rows = [
        ("q0", "capital", "what is the capital of france", "paris", []),
        (
            "q1", "two turns", "and plus one", "seven",
            [{"role": "user", "content": "what is five plus one"}, {"role": "assistant", "content": "six"}],
        ),
        ("q2", "word of many letters", "spell cat", "c a t", []),
    ]  # fmt: skip
    records, spoken = [], []
    for name, kind, question, answer, turns in rows:
        for text in (question, answer):
            samples, rate = voices.speak(text, voices.ANSWER)
            soundfile.write(folder / f"{text.replace(' ', '_')}.wav", samples, rate)
        records.append({"id": name, "turns": turns, "question": question, "answer": answer})
        spoken.append(
            {
                "id": name, "kind": kind, "pair": name, "voice": "flite:slt", "turns": turns,
                "text_in": question, "text_out": answer,
                "audio_in": f"{question.replace(' ', '_')}.wav", "audio_out": f"{answer}.wav",
            }
        )  # fmt: skip
    for name, lines in (
        ("train", records[:1]),
        ("heldout", records),
        ("rows_heldout_seen", spoken),
        ("rows_heldout_unseen", spoken),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_report_of_an_untrained_talker_is_whole(
    world: Path, talker_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that it says is right; every figure is there, and every reply runs into the limit or ends."""
    monkeypatch.setattr(evaluate, "MOST_STEPS", 12)
    talker = tmp_path / "talker"
    shutil.copytree(talker_folder, talker)
    wanted = evaluate.Wanted(
        talker,
        world,
        tmp_path / "report",
        lm=talker / "base",
        stages={"align": talker},
        questions=2,
        card=True,
    )
    evaluate.evaluate(wanted)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["questions"] == 2
    assert set(report["text_answers"]) == {
        "from text", "from speech, seen voices", "from speech, unseen voices"
    }  # fmt: skip
    assert all(entry["value"] == 0 and entry["count"] == 2 for entry in report["text_answers"].values())
    assert report["spoken_replies"]["seen"]["wer"]["value"] > 0
    assert (
        report["ceilings"]["synthesizer"]["wer"]["value"] <= report["spoken_replies"]["seen"]["wer"]["value"]
    )
    assert set(report["text_ability"]) == {"base LM", "after align", "talker"}
    assert report["text_ability"]["base LM"]["value"] == report["text_ability"]["talker"]["value"]
    assert {entry["count"] for entry in report["text_ability"].values()} == {3}  # in writing all are asked
    reasons = report["endings"]["reasons"]
    assert all(sum(counts.values()) == 2 for counts in reasons.values())
    assert len(reasons) == 5
    assert report["speed"]["first_audio_s"]["median"] > 0
    assert {bar["name"] for bar in report["bars"]} == set(evaluate.BARS)
    assert not report["bars"][0]["met"]
    assert [answer["expected"] for answer in report["answers"]] == ["paris", "seven"]

    written = (tmp_path / "report" / "index.html").read_text()
    sounds = re.findall(r'src="([^"]+)"', written)
    assert len(sounds) == 2 * 4
    for sound in sounds:
        assert soundfile.info(tmp_path / "report" / sound).frames > 0
    assert written.count("<svg") == written.count("</svg>") >= 5
    assert written.count("<tr>") == written.count("</tr>")
    table = (tmp_path / "report" / "report.md").read_text()
    assert "| text answer from text, exact | 0.0 % (0.0 to 65.8) |" in table
    assert "nan" not in (table + written).lower()
    both = page.compare([report, {**report, "talker": "build/other", "transcripts": {}}])
    assert both.startswith("| measure | talker | other |")
    assert "| transcript of the question, seen voices, WER | 100.0 % (100.0 to 100.0) | - |" in both

    figures = json.loads((talker / "evaluation.json").read_text())
    assert figures["exact match of the text answer from text, held-out questions of the tiny world"] == 0
    assert "pocketsphinx" in (talker / "README.md").read_text()


def read_coded(world: Path) -> list[dict]:
    """The held-out rows with some codes that every codec has, five frames each."""
    codes = [[(3 * row + frame) % 16 for frame in range(5)] for row in range(7)]
    lines = (world / "rows_heldout_seen.jsonl").read_text().splitlines()
    return [{**json.loads(line), "codes_out": codes} for line in lines]


def test_the_ceiling_is_of_the_codes_that_training_has(world: Path, talker, tmp_path: Path) -> None:
    """The world's codes are what the talker learned to say; the codec's own encoder may be worse."""
    shutil.copytree(world, tmp_path / "world")
    questions = evaluate.choose(evaluate.read_world(world).questions, 2)
    assert set(evaluate.make_ceilings(talker, questions)) == {"synthesizer", "codec"}
    (tmp_path / "world" / "rows_heldout_seen_coded.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in read_coded(world))
    )
    coded = evaluate.choose(evaluate.read_world(tmp_path / "world").questions, 2)
    made = evaluate.make_ceilings(talker, coded)
    assert set(made) == {"synthesizer", "codec", "codec with its own encoder"}
    assert {len(clip.samples) for clip in made["codec"]} == {5 * talker.codec.spec.samples_per_frame}
    assert len(made["codec with its own encoder"][0].samples) >= len(made["synthesizer"][0].samples)


def test_a_bar_is_met_from_the_bar_on() -> None:
    def report(answer: float, ability: float, above: float) -> dict:
        value = {"value": answer}
        return {
            "text_answers": {"from text": value, "from speech, seen voices": value},
            "text_ability": {"base LM": {"value": 1.0}, "talker": {"value": ability}},
            "spoken_replies": {"seen": {"above_codec": {"value": above}}},
            "ceilings": {"codec": {"above_synthesizer": {"value": above - 0.03}}},
            "endings": {"value": 1.0},
        }

    good = evaluate.check_bars(report(0.97, 0.99, 0.08))
    assert all(bar["met"] for bar in good)
    assert len(good) == 6
    bad = {bar["name"]: bar["met"] for bar in evaluate.check_bars(report(0.96, 0.98, 0.09))}
    assert [name for name, met in bad.items() if met] == [
        "answer from speech, seen voices", "replies that end by themselves"
    ]  # fmt: skip


def test_a_world_that_was_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"rows_heldout_seen\.jsonl is missing"):
        evaluate.read_world(tmp_path)


def test_a_reply_without_sound_has_no_player(tmp_path: Path) -> None:
    silent = judge.Clip(np.zeros(0, dtype=np.float32), 24_000)
    assert "no sound" in page._player(tmp_path, "reply", silent)
    assert not list(tmp_path.iterdir())


# ---- ablations


def _plan(key: str, scale: float = 0.1) -> list[ablations.Stage]:
    variant = next(variant for variant in ablations.VARIANTS if variant.key == key)
    return ablations.plan(variant, Path("build/tiny"), kind="llama", scale=scale)


def test_the_ablations_of_the_issue_are_there() -> None:
    axes = {variant.axis for variant in ablations.VARIANTS}
    assert axes >= {"TTS blocks", "decoding", "fusion", "text lead", "weights of the rows"}
    assert len({variant.key for variant in ablations.VARIANTS}) == len(ablations.VARIANTS)


def test_a_variant_is_the_recipe_with_its_settings() -> None:
    """Speaking is wrapped anew with the settings; no other part of the recipe is trained."""
    (stage,) = _plan("TTS blocks: 6, scaled")
    assert {"model.wrap.tts_layers=6", "model.wrap.tts.init=scaled"} <= set(stage.command)
    assert f"out={stage.folder}" in stage.command
    settings = load_settings(
        Path(stage.command[stage.command.index("--config") + 1]),
        [word for word in stage.command if "=" in word and not word.startswith("--")],
    )
    assert settings.model.wrap["tts"] == {"init": "scaled"}
    full = _plan("TTS blocks: 6, scaled", scale=1.0)[0].command
    (steps,) = (int(word.partition("=")[2]) for word in full if word.startswith("optim.num_steps="))
    assert settings.optim.num_steps == round(0.1 * steps)


def test_the_lm_learns_on_from_the_hearing_of_the_recipe() -> None:
    """Stages 2 and 3 of a variant follow each other; the first one starts where the recipe's does."""
    adapt, finetune = _plan("the LM in stages 2 and 3: LoRA")
    starts = [stage.command[stage.command.index("--start") + 1] for stage in (adapt, finetune)]
    assert starts == ["build/tiny/llama/hear/talker-average", str(adapt.talker)]
    assert all("model.lm=lora" in stage.command for stage in (adapt, finetune))
    shipped = _plan("answering: as shipped")
    assert not {stage.folder for stage in shipped} & {adapt.folder, finetune.folder}
    assert _plan("decoding: parallel") == []


def test_every_setting_of_a_variant_is_one_that_wrap_and_the_recipes_know(parts) -> None:
    """A misspelled setting would only show after hours."""
    from omni_adapter import OmniAdapter, SnacCodec
    from omni_adapter.config import parse
    from omni_adapter.generation.generator import GenerationSettings
    from omni_adapter.training.loss import LossSettings

    codec = SnacCodec.from_model(parts.snac)
    for variant in ablations.VARIANTS:
        for stage in ablations.plan(variant, Path("build/tiny"), kind="llama", scale=1.0):
            words = [word for word in stage.command if re.match(r"(model|loss|optim)\.", word)]
            settings = load_settings(None, words)
            parse(LossSettings, settings.loss, source=variant.key)
            if settings.model.wrap:
                OmniAdapter.wrap(
                    parts.lm,
                    tokenizer=parts.tokenizer,
                    encoder=parts.whisper,
                    codec=codec,
                    **settings.model.wrap,
                )
        GenerationSettings(**variant.decoding)


def test_finished_variants_are_skipped_and_the_table_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call trains nothing; another budget does everything anew."""
    trained: list[str] = []
    names = {name for trial in ablations.TRIALS for name in trial.figures}
    figures = {name: 0.5 for name in (*names, "codec WER")} | {"questions": 10}
    monkeypatch.setattr(ablations, "train", lambda stages: trained.append(stages[-1].folder.name) or 60.0)
    monkeypatch.setattr(ablations, "judge", lambda trial, talker, world, **options: figures)
    for words, runs in (
        (["--only", "fusion: mean"], 1),
        (["--only", "fusion: mean"], 1),
        (["--only", "fusion: mean", "TTS blocks: 0"], 2),
        (["--only", "fusion: mean", "--scale", "0.3"], 3),
    ):
        monkeypatch.setattr(sys, "argv", ["ablations.py", "--out", str(tmp_path), *words])
        ablations.main()
        assert len(trained) == runs
    table = (tmp_path / "ablations.md").read_text()
    assert table.index("| TTS blocks | 0 | 50.0 % |") < table.index("| fusion | mean | 50.0 % |")
    assert "10 held-out questions" in table


def test_a_recipe_that_fails_stops_the_ablations(tmp_path: Path) -> None:
    failing = ablations.Stage(
        (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "hear-0", tmp_path / "hear-0/talker"
    )
    with pytest.raises(RuntimeError, match="hear-0 ended with exit code 3"):
        ablations.train([failing])


@pytest.mark.slow
def test_a_variant_is_trained_and_judged_from_the_parts(
    world: Path, talker_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes run as they are, a step or two each, on untrained parts."""
    monkeypatch.setattr(evaluate, "MOST_STEPS", 12)
    first = ablations.plan(ablations.VARIANTS[0], tmp_path, kind="llama", scale=0.001)[0].command
    for name in ("base", "encoder", "codec"):
        shutil.copytree(talker_folder / name, Path(first[first.index(f"--{name}") + 1]))
    shutil.copytree(world, tmp_path / "world")
    rows = read_coded(world)
    text = "".join(
        json.dumps({key: value for key, value in row.items() if key != "audio_in"} | {"task": "tts"}) + "\n"
        for row in rows
    )
    (tmp_path / "world" / "rows_heldout_seen_coded.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    for place, word in enumerate(first):
        if word == "--data":
            Path(first[place + 1]).write_text(text)
    shutil.copytree(talker_folder, tmp_path / "talker-llama")
    words = ["--out", str(tmp_path), "--scale", "0.001", "--questions", "2", "--jobs", "1"]
    chosen = ["speaking: as shipped", "decoding: parallel"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *words, "--only", *chosen])
    ablations.main()
    results = json.loads((tmp_path / "ablations.json").read_text())
    assert set(results) == set(chosen)
    assert set(ablations.READING.figures) <= set(results[chosen[0]]["figures"])
    assert set(ablations.DECODING.figures) <= set(results[chosen[1]]["figures"])
    assert results[chosen[0]]["seconds"] > 0
    assert len(list((tmp_path / "ablations").glob("*/talker/omni_config.json"))) == 1
    assert not list((tmp_path / "ablations").glob("*/checkpoints"))
