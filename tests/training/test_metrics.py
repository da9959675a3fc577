"""Figures of a run: sums of parts are those of the whole."""

import pytest
import torch

from omni_adapter.data.collator import collate
from omni_adapter.data.layout import GridRules
from omni_adapter.training.loss import TrainingModel
from omni_adapter.training.metrics import Meter, describe, estimate_seconds_left
from tests.training.talkers import CODEC, ROWS, build_model, make_samples

METER = Meter(ROWS, CODEC.codebook_size, seconds_per_frame=0.5, seconds_per_step=0.25)
TASKS = ("asr", "tts", "speech_to_speech")


def by_name(sums: torch.Tensor) -> dict[str, float]:
    return dict(zip(METER.names, sums.tolist(), strict=True))


@pytest.fixture(scope="module")
def training():
    return TrainingModel(build_model())


@torch.no_grad()
def test_sums_of_parts_are_those_of_the_whole(training):
    rules = GridRules.of(training.model.config)
    samples = make_samples(rules, TASKS)
    batches = [collate(part, rules=rules, side="right") for part in (samples, samples[:1], samples[1:])]
    whole, *parts = (METER.measure(training(batch), batch) for batch in batches)
    steps = [sample.layout.grid.shape[1] for sample in samples]
    sums = by_name(whole)
    without_padding = [index for index, name in enumerate(METER.names) if name != "padding"]
    torch.testing.assert_close(sum(parts)[without_padding], whole[without_padding], rtol=1e-5, atol=1e-5)
    assert sums["positions"] == sum(steps)
    assert sums["padding"] == len(steps) * max(steps) - sum(steps)
    heard, frames = 2 * 3, 2 + 3  # steps of two recordings; frames of two answers
    assert sums["audio_seconds"] == pytest.approx(heard * 0.25 + frames * 0.5)


@torch.no_grad()
def test_figures(training):
    rules = GridRules.of(training.model.config)
    batch = collate(make_samples(rules, TASKS), rules=rules, side="right")
    losses = training(batch)
    sums = by_name(METER.measure(losses, batch))
    figures = describe(sums, seconds=2.0, rows=METER.rows)
    for row, name in enumerate(METER.rows):
        assert figures[f"{name}/loss"] == pytest.approx(float(losses.losses[row]))
        assert figures[f"{name}/accuracy"] == pytest.approx(float(losses.correct[row] / losses.counts[row]))
    assert figures["positions_per_s"] == int(batch.attention_mask.sum()) / 2
    assert figures["audio_hours_per_h"] == pytest.approx(4.0 / 2)
    assert figures["padding_share"] == pytest.approx(1 - float(batch.attention_mask.float().mean()))


def test_rows_without_labels_have_no_figures():
    figures = describe(dict.fromkeys(METER.names, 0.0), seconds=0.0, rows=METER.rows)
    assert figures == {"padding_share": 0.0, "positions_per_s": 0.0, "audio_hours_per_h": 0.0}


def test_time_left():
    assert estimate_seconds_left(done=25, total=100, seconds=50) == 150
    assert estimate_seconds_left(done=0, total=100, seconds=0) is None
