"""The command line, as a user meets it: what it prints, what it writes, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from omni_adapter import __version__, cli

COMMANDS = (
    "talk",
    "listen",
    "transcribe",
    "say",
    "wrap",
    "import",
    "export",
    "push",
    "doctor",
    "bench",
    "data",
)
SHORT = ("--max-new-tokens", "30")
RATE = 24000


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder; the result has exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNI_ADAPTER_MODEL", raising=False)

    def run(*arguments: object):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "omni_adapter", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


# --- help ---


def test_help_names_every_command(run):
    shown = run("--help").stdout
    assert all(f" {name} " in shown for name in COMMANDS)
    assert run().stdout.strip() == shown.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: omni-adapter {command} " in " ".join(result.stdout.split())


def test_help_is_quick():
    code = "import sys, omni_adapter.cli; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_version(run):
    assert run("--version").stdout == f"omni-adapter {__version__}\n"


# --- talk ---


def test_talk_as_a_process(talker_folder, question, tmp_path):
    done = process("talk", question, "--model", talker_folder, *SHORT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "yst Tyst T offin\n")
    info = soundfile.info(tmp_path / "reply.wav")
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    assert info.duration > 1
    # one line closes the reply, and nothing else is said
    assert len(done.stderr.splitlines()) == 1
    for words in ("first sound after ", "real-time factor ", "saved to reply.wav", "cut off after 30 steps"):
        assert words in done.stderr


def test_talk_saves_what_the_library_says(run, talker, talker_folder, question):
    assert run("talk", question, "--model", talker_folder, *SHORT).exit_code == 0
    reply = talker.chat(question, max_new_tokens=30)
    samples, _ = soundfile.read("reply.wav", dtype="float32")
    np.testing.assert_allclose(samples, reply.audio, atol=1 / 32768)


def test_json_is_one_object(run, talker_folder, question):
    result = run("talk", question, "-m", talker_folder, "-o", "answer.wav", "--json", *SHORT)
    values = json.loads(result.stdout)
    assert list(values) == [
        "text", "out", "sampling_rate", "duration_s", "first_text_s", "first_audio_s", "elapsed_s",
        "real_time_factor", "steps", "finish_reason",
    ]  # fmt: skip
    assert (values["out"], values["sampling_rate"], values["steps"]) == ("answer.wav", RATE, 30)
    assert values["finish_reason"] == "length"
    assert values["duration_s"] == pytest.approx(soundfile.info("answer.wav").duration)
    assert values["first_audio_s"] <= values["elapsed_s"]
    assert values["real_time_factor"] == pytest.approx(values["elapsed_s"] / values["duration_s"])


def test_written_question_and_text_only_answer(run, talker, talker_folder):
    result = run("talk", "--text", "Hello!", "--no-speech", "--model", talker_folder, *SHORT)
    assert result.stdout == talker.chat(text="Hello!", speak=False, max_new_tokens=30).text + "\n"
    assert not Path("reply.wav").exists()
    assert "sound" not in result.stderr
    values = json.loads(
        run("talk", "--text", "Hello!", "--no-speech", "-m", talker_folder, "--json", *SHORT).stdout
    )
    assert values["out"] is values["duration_s"] is values["first_audio_s"] is None


def test_recording_text_and_system_go_together(run, talker, talker_folder, question):
    options = ("--text", "Be brief.", "--system", "You are a boat.", "--model", talker_folder, *SHORT)
    reply = talker.chat(question, text="Be brief.", system="You are a boat.", max_new_tokens=30)
    assert json.loads(run("talk", question, *options, "--json").stdout)["text"] == reply.text


def test_model_may_come_from_the_environment(run, talker_folder, monkeypatch):
    monkeypatch.setenv("OMNI_ADAPTER_MODEL", str(talker_folder))
    assert run("talk", "--text", "Hello!", *SHORT).exit_code == 0


def test_decoding_options_reach_the_library(run, talker_folder, monkeypatch):
    from omni_adapter import OmniAdapter, SamplingSettings

    seen = []

    def stream(self, audio, **arguments):
        seen.append(arguments["settings"])
        raise KeyboardInterrupt

    monkeypatch.setattr(OmniAdapter, "stream", stream)
    run("talk", "--text", "Hi", "-m", talker_folder)
    run(
        "talk", "--text", "Hi", "-m", talker_folder, "--seed", 5, "--stride", 2, "--no-batch-parallel",
        "--top-k", 3, "--repetition-penalty", 1.5, "--code-temperature", 0.5, "--code-top-p", 0.9,
    )  # fmt: skip
    plain, drawn = seen
    assert plain.text_sampling == plain.code_sampling == SamplingSettings()
    assert (drawn.seed, drawn.stride, drawn.batch_parallel) == (5, 2, False)
    assert drawn.text_sampling == SamplingSettings(do_sample=True, top_k=3, repetition_penalty=1.5)
    assert drawn.code_sampling == SamplingSettings(do_sample=True, temperature=0.5, top_p=0.9)


def test_terminals_are_not_steered_by_what_a_model_writes():
    assert cli._printable("a\x1b[2Jb\r\n\tc‍") == "a�[2Jb�\n\tc‍"


def test_interrupted_replies_can_be_played(run, talker_folder, monkeypatch):
    from omni_adapter.audio.waveform import WavWriter

    write = WavWriter.write

    def write_once(self, chunk):
        if self.num_samples:
            raise KeyboardInterrupt
        write(self, chunk)

    monkeypatch.setattr(WavWriter, "write", write_once)
    result = run("talk", "--text", "Hello!", "-m", talker_folder, *SHORT)
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
    assert 0 < soundfile.info("reply.wav").frames < RATE


def test_ctrl_c_leaves_a_playable_file(talker_folder, question, tmp_path):
    line = [sys.executable, "-m", "omni_adapter", "talk", str(question), "-m", str(talker_folder)]
    line += ["--max-new-tokens", "1900"]
    with subprocess.Popen(
        line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    ) as talk:
        out, deadline_s = tmp_path / "reply.wav", time.monotonic() + 60
        while not (out.exists() and out.stat().st_size > 24_000) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        talk.send_signal(signal.SIGINT)
        messages = talk.communicate(timeout=60)[1]
    assert (talk.returncode, messages) == (130, "stopped\n")
    samples, rate = soundfile.read(out)
    assert rate == RATE
    assert len(samples) > 10_000


# --- the other ways to talk ---


def test_transcribe(run, talker, talker_folder, question):
    written = talker.transcribe(question, max_new_tokens=10).text
    assert run("transcribe", question, "-m", talker_folder, "--max-new-tokens", 10).stdout == written + "\n"
    values = json.loads(
        run("transcribe", question, "-m", talker_folder, "--max-new-tokens", 10, "--json").stdout
    )
    assert (values["text"], values["out"]) == (written, None)


def test_say(run, talker, talker_folder):
    result = run("say", "How are you?", "-m", talker_folder, "--out", "said.wav", *SHORT)
    assert result.stdout == "How are you?\n"
    reply = talker.say("How are you?", max_new_tokens=30)
    assert soundfile.info("said.wav").frames == len(reply.audio) > 0


class Microphone:
    """Hears silence, the question, and silence again."""

    question: Path
    events: list[str]

    def __init__(self, *, samplerate, channels, dtype, blocksize, callback):
        from omni_adapter.audio.waveform import read_waveform

        quiet = np.random.default_rng(0).normal(scale=1e-4, size=2 * samplerate).astype(np.float32)
        said = read_waveform(self.question, sampling_rate=samplerate).numpy()
        self.sound = np.concatenate((quiet, said, quiet, quiet))
        self.size, self.callback = blocksize, callback

    def __enter__(self):
        for start in range(0, len(self.sound), self.size):
            self.callback(self.sound[start : start + self.size, None], self.size, None, None)
        return self

    def __exit__(self, *error):
        self.events.append("microphone closed")


class Loudspeaker:
    """Keeps what is played."""

    played: list[np.ndarray]
    events: list[str]

    def __init__(self, *, samplerate, channels, dtype):
        assert (samplerate, channels, dtype) == (RATE, 1, "float32")

    def write(self, samples):
        self.played.append(samples[:, 0])

    def start(self):
        self.events.append("start")

    def stop(self):
        self.events.append("stop")

    def abort(self):
        self.events.append("abort")

    def close(self):
        self.events.append("close")


@pytest.fixture
def sounddevice(monkeypatch, question):
    """A stand-in for the package, with devices of its own."""
    module = types.ModuleType("sounddevice")
    module.PortAudioError = type("PortAudioError", (Exception,), {})
    module.played, module.events = [], []
    kept = {"question": question, "played": module.played, "events": module.events}
    module.InputStream = type("InputStream", (Microphone,), kept)
    module.OutputStream = type("OutputStream", (Loudspeaker,), kept)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


def test_play_plays_what_is_saved(run, talker_folder, sounddevice):
    assert run("talk", "--text", "Hello!", "-m", talker_folder, "--play", *SHORT).exit_code == 0
    saved, _ = soundfile.read("reply.wav", dtype="float32")
    np.testing.assert_allclose(np.concatenate(sounddevice.played), saved, atol=1 / 32768)
    assert sounddevice.events == ["start", "stop", "close"]


def test_ctrl_c_silences_the_loudspeaker(run, talker_folder, sounddevice, monkeypatch):
    from omni_adapter.audio.waveform import WavWriter

    def stop(self, chunk):
        raise KeyboardInterrupt

    monkeypatch.setattr(WavWriter, "write", stop)
    assert run("talk", "--text", "Hello!", "-m", talker_folder, "--play", *SHORT).exit_code == 130
    assert sounddevice.events == ["start", "abort", "close"]


def test_listen_once(run, talker_folder, sounddevice):
    result = run("listen", "--once", "-m", talker_folder, *SHORT)
    assert result.exit_code == 0
    assert "listening" in result.stderr
    assert "saved to reply.wav" in result.stderr
    assert sounddevice.events == ["microphone closed"]


def test_listen_remembers_the_conversation(run, talker_folder, sounddevice, monkeypatch):
    from omni_adapter.session import Session

    reply, asked = Session.reply, []

    def reply_twice(self):
        asked.append([message["role"] for message in self.messages])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return reply(self)

    monkeypatch.setattr(Session, "reply", reply_twice)
    result = run("listen", "--system", "You are a boat.", "-m", talker_folder, *SHORT)
    assert result.exit_code == 130
    assert asked == [["system", *["user", "assistant"] * turn] for turn in range(3)]


# --- wrap and export ---


@pytest.fixture(scope="module")
def grafts(talker_folder):
    return ("--encoder", talker_folder / "encoder", "--codec", talker_folder / "codec", "--tts-layers", 1)


def test_wrap_then_talk(run, talker_folder, grafts):
    result = run("wrap", talker_folder / "base", "--out", "mine", *grafts)
    assert result.exit_code == 0
    assert "M added parameters in mine; try: omni-adapter talk --text 'Hello!' --model mine" in result.stderr
    assert not Path("mine/base").exists()
    assert run("talk", "--text", "Hello!", "--model", "mine", *SHORT).exit_code == 0


def test_wrap_to_hear_in_blocks(run, talker_folder, grafts):
    arguments = ("wrap", talker_folder / "base", "--out", "mine", *grafts, "--encoder-block-seconds")
    refused(run(*arguments, 0.05), "must be a multiple of the encoder's 0.02 s a frame, got 0.05; try 0.04")
    assert run(*arguments, 0.4).exit_code == 0
    assert json.loads(Path("mine/omni_config.json").read_text())["encoder_block_seconds"] == 0.4


def test_wrap_with_parts_then_export(run, talker_folder, grafts):
    assert (
        run("wrap", talker_folder / "base", "--out", "mine", "--include", "base, codec", *grafts).exit_code
        == 0
    )
    assert {path.name for path in Path("mine").iterdir() if path.is_dir()} == {"base", "codec"}
    assert run("export", "mine", "--out", "whole").exit_code == 0
    assert {path.name for path in Path("whole").iterdir() if path.is_dir()} == {"base", "codec", "encoder"}
    first, second = (
        json.loads(run("talk", "--text", "Hello!", "--model", name, "--json", *SHORT).stdout)["text"]
        for name in ("mine", "whole")
    )
    assert first == second


# --- what cannot be done ---


def refused(result, *messages: str) -> None:
    """One line that starts with "error: " and holds the messages; code 2; nothing on stdout."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for message in messages:
        assert message in result.stderr


