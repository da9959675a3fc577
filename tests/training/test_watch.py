"""What a person sees of a run on the way."""

from omni_adapter.training.watch import Screen, describe_record

RECORD = {
    "step": 25, "loss": 1.5, "row_0/accuracy": 0.5, "text/accuracy": 0.25, "positions_per_s": 1234.5,
    "audio_hours_per_h": 12.5, "padding_share": 0.1, "seconds": 3000.0, "memory_skips": 0, "bad_steps": 0,
}  # fmt: skip


def test_figures_of_an_entry_in_one_line():
    assert describe_record(RECORD, total=100) == (
        "loss 1.5000  r0 50%  text 25%  1,234 tokens/s  12.50 audio h/h  padding 10%  2:30:00 left"
    )
    assert "skipped 1+2" in describe_record({**RECORD, "memory_skips": 1, "bad_steps": 2}, total=100)


def test_a_screen_without_a_terminal_gets_lines(capsys):
    screen = Screen("align", is_shown=True)
    screen.on_start(0, 100)
    screen.on_record(RECORD)
    screen.on_end()
    assert "step 25/100  loss 1.5000  r0 50%" in capsys.readouterr().out


def test_only_one_process_draws(capsys):
    screen = Screen("align", is_shown=False)
    screen.on_start(0, 100)
    screen.on_record(RECORD)
    screen.on_end()
    assert capsys.readouterr().out == ""
