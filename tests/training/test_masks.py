"""Which positions carry loss, task by task, drawn as the grid.

``.`` no loss. Capital letters are prompt, and never learned: ``I`` input mark, ``E`` end mark, ``W`` answer
mark, ``R`` transcribe mark, ``A`` a step of the recording. In the answer: ``t`` text, ``e`` end, ``c`` code.
Each column shows what stands at a step; each loss line which of it has to be predicted from the step before.
"""

import pytest
import torch

from omni_adapter.data.collator import collate
from omni_adapter.data.layout import TASKS, GridRules, TextSegment, lay_out
from omni_adapter.training.loss import LossSettings, TrainingModel
from omni_adapter.vocab import IGNORE_INDEX, NO_TEXT, TextMarks
from tests.training.talkers import ROWS, TEXT_END, build_model, make_sample

TEXT_MARKS = TextMarks(end=120, pad=121, input=122, answer=123, asr=124)

# Prompt: two words, (input mark, three steps of recording, end mark), one word. Answer: three words, or two
# frames of three codes, or both. The three code rows lag behind the text by 1, 2 and 3 steps.
TABLE = {
    "asr": """
        codes 0   ..I...ER|....
        loss  0   ........|....
        codes 1   ..I...ER|....
        loss  1   ........|....
        codes 2   ..I...ER|....
        loss  2   ........|....
        text      tt.....t|ttte
        loss      ........|ttte
    """,
    "tts": """
        codes 0   ..W|.cce..
        loss  0   ...|.cce..
        codes 1   ..W|..cce.
        loss  1   ...|..cce.
        codes 2   ..W|...cce
        loss  2   ...|...cce
        text      ttt|ttte..
        loss      ...|......
    """,
    "speech_to_text": """
        codes 0   ..I...E.|....
        loss  0   ........|....
        codes 1   ..I...E.|....
        loss  1   ........|....
        codes 2   ..I...E.|....
        loss  2   ........|....
        text      tt.....t|ttte
        loss      ........|ttte
    """,
    "speech_to_speech": """
        codes 0   ..I...EW|.cce..
        loss  0   ........|.cce..
        codes 1   ..I...EW|..cce.
        loss  1   ........|..cce.
        codes 2   ..I...EW|...cce
        loss  2   ........|...cce
        text      tt.....t|ttte..
        loss      ........|ttte..
    """,
    "text_to_speech": """
        codes 0   ..W|.cce..
        loss  0   ...|.cce..
        codes 1   ..W|..cce.
        loss  1   ...|..cce.
        codes 2   ..W|...cce
        loss  2   ...|...cce
        text      ttt|ttte..
        loss      ...|ttte..
    """,
    "text_to_text": """
        codes 0   ...|....
        loss  0   ...|....
        codes 1   ...|....
        loss  1   ...|....
        codes 2   ...|....
        loss  2   ...|....
        text      ttt|ttte
        loss      ...|ttte
    """,
}


def read_table(task: str) -> list[str]:
    """Grid and loss lines of a task, without names and bars."""
    lines = [line.split()[-1] for line in TABLE[task].strip().splitlines()]
    assert len({line.index("|") for line in lines}) == 1
    return [line.replace("|", "") for line in lines]


def draw_codes(ids: torch.Tensor, rules: GridRules) -> str:
    vocabulary = rules.vocabulary
    marks = {vocabulary.pad: ".", vocabulary.input: "I", vocabulary.answer: "W", vocabulary.asr: "R"}
    ended = {vocabulary.end: "e", IGNORE_INDEX: "."}
    return "".join((marks | ended).get(int(token), "c") for token in ids)


def draw_text(ids: torch.Tensor) -> str:
    return "".join({NO_TEXT: ".", IGNORE_INDEX: ".", TEXT_END: "e"}.get(int(token), "t") for token in ids)


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("task", TASKS)
def test_positions_that_carry_loss(model, task):
    rules = GridRules.of(model.config)
    batch = collate([make_sample(task, rules)], rules=rules)
    lines = read_table(task)
    drawn = []
    for row in range(ROWS):
        drawn.append(draw_codes(batch.grid[0, row], rules))
        drawn.append(draw_codes(batch.labels[0, row], rules))
    drawn += [draw_text(batch.grid[0, -1]), draw_text(batch.labels[0, -1])]
    assert drawn == [line.replace("E", "e") for line in lines]


@pytest.mark.parametrize("task", TASKS)
def test_loss_counts_the_positions_of_the_table(model, task):
    rules = GridRules.of(model.config)
    losses = TrainingModel(model)(collate([make_sample(task, rules)], rules=rules))
    learned = [line for index, line in enumerate(read_table(task)) if index % 2]
    assert losses.counts.tolist() == [len(line) - line.count(".") for line in learned]
    assert [bool(value) for value in losses.sums] == [bool(count) for count in losses.counts]


@pytest.mark.parametrize("task", TASKS)
def test_each_label_is_predicted_from_the_step_before(model, task):
    """A step's state moves the loss if, and only if, the step after it has a label."""
    rules = GridRules.of(model.config)
    batch = collate([make_sample(task, rules)], rules=rules)
    learned = [line for index, line in enumerate(read_table(task)) if index % 2]
    states = {}

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        states["last"] = output.last_hidden_state

    handle = model.backbone.lm.model.register_forward_hook(keep)
    losses = TrainingModel(model)(batch)
    handle.remove()
    losses.sums[-1].backward()  # text comes straight from the LM's state
    moved = states["last"].grad[0].abs().sum(dim=-1) > 0
    expected = [mark != "." for mark in learned[-1][1:]] + [False]
    if any(expected):
        assert moved.tolist() == expected


def draw_answer(model, task: str, settings: LossSettings) -> list[str]:
    """Where each row of one answer carries loss."""
    training = TrainingModel(model, settings)
    rules = GridRules.of(model.config)
    batch = collate([make_sample(task, rules)], rules=rules)
    targets = training._targets(batch)
    first = int((batch.labels != IGNORE_INDEX).any(dim=1)[0].nonzero()[0])
    lines = []
    for places, count in zip(targets.places, targets.counts, strict=True):
        steps = {int(place) + 1 for place in places} if count else set()
        lines.append("".join("x" if step in steps else "." for step in range(first, batch.grid.shape[-1])))
    return lines


PADS = {
    # codes 0, codes 1, codes 2, text; the answer alone
    "speech_to_speech": ["xxxxxx", "xxxxxx", "xxxxxx", "xxxx.."],
    "tts": ["xxxxx", "xxxxx", "xxxxx", "....."],  # starts with the first label, a step later
    "asr": ["....", "....", "....", "xxxx"],
}


@pytest.mark.parametrize("task", PADS)
def test_padding_is_learned_if_it_has_a_weight(model, task):
    assert draw_answer(model, task, LossSettings(pad_weight=0.5)) == PADS[task]


def test_padding_of_text_is_learned_where_the_base_has_a_pad_id():
    original = build_model(prompt_format="mini_omni", text_marks=TEXT_MARKS, fusion="mean")
    expected = PADS["speech_to_speech"][:ROWS]
    assert draw_answer(original, "speech_to_speech", LossSettings(pad_weight=1)) == [*expected, "xxxxxx"]
    assert draw_answer(original, "speech_to_speech", LossSettings())[-1] == "xxxx.."


def test_prompt_alone_has_no_labels():
    rules = GridRules.of(build_model().config)
    layout = lay_out([TextSegment((5, 6))], task="text_to_text", rules=rules)
    assert (layout.labels == IGNORE_INDEX).all()