def write(name: str, samples: np.ndarray, subtype: str = "PCM_16") -> Path:
    soundfile.write(name, samples, 16000, subtype=subtype, format="WAV")
    return Path(name)


def make_bad(kind: str, question: Path) -> Path:
    """A recording that cannot be used."""
    path = Path(f"{kind}.wav")
    sound = np.sin(np.arange(16000) / 10).astype(np.float32)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("What is the capital of France?\n" * 30)
    elif kind == "header":
        path.write_bytes(question.read_bytes()[:44])
    elif kind == "truncated":
        path.write_bytes(question.read_bytes()[:20000])
    elif kind == "nan":
        sound[100] = np.nan
        write(path.name, sound, "FLOAT")
    elif kind == "silent":
        write(path.name, np.zeros(16000))
    elif kind == "loud":
        write(path.name, 100 * sound, "FLOAT")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "missing.wav does not exist; pass the path of an audio file"),
        ("folder", "folder.wav is a folder, not a recording; pass the path of an audio file"),
        ("empty", "empty.wav is empty: it holds no bytes"),
        ("header", "header.wav is empty: it holds no samples"),
        ("truncated", "truncated.wav is truncated: 19956 of"),
        ("text", "text.wav is not audio that can be read: "),
        ("nan", "nan.wav holds NaN or infinity after 0.0 s; clean it first"),
        ("silent", "silent.wav is silent: no sample above 0.0001; check the microphone or the file"),
        ("loud", "loud.wav: samples reach 100, expected -1..1; divide"),
    ],
)
@pytest.mark.parametrize("command", ["talk", "transcribe"])
def test_bad_recordings_are_refused_before_a_model_is_loaded(run, question, command, kind, message):
    refused(run(command, make_bad(kind, question), "--model", "not-loaded"), message)


