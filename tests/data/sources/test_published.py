"""Each published data set in miniature: read through ``datasets`` as published, learned from in one step."""

from functools import partial

import datasets
import pytest
import torch

from omni_adapter.data.collator import collate
from omni_adapter.data.dataset import Mixture
from omni_adapter.data.prepare import Preparation, PrepareSettings
from omni_adapter.data.rows import parse_row, to_sample
from omni_adapter.data.sources import SOURCES, SourceSpec, choose, open_source, usual_tasks
from omni_adapter.data.synthesis import make_synthesizer
from omni_adapter.errors import DataError, RowError
from omni_adapter.training.loss import TrainingModel
from omni_adapter.training.stages import prepare_stage
from tests.data.sources.miniatures import ANSWERS, PUBLISHED, SENTENCES, codes_of, tone, write_frames
from tests.talkers import fresh_talker


@pytest.fixture(scope="module")
def learner():
    talker = fresh_talker()
    prepare_stage(talker.model, "finetune")
    return talker


def take_step(talker, samples) -> float:
    """One optimizer step on a batch; return the loss."""
    batch = collate(samples, rules=talker.processor.rules, side="right")
    model = TrainingModel(talker.model).train()
    learning = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    before = [value.detach().clone() for value in learning]
    loss = model(batch).total(model.counts(batch))
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, learning, strict=True)), "nothing was learned"
    return float(loss.detach())


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_a_published_data_set_ends_in_a_step(hub_id, copies, hub, learner):
    """By its name from the Hub, and as a copy: the same rows, and each of its tasks is learned from."""
    name, make, count = PUBLISHED[hub_id]
    chosen = choose(SourceSpec(name))
    plain = datasets.load_dataset(
        str(copies[hub_id]), chosen.part.config, split=chosen.part.split,
        data_files=list(chosen.part.files) or None,
    )  # fmt: skip
    assert plain.features == make(copies[hub_id]), "the miniature is not as published"
    spec, copy = SourceSpec(name), SourceSpec(str(copies[hub_id]), recipe=name)
    source = open_source(spec)
    assert hub == [hub_id]
    assert len(source) == count
    for index in range(count):
        row = parse_row(source[index], task=usual_tasks(spec)[0], root=source.root)
        other = parse_row(open_source(copy)[index], task=usual_tasks(spec)[0], root=source.root)
        assert (row.text_in, row.text_out, row.turns) == (other.text_in, other.text_out, other.turns)
    samples = []
    for task in usual_tasks(spec):
        mixture = Mixture([SourceSpec(name, task=task)])
        samples += [
            to_sample(mixture.read(position), learner.processor, codec=learner.codec) for position in range(2)
        ]
    assert 0 < take_step(learner, samples) < 20


def test_every_source_is_published():
    named = {published.source.partition(":")[0] for published in PUBLISHED.values()}
    assert named == SOURCES.keys() - {"audio-text"}
    assert {recipe.hub_id for recipe in SOURCES.values()} - {None} <= PUBLISHED.keys()


