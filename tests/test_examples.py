"""Every example runs offline and does what it says."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capfd):
    """Run an example as ``python examples/NAME`` does; return what it prints."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_every_example_is_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []


def test_untrained_talker(run, tmp_path):
    assert "saved an untrained talker" in run("untrained_talker.py", tmp_path / "talker")
    assert (tmp_path / "talker" / "omni_model.safetensors").is_file()


def test_parts_are_the_same_for_the_same_seed(parts):
    from examples.untrained_talker import make_parts

    again, other = make_parts(), make_parts(seed=1)
    for name in ("lm", "whisper", "snac"):
        first, second, third = (next(getattr(made, name).parameters()) for made in (parts, again, other))
        assert (first == second).all()
        assert (first != third).any()


def test_the_untrained_tokenizer_writes_anything(parts):
    for text in ("What is the capital of France?", "Zürich, 東京 😀\n"):
        assert parts.tokenizer.decode(parts.tokenizer.encode(text)) == text


def test_talk_offline(run, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        run("talk_offline.py", tmp_path / "build")
    assert stop.value.code == 0
    out, messages = capfd.readouterr()
    assert "the sky is blue" in out
    assert "first sound after" in messages
    assert soundfile.info(tmp_path / "build" / "reply.wav").duration > 0.5


def test_talk_offline_with_a_recording_of_ones_own(run, tmp_path, capfd):
    question = tmp_path / "mine.wav"
    subprocess.run(["espeak-ng", "-w", question, "what is the opposite of hot"], check=True)
    with pytest.raises(SystemExit) as stop:
        run("talk_offline.py", tmp_path / "build", "--question", question)
    assert stop.value.code == 0
    assert "cold" in capfd.readouterr().out


def test_talk_offline_without_a_synthesizer(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="no synthesizer found; install one of flite, espeak-ng"):
        run("talk_offline.py", tmp_path)


def test_stream_to_file(run, talker_folder, question, tmp_path):
    printed = run("stream_to_file.py", talker_folder, question, tmp_path / "reply.wav")
    assert "4.4 s of sound" in printed
    assert "finished: length" in printed
    assert soundfile.info(tmp_path / "reply.wav").duration == pytest.approx(4.4, abs=0.1)


@pytest.mark.parametrize("hearing", [(), ("blocks",)])
def test_talk_while_listening(run, talker_folder, speak, hearing):
    printed = run("talk_while_listening.py", talker_folder, speak("How are you?"), *hearing)
    spoken_s = soundfile.info(speak("How are you?")).duration
    assert f"{spoken_s:.1f} s heard as they were spoken; a piece took at most" in printed
    assert "end of the question -> first sound: " in printed
    assert "the same with the whole recording: " in printed


def test_hearing_in_blocks(run, talker_folder, speak):
    printed = run("hearing_in_blocks.py", talker_folder, speak("Hi"), speak("Yes"))
    assert "blocks of 0.5 s, 1 s ahead: frames " in printed
    assert printed.count(" of 2 replies the same") == 6


def test_batch_of_questions(run, talker_folder, speak, tmp_path):
    first, second = tmp_path / "a.wav", tmp_path / "b.wav"
    shutil.copy(speak("What is the capital of France?"), first)
    shutil.copy(speak("How are you?"), second)
    printed = run("batch_of_questions.py", talker_folder, first, second)
    assert printed.count("2.7 s in") == 2
    assert os.path.getsize(tmp_path / "a.reply.wav") == os.path.getsize(tmp_path / "b.reply.wav")


def test_serve_many(run, talker_folder, speak, tmp_path):
    questions = [tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.wav"]
    for question, text in zip(
        questions, ("What is the capital of France?", "How are you?", "Hi"), strict=True
    ):
        shutil.copy(speak(text), question)
    printed = run("serve_many.py", talker_folder, *questions)
    assert printed.count("2.7 s") == 3
    assert "conversations took their steps together" in printed
    assert soundfile.info(tmp_path / "c.reply.wav").duration == pytest.approx(2.7, abs=0.1)


def test_add_a_codec(run):
    printed = run("add_a_codec.py")
    assert "streamed equals whole: True" in printed
    assert "440 Hz comes back at 43" in printed
    assert "whistled 1.4 s at 16000 Hz" in printed


def test_any_model(run):
    printed = run("any_model.py")
    for name in ("Qwen3ForCausalLM", "GPT2LMHeadModel", "Mamba2ForCausalLM"):
        assert f"{name}: same answers as before: True, said 1.0 s" in printed
