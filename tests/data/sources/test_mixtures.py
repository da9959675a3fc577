"""The paper's mixtures: table 1's sizes, opened by the stages' own settings, learned from in one step."""

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_adapter.data.rows import to_sample
from omni_adapter.data.sources import SourceSpec, choose
from omni_adapter.errors import ConfigError
from omni_adapter.training.command import read_command
from omni_adapter.training.lessons import open_mixture
from omni_adapter.training.settings import load_settings, read_mixture
from tests.data.sources.miniatures import ANSWERS, SENTENCES, codes_of, tone
from tests.data.sources.test_published import take_step
from tests.talkers import fresh_talker

ROOT = Path(__file__).resolve().parents[3]
MIXTURES = ROOT / "recipes" / "configs" / "mixtures"
SPOKEN = "moss-002-spoken"

# Table 1 of the paper: hours of read speech, thousands of rows of everything else.
READ = {"libritts": 586, "vctk": 44, "multilingual-librispeech": 8000}
SPOKEN_QA = {
    "alpaca-gpt4": 55,
    "identity": 2,
    "qaassistant": 27,
    "rlhf": 367,
    "trivia-singlechoice": 17,
    "trivia-multichoice": 20,
    "openassistant": 2,
}


@pytest.fixture(autouse=True)
def _spoken(tmp_path, monkeypatch):
    """MOSS's conversations as prepare speaks them, where the mixture expects them."""
    (tmp_path / SPOKEN).mkdir()
    rows = [
        {
            "audio_in": {"bytes": tone(number, rate=16_000), "path": None},
            "text_in": SENTENCES[number],
            "text_out": ANSWERS[number],
            "codes_out": codes_of(number),
        }
        for number in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / SPOKEN / "shard-00000.parquet")
    monkeypatch.chdir(tmp_path)


def stage_of(path: Path) -> str:
    return path.stem.removeprefix("paper_")


def shares(path: Path) -> dict[str, float]:
    """Share of the samples by source and task."""
    found: dict[str, float] = defaultdict(float)
    mixture = open_mixture(load_settings(None, ["--data", str(path)], stage=stage_of(path)))
    for spec in mixture.specs:
        name, _, part = spec.path.partition(":")
        found[part if name == "voiceassistant-400k" else name] += spec.weight
        found[spec.task] += spec.weight
    total = sum(spec.weight for spec in mixture.specs)
    return {name: weight / total for name, weight in found.items()}


@pytest.mark.parametrize("path", sorted(MIXTURES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_mixture_opens_with_the_command_that_uses_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(path.read_text().splitlines()[0])
    assert words[:3] == ["#", "accelerate", "launch"]
    stage, also = re.search(r'run\("(\w+)"(?:, also=\("(\w+)",\))?\)', (ROOT / words[3]).read_text()).groups()
    settings = read_command(stage, words[4:], also=[also] if also else []).settings
    assert settings.stage == stage_of(path)
    assert settings.data.sources == (str(path.relative_to(ROOT)),)


@pytest.mark.parametrize("path", sorted(MIXTURES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_mixture_ends_in_a_step(path, hub):
    mixture = open_mixture(load_settings(None, ["--data", str(path)], stage=stage_of(path)))
    tasks, samples = set(), []
    talker = fresh_talker()
    for position in range(12):
        row = mixture.read(position)
        tasks.add(row.task)
        samples.append(to_sample(row, talker.processor, codec=talker.codec))
    assert len(tasks) > 1
    assert 0 < take_step(talker, samples) < 20


def test_read_speech_is_weighed_by_hours(hub):
    total = sum(READ.values())
    found = shares(MIXTURES / "paper_align.yaml")
    assert found == pytest.approx(
        {"asr": 0.5, "tts": 0.5, **{name: hours / total for name, hours in READ.items()}}
    )
    for stage, share in (("adapt", 1 / 2), ("finetune", 1 / 3)):
        found = shares(MIXTURES / f"paper_{stage}.yaml")
        assert found["asr"] == pytest.approx(share)
        for name, hours in READ.items():
            assert found[name] == pytest.approx(share * hours / total)
        assert found["open-orca"] == pytest.approx(share)
    assert found[SPOKEN] == pytest.approx(1 / 3)
    for task in ("speech_to_speech", "speech_to_text", "text_to_speech"):
        assert found[task] == pytest.approx(1 / 12)


def test_spoken_answers_are_weighed_by_rows(hub):
    found = shares(MIXTURES / "paper_anneal.yaml")
    total = sum(SPOKEN_QA.values())
    for name, rows in SPOKEN_QA.items():
        assert found[name] == pytest.approx(rows / total)
    for task in ("speech_to_speech", "speech_to_text", "text_to_speech", "text_to_text"):
        assert found[task] == pytest.approx(1 / 4)


def test_every_name_is_known():
    for path in MIXTURES.glob("*.yaml"):
        for source in read_mixture(path).sources:
            assert source["path"] == SPOKEN or choose(SourceSpec(**source)) is not None


def test_files_of_sources_nest_and_scale(tmp_path, hub):
    (tmp_path / "inner.yaml").write_text("sources: [libritts, {path: vctk, weight: 3}]\ntasks: {asr: 1}\n")
    (tmp_path / "outer.yaml").write_text("sources: [{path: inner.yaml, weight: 2}, ljspeech]\n")
    mixture = open_mixture(load_settings(None, ["--data", "outer.yaml"], stage="align"))
    assert [(spec.path, spec.task, spec.weight) for spec in mixture.specs] == [
        ("libritts", "asr", 2.0), ("vctk", "asr", 6.0), ("ljspeech", "asr", 1.0), ("ljspeech", "tts", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: []", "sources is empty"),
        ("source: [a]", "did you mean 'sources'"),
        ("- a", "must hold keys and values"),
        ("sources: [{path: a, wieght: 2}]", "did you mean 'weight'"),
    ],
)
def test_mistakes_in_a_file_of_sources_are_named(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        open_mixture(load_settings(None, ["--data", "mine.yaml"], stage="align"))
