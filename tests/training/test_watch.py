"""What a person sees of a run on the way."""

import io

import pytest
from rich.console import Console

from omni_adapter.training.watch import Screen, describe_record, describe_rest

RECORD = {
    "step": 25, "loss": 1.5, "row_0/accuracy": 0.5, "row_1/accuracy": 1.0, "text/accuracy": 0.25,
    "positions_per_s": 1234.5, "audio_hours_per_h": 12.54, "padding_share": 0.1, "seconds": 3000.0,
    "memory_skips": 0, "bad_steps": 0,
}  # fmt: skip


def show(console: Console, *, is_shown: bool = True, start: int = 0) -> str:
    screen = Screen("align", is_shown=is_shown, console=console)
    screen.on_start(start, 100)
    screen.on_step(25)
    screen.on_record(RECORD)
    screen.on_end()
    return console.file.getvalue()


def test_figures_of_an_entry_in_one_line():
    assert describe_record(RECORD) == (
        "loss 1.5000  right: codes 50 100%, text 25%  1,234 tokens/s  12.5 h of audio/h  padding 10%"
    )
    assert describe_rest(RECORD, total=100) == "2:30:00 left"
    without = {name: value for name, value in RECORD.items() if not name.endswith("accuracy")}
    assert "right" not in describe_record(without)
    skipped = describe_record({**RECORD, "memory_skips": 1, "bad_steps": 2})
    assert skipped.endswith("steps skipped: 1 did not fit, 2 not finite")


@pytest.mark.parametrize("width", [60, 100, 200])
def test_terminals_of_any_width_show_every_figure(width):
    shown = show(Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None))
    last = " ".join(shown.rsplit("align", 1)[1].split())
    assert "25/100" in last
    assert "2:30:00 left" in last
    for figure in describe_record(RECORD).split():
        assert figure in last


def test_without_a_terminal_there_is_a_line_for_each_entry():
    lines = show(Console(file=io.StringIO(), width=60), start=20).splitlines()
    assert lines == ["goes on after step 20", f"step 25/100  {describe_record(RECORD)}  2:30:00 left"]


def test_only_one_process_draws():
    assert show(Console(file=io.StringIO()), is_shown=False, start=20) == ""
