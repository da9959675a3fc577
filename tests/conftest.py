"""What all tests share: a small untrained talker and real speech."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# No test asks the Hub for anything; one that tries fails at once. Read when the Hub's client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# On some processors a product of MKL, torch's library for matrices, depends in its last bits on where in
# memory its numbers lie, and tests compare bits. Read at the first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no accelerator."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.accelerator.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; torch finds none on this machine"))


@pytest.fixture(scope="session")
def parts():
    """Small random parts; tests must not change them."""
    from examples.untrained_talker import make_parts

    return make_parts()


@pytest.fixture(scope="session")
def talker_folder(tmp_path_factory) -> Path:
    """A saved untrained talker with all its parts."""
    from examples.untrained_talker import build_untrained_talker

    return build_untrained_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def talker(talker_folder):
    """The loaded talker; tests must not change it."""
    from omni_adapter import OmniAdapter

    return OmniAdapter.from_pretrained(talker_folder)


@pytest.fixture(scope="session")
def speak(tmp_path_factory):
    """Make a wav of real synthetic speech: ``speak("hello")``."""
    folder = tmp_path_factory.mktemp("speech")
    made: dict[str, Path] = {}

    def speak(text: str) -> Path:
        if text not in made:
            path = folder / f"{len(made)}.wav"
            program = shutil.which("espeak-ng")
            assert program, "tests need espeak-ng; run: make test, or apt-get install espeak-ng"
            subprocess.run([program, "-w", str(path), text], check=True)
            made[text] = path
        return made[text]

    return speak


@pytest.fixture(scope="session")
def question(speak) -> Path:
    """A spoken question."""
    return speak("What is the capital of France?")