@pytest.mark.parametrize("recipe", SOURCES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_says_what_it_is(recipe):
    import importlib
    import inspect

    assert recipe.licence
    assert recipe.usual_part in recipe.parts
    modules = [
        module
        for name in ("alpaca", "audio_text", "librispeech", "libritts", "ljspeech", "moss", "open_orca",
                     "multilingual_librispeech", "slam_omni", "vctk", "voiceassistant")
        if recipe in vars(module := importlib.import_module(f"omni_adapter.data.sources.{name}")).values()
    ]  # fmt: skip
    (home,) = modules
    text = inspect.getdoc(home)
    assert recipe.hub_id is None or recipe.hub_id in text
    for theirs in recipe.columns.values():
        assert any(name in text for name in theirs), f"the table of {recipe.name} lacks {theirs}"


def rows_of(spec: SourceSpec, task: str) -> list:
    source = open_source(spec)
    return [parse_row(source[index], task=task, root=source.root) for index in range(len(source))]


def test_voiceassistant_is_questions_and_codes(hub):
    rows = rows_of(SourceSpec("voiceassistant-400k"), "speech_to_speech")
    assert rows[0].text_in == SENTENCES[1]
    assert rows[0].text_out == ANSWERS[1]
    assert rows[0].audio_in == tone(0, rate=22_050, format="WAV")
    assert rows[0].codes_out.tolist() == codes_of(0)
    assert rows[0].language == "en"
    assert [len(row.turns) for row in rows] == [0, 0, 0, 0, 2, 0, 0, 0]
    asked = [turn["content"] for turn in rows[4].turns]
    assert asked == [rows[3].text_in, rows[3].text_out]


@pytest.mark.parametrize(
    ("part", "count"),
    [("identity", 1), ("qaassistant", 1), ("alpaca-gpt4", 1), ("rlhf", 2), ("trivia-singlechoice", 1),
     ("trivia-multichoice", 1), ("openassistant", 1)],
)  # fmt: skip
def test_collections_are_parts(part, count, hub):
    source = open_source(SourceSpec(f"voiceassistant-400k:{part}"))
    assert len(source) == count
    streamed = Mixture([SourceSpec(f"voiceassistant-400k:{part}", task="text_to_text", streaming=True)])
    assert streamed.read(0).text_out == source[0]["text_out"]


def test_a_stream_cannot_look_rounds_up(hub):
    mixture = Mixture(
        [SourceSpec("voiceassistant-400k:rlhf", task="text_to_text", streaming=True, shuffle=False)]
    )
    assert mixture.read(0).turns == ()
    with pytest.raises(RowError, match="round 2 of a conversation needs the rounds before") as caught:
        mixture.read(1)
    assert caught.value.reason == "bad_turns"


@pytest.mark.parametrize(
    ("numbers", "turns"),
    [(["1", "2", "3"], [0, 2, 4]), (["0", "1", "2"], [0, 2, 4]), (["round_1", "round_2", ""], [0, 2, 0]),
     ([None, "None", "1"], [0, 0, 0]), (["3", "1", "2"], [4, 0, 2])],
)  # fmt: skip
def test_rounds_become_turns(numbers, turns, tmp_path):
    rows = [
        {"split_name": "x", "index": "7", "round": number, "question": f"q{place}", "question_audio": "a.wav",
         "answer": f"a{place}", "answer_snac": "# 1 2 3"}
        for place, number in enumerate(numbers)
    ]  # fmt: skip
    path = write_lines(tmp_path / "va.jsonl", rows)
    found = rows_of(SourceSpec(path, recipe="voiceassistant-400k"), "text_to_text")
    assert [len(row.turns) for row in found] == turns


def test_a_round_without_the_rounds_before_is_rejected(tmp_path):
    rows = [
        {"split_name": "x", "index": "7", "round": number, "question": "q", "question_audio": "a.wav",
         "answer": "a", "answer_snac": ""}
        for number in ("1", "3")
    ]  # fmt: skip
    source = open_source(SourceSpec(write_lines(tmp_path / "va.jsonl", rows), recipe="voiceassistant-400k"))
    assert source[0]["codes_out"] is None
    with pytest.raises(RowError, match=r"round 3 of conversation .* is there, round 2 is not") as caught:
        source[1]
    assert caught.value.reason == "bad_turns"


def write_lines(path, rows) -> str:
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_codes_survive_being_written():
    from omni_adapter.data.sources.voiceassistant import read_frames

    assert read_frames(write_frames(codes_of(1))) == codes_of(1)
    assert read_frames("# 0 4095 # 1 2 #") == [[0, 1], [4095, 2]]
    assert read_frames(" ") is None
    assert read_frames(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 # 4 5 6", "must start with '#'"),
        ("no codes", "must start with '#'"),
        ("# 1 2 3 # 4 5", r"as many codes as the others, got \[2, 3\]"),
        ("# 1 2 # # 3 4", r"as many codes as the others, got \[0, 2\]"),
        ("# 1 2 # 3 x", "must be whole numbers"),
        ("# 1 2 # 3 4.5", "must be whole numbers"),
        ("#", "as many codes"),
    ],
)
def test_broken_codes_are_named(text, message):
    from omni_adapter.data.sources.voiceassistant import read_frames

    with pytest.raises(RowError, match=message) as caught:
        read_frames(text)
    assert caught.value.reason == "bad_codes"


def test_another_codecs_tokens_are_left_out_or_refused(hub, talker):
    rows = rows_of(SourceSpec("ultrachat-300k-slam-omni"), "speech_to_text")
    assert all(row.codes_out is None for row in rows)
    with pytest.raises(DataError, match="holds tokens of CosyVoice, which the codec cannot read"):
        open_source(
            SourceSpec("ultrachat-300k-slam-omni", columns={"answer_cosyvoice_speech_token": "codes_out"})
        )
    with pytest.raises(RowError, match="needs codes_out or audio_out"):
        rows_of(SourceSpec("ultrachat-300k-slam-omni"), "speech_to_speech")