def test_refusal_as_a_process():
    done = process("talk")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no question; pass a recording, --text 'a question', or both\n"


@pytest.mark.parametrize("kind", ["8-bit", "float", "48 kHz stereo"])
def test_usual_recordings_are_heard(run, talker_folder, question, kind):
    samples, rate = soundfile.read(question)
    if kind == "8-bit":
        soundfile.write("question.wav", samples, rate, subtype="PCM_U8")
    elif kind == "float":
        soundfile.write("question.wav", samples, rate, subtype="FLOAT")
    else:
        soundfile.write("question.wav", np.stack((samples, 0.5 * samples), axis=1), 48000)
    assert run("talk", "question.wav", "-m", talker_folder, "--no-speech", *SHORT).exit_code == 0


def test_no_question(run, talker_folder):
    refused(
        run("talk", "--model", talker_folder), "no question; pass a recording, --text 'a question', or both"
    )


def test_no_model_named(run):
    result = run("talk", "--text", "how much is six plus seven", "--out", "reply.wav")
    assert result.exit_code == 0
    assert "no model was named" in result.stderr
    assert result.stdout.strip() == "the answer is thirteen"
    assert soundfile.info("reply.wav").duration > 0.5


def test_models_that_are_none(run, talker_folder):
    Path("nothing").mkdir()
    talk = ("talk", "--text", "Hi", "--model")
    refused(
        run(*talk, "nothing"),
        "nothing is no saved talker: it has no omni_config.json; if it is a language model",
    )
    refused(run(*talk, talker_folder / "base"), f"wrap it first: omni-adapter wrap {talker_folder / 'base'}")
    refused(run(*talk, "some/talker"), "some/talker is neither a folder nor")
    refused(
        run(*talk, "../talker"), "../talker does not exist: there is no such folder, and the Hub's names are"
    )
    Path("nothing/omni_config.json").write_text("{")
    refused(run(*talk, "nothing"), "nothing/omni_config.json is not valid JSON")
    Path("nothing/omni_config.json").write_text('{"format_version": 99}')
    refused(run(*talk, "nothing"), "has format_version 99, this version of omni-adapter reads 1")


