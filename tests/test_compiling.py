"""Sources are compiled once, kept, and done without where that fails."""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from omni_adapter import compiling
from omni_adapter.compiling import cache_folder, compiled, find_compiler, why_not
from omni_adapter.engine.glue import glue

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler here")

SOURCE = "int omni_answer(void) { return 42; }\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def source_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "answer.c"
    path.write_text(text)
    return path


@needs_compiler
def test_a_source_is_compiled_once_and_anew_when_it_changed(tmp_path, monkeypatch):
    source = source_of(tmp_path, SOURCE)
    assert compiled(source).omni_answer() == 42
    kept = list(cache_folder().iterdir())
    assert [path.suffix for path in kept] == [".so"], "nothing else is left behind"

    compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_compile", lambda *args: pytest.fail("compiled twice"))
        assert compiled(source).omni_answer() == 42

    compiled.cache_clear()
    source_of(tmp_path, SOURCE.replace("42", "43"))
    assert compiled(source).omni_answer() == 43
    assert len(list(cache_folder().iterdir())) == 2


@needs_compiler
def test_a_source_that_does_not_compile_is_done_without_and_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="omni_adapter"):
        assert compiled(source_of(tmp_path, "this is no C;")) is None
    assert "did not compile it" in caplog.text
    assert "error" in caplog.text
    assert not list(cache_folder().iterdir())


@pytest.mark.parametrize("named", ["no-such-compiler", "false"])
def test_without_a_working_compiler_steps_go_on(tmp_path, monkeypatch, caplog, named):
    monkeypatch.setenv("CC", named)
    with caplog.at_level(logging.INFO, logger="omni_adapter"):
        assert compiled(source_of(tmp_path, SOURCE)) is None
    assert "steps go on without" in caplog.text
    assert named in why_not(tmp_path / "answer.c") or "no C compiler" in why_not(tmp_path / "answer.c")


@needs_compiler
def test_compiling_can_be_forbidden(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNI_ADAPTER_NATIVE", "0")
    source = source_of(tmp_path, SOURCE)
    assert compiled(source) is None
    assert why_not(source) == "OMNI_ADAPTER_NATIVE=0 forbids it"
    monkeypatch.delenv("OMNI_ADAPTER_NATIVE")
    compiled.cache_clear()
    assert why_not(source) == ""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="other linkers tell otherwise")
def test_a_source_that_lacks_something_is_done_without(tmp_path):
    source = source_of(tmp_path, "int missing(void);\nint omni_answer(void) { return missing(); }\n")
    assert compiled(source) is None
    assert "undefined reference to `missing'" in why_not(source)


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_done_without(tmp_path):
    source = source_of(tmp_path, SOURCE)
    compiling._built(source).write_bytes(b"cut off")
    assert compiled(source) is None
    assert why_not(source)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled(source_of(tmp_path, SOURCE)).omni_answer() == 42


@needs_compiler
def test_a_user_without_a_home_is_no_obstacle(tmp_path, monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert compiled(source_of(tmp_path, SOURCE)).omni_answer() == 42


@needs_compiler
def test_two_processes_at_once(tmp_path):
    source = source_of(tmp_path, SOURCE)
    code = "import sys; from pathlib import Path; from omni_adapter.compiling import compiled; "
    code += "print(compiled(Path(sys.argv[1])).omni_answer())"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42", "42"]
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's libraries")
@pytest.mark.skipif(glue() is None, reason="no C compiler here")
def test_threads_are_those_of_torch():
    assert torch.get_num_threads() >= 1
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {Path(line.split()[-1]) for line in lines if "libgomp" in line}
    torchs_own = set((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    others = {path for path in runtimes - torchs_own if "site-packages" not in path.parts}
    assert not (torchs_own and others)