def test_rounds_in_one_text_become_turns(hub):
    row = rows_of(SourceSpec("ultrachat-300k-slam-omni"), "speech_to_text")[1]
    assert row.text_in == SENTENCES[1]
    assert [turn["role"] for turn in row.turns] == ["user", "assistant"]
    assert [turn["content"] for turn in row.turns] == [SENTENCES[3], ANSWERS[3]]
    samples, rate = row.audio_in
    assert rate == 22_050
    assert len(samples) == int(rate * 0.25)


def test_moss_is_conversations(hub):
    rows = rows_of(SourceSpec("moss-002-sft"), "text_to_text")
    assert [len(row.turns) for row in rows] == [0, 2, 4]
    assert rows[2].text_in == SENTENCES[0]
    assert rows[2].text_out == ANSWERS[0]
    assert {row.language for row in rows} == {"en"}
    assert rows_of(SourceSpec("moss-002-sft:chinese"), "text_to_text")[0].language == "zh"
    assert len(open_source(SourceSpec("moss-002-sft:all"))) == 6


@pytest.mark.parametrize(
    "text",
    ["", "[MOSS]: Hello.<eoa>", "[Human]: a<eoh> [Human]: b<eoh> [MOSS]: c<eoa>", "Hi. [Human]: a<eoh>"],
)
def test_broken_conversations_are_named(text, tmp_path):
    path = write_lines(tmp_path / "moss.jsonl", [{"plain_text": text, "prefix": "", "num_turns": "1"}])
    with pytest.raises(RowError, match="a conversation must go") as caught:
        open_source(SourceSpec(path, recipe="moss-002-sft"))[0]
    assert caught.value.reason == "bad_turns"


def test_instruction_and_input_are_one_question(hub):
    rows = rows_of(SourceSpec("alpaca-gpt4"), "text_to_text")
    assert [row.text_in for row in rows] == [SENTENCES[0], f"{SENTENCES[1]}\nthe sea"]


def test_system_prompts_are_kept(hub):
    rows = rows_of(SourceSpec("open-orca:1m"), "text_to_text")
    assert [row.system for row in rows] == [None, "Be kind."]
    assert len(open_source(SourceSpec("open-orca"))) == 4


def test_read_speech_keeps_its_names(hub):
    rows = rows_of(SourceSpec("librispeech:test.clean"), "asr")
    assert len(rows) == 3
    assert rows[0].id.startswith("84-121123-")
    assert rows[0].speaker == "84"
    assert rows[0].text_in == rows[0].text_in.lower()
    assert rows_of(SourceSpec("libritts"), "tts")[0].text_out == ANSWERS[0]
    assert rows_of(SourceSpec("ljspeech"), "asr")[0].text_in.startswith("number ")
    assert rows_of(SourceSpec("multilingual-librispeech:polish"), "asr")[0].language == "pl"
    assert rows_of(SourceSpec("multilingual-librispeech"), "asr")[0].language == "en"


def test_parts_of_several_splits_are_streamed_in_turn(hub):
    spec = SourceSpec("librispeech", task="asr", streaming=True, shuffle=False)
    mixture = Mixture([spec])
    table = open_source(SourceSpec("librispeech"))
    assert [mixture.read(position).id for position in range(9)] == list(table.values("id"))


def test_what_is_published_in_writing_can_be_spoken(hub, learner, tmp_path):
    """Prepare takes names too, and keeps the turns; the result teaches every task."""
    work = Preparation(
        SourceSpec("moss-002-sft", limit=2),
        tmp_path / "spoken",
        codec=learner.codec,
        settings=PrepareSettings(speak=("audio_in", "audio_out")),
        synthesizer=make_synthesizer("espeak-ng"),
    )
    work.run(work.pending())
    assert work.finish().rows == 2
    written = rows_of(SourceSpec("moss-002-sft", limit=2), "text_to_text")
    spoken = rows_of(SourceSpec(str(tmp_path / "spoken")), "speech_to_speech")
    assert [row.text_in for row in spoken] == [row.text_in for row in written[:2]]
    assert [row.turns for row in spoken] == [row.turns for row in written[:2]]
    samples = [to_sample(row, learner.processor) for row in spoken]
    assert 0 < take_step(learner, samples) < 20