def test_bad_settings(run, talker_folder, question):
    talk = ("talk", question, "--model", talker_folder)
    refused(run(*talk, "--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0")
    refused(run(*talk, "--max-new-tokens", 3), "max_new_tokens must be at least 8 for speech")
    refused(run(*talk, "--stride", 0), "stride must be at least 1 frame, got 0")
    refused(run(*talk, "--temperature", -1), "temperature must be >= 0, got -1.0")
    refused(run(*talk, "--code-top-p", 0), "top_p must be in (0, 1], got 0.0")
    refused(run(*talk, "--device", "abacus"), "--device abacus cannot be used: ", "leave it out, or pass cpu")


def test_bad_places_for_the_reply(run, talker_folder, question):
    talk = ("talk", question, "--model", talker_folder, "--out")
    refused(run(*talk, "."), "--out . is a folder; name a file")
    refused(run(*talk, "no/such/reply.wav"), "--out no/such/reply.wav: the folder no/such does not exist")
    refused(run(*talk, question), f"--out {question} is the question itself; name another file")
    assert soundfile.info(question).frames > 0


def test_wrap_refusals(run, talker_folder, grafts):
    base = talker_folder / "base"
    refused(
        run("wrap", base, "--out", talker_folder, *grafts),
        "holds a talker already; remove it or name another",
    )
    Path("file").write_text("")
    refused(run("wrap", base, "--out", "file", *grafts), "--out file is a file; name a folder")
    Path("vit").mkdir()
    Path("vit/config.json").write_text('{"model_type": "vit"}')
    refused(run("wrap", "vit", "--out", "x", *grafts), "vit is a ViTConfig, which has no causal LM")
    refused(
        run("wrap", base, "--out", "x", *grafts, "--fusion", "mix"), "fusion: Input should be 'add' or 'mean'"
    )
    refused(
        run("wrap", base, "--out", "x", *grafts, "--include", "wheels"),
        "parts that can be saved are",
        "wheels",
    )
    refused(
        run("wrap", base, "--out", "x", "--encoder", base, "--codec", base), "hearing needs a Whisper model"
    )
    assert not Path("x/omni_config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("talk", "--unknown"),
        ("fly",),
        ("talk", "--seed", "seven"),
        ("say",),
        ("talk", "--dtype", "int1"),
        ("wrap", "x"),
    ],
)
def test_wrong_options_give_code_2_and_no_traceback(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: omni-adapter" in result.stderr
    assert "Traceback" not in result.stderr


def test_listening_without_the_package(run, talker_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    message = "needs sounddevice; run: pip install 'omni-adapter[mic]'"
    refused(run("listen", "-m", talker_folder), f"listening {message}")
    refused(run("talk", "--text", "Hi", "-m", talker_folder, "--play"), f"playing sound {message}")


def test_listening_without_a_device(run, talker_folder, sounddevice, monkeypatch):
    def refuse(**arguments):
        raise sounddevice.PortAudioError("Error querying device -1")

    monkeypatch.setattr(sounddevice, "InputStream", refuse)
    monkeypatch.setattr(sounddevice, "OutputStream", refuse)
    advice = "can be opened: Error querying device -1; connect one, or use files instead"
    refused(run("listen", "-m", talker_folder), f"no microphone {advice}")
    refused(run("talk", "--text", "Hi", "-m", talker_folder, "--play"), f"no loudspeaker {advice}")


def test_unexpected_errors_keep_their_traceback(tmp_path):
    code = "from omni_adapter import cli; cli.Decoding.settings = lambda self: 1 / 0; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "talk", "--text", "Hi"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


# --- a Hub that is far away ---


@pytest.mark.parametrize(
    ("error", "reachable"),
    [
        (None, True),
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), False),
        (urllib.error.URLError(ConnectionRefusedError()), False),
        (TimeoutError(), False),
        (urllib.error.HTTPError("https://hub", 403, "Forbidden", {}, None), True),
    ],
)
def test_only_a_hub_that_does_not_answer_is_unreachable(monkeypatch, error, reachable):
    def urlopen(request, timeout):
        assert request.get_method() == "HEAD"
        if error:
            raise error
        return types.SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert cli._is_reachable("https://hub") == reachable


def test_local_models_need_no_hub(run, talker_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_is_reachable", asked.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert run("talk", "--text", "Hi", "-m", talker_folder, "--no-speech", *SHORT).exit_code == 0
    assert asked == []
    result = run("talk", "--text", "Hi", "-m", "some/talker")
    assert len(asked) == 1
    note, error = result.stderr.splitlines()
    assert note == "https://huggingface.co cannot be reached; only what is on this machine is used"
    assert error.startswith("error: some/talker is neither")


def test_processes_do_not_ask_the_hub():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