def test_one_microphone_is_enough(hub):
    assert len(open_source(SourceSpec("vctk"))) == len(open_source(SourceSpec("vctk:mic2"))) == 2
    assert len(open_source(SourceSpec("vctk:all"))) == 4


def test_ids_are_found_without_reading_sound(hub):
    source = open_source(SourceSpec("librispeech"))
    assert len(set(source.values("id"))) == len(source)
    assert list(open_source(SourceSpec("voiceassistant-400k")).values("id")) == [None] * 8
    assert next(open_source(SourceSpec("voiceassistant-400k")).values("text_in")) == SENTENCES[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "libirspeech"}, "is called 'libirspeech'; did you mean 'librispeech'"),
        (
            {"path": "librispeech:train.clean.10"},
            "has no part 'train.clean.10'; did you mean 'train.clean.100'",
        ),
        ({"path": "x.jsonl", "recipe": "alpaca"}, "no published data set is called 'alpaca'; did you mean"),
        ({"path": "x.jsonl", "recipe": "zzz"}, "they are voiceassistant-400k, "),
        ({"path": "audio-text"}, "reads files of your own: {path: FOLDER, recipe: audio-text}"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(SourceSpec(**spec))


def test_something_else_under_a_name_is_refused(tmp_path, hub):
    path = write_lines(tmp_path / "chats.jsonl", [{"question": "a", "reply": "b"}])
    with pytest.raises(
        DataError, match="is no copy of open-orca: it lacks response; found the columns question"
    ):
        open_source(SourceSpec(path, recipe="open-orca"))
    row = {"split_name": "poems", "index": "1", "round": "1", "question": "a", "question_audio": "a.wav",
           "answer": "b", "answer_snac": ""}  # fmt: skip
    path = write_lines(tmp_path / "va.jsonl", [row])
    with pytest.raises(
        DataError, match="has no rows of voiceassistant-400k:identity; its split_name holds poems"
    ):
        open_source(SourceSpec(path, recipe="voiceassistant-400k:identity"))


def test_generic_paths_go_on_working(tmp_path, hub, monkeypatch):
    """A file wins over a name, an id of the Hub is read as it is, and its name is recommended."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "vctk", [])
    with pytest.raises(DataError, match="vctk holds no parquet"):
        open_source(SourceSpec("vctk"))
    plain = open_source(
        SourceSpec(
            "Open-Orca/OpenOrca", task="text_to_text", columns={"question": "text_in", "response": "text_out"}
        )
    )
    assert plain[0]["question"] == SENTENCES[0]
    with pytest.raises(DataError, match="its columns are known under the name open-orca"):
        open_source(SourceSpec("Open-Orca/OpenOrca", task="text_to_text"))


def test_what_changes_the_rows_changes_the_fingerprint(hub):
    names = ("voiceassistant-400k", "voiceassistant-400k:identity", "librispeech")
    prints = [open_source(SourceSpec(name)).fingerprint() for name in names]
    assert len(set(prints)) == 3
    assert prints[0] == open_source(SourceSpec(names[0])).fingerprint()


def test_a_stage_takes_the_tasks_that_a_data_set_teaches(hub):
    from omni_adapter.training.lessons import open_mixture
    from omni_adapter.training.settings import load_settings

    def tasks(stage: str, *names: str) -> set[str]:
        words = [word for name in names for word in ("--data", name)]
        return {spec.task for spec in open_mixture(load_settings(None, words, stage=stage)).specs}

    assert tasks("align", "libritts") == {"asr", "tts"}
    assert tasks("finetune", "libritts") == {"asr", "tts"}
    assert tasks("adapt", "libritts", "open-orca") == {"asr", "text_to_text"}
    assert tasks("anneal", "voiceassistant-400k") == set(SOURCES["voiceassistant-400k"].tasks)
    with pytest.raises(DataError, match="open-orca teaches text_to_text, not asr"):
        tasks("align", "open-orca")


def test_workers_read_them_too(hub, learner):
    from omni_adapter.data.dataset import Batching, BatchLoader

    mixture = Mixture([SourceSpec("voiceassistant-400k", task="speech_to_speech")])
    sample = partial(to_sample, processor=learner.processor)
    loaders = [
        BatchLoader(
            mixture, sample, rules=learner.processor.rules, batching=Batching(batch_size=2), workers=count
        )
        for count in (0, 2)
    ]
    one, other = (next(iter(loader)) for loader in loaders)
    assert torch.equal(one.ids, other.ids) if isinstance(one.ids, torch.Tensor) else one.ids == other.ids
