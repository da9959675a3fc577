"""Mapped checkpoints: pages that were used go back, those that were written to stay."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from omni_adapter.engine.memory import MappedFiles

ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="pages can be told from one another on Linux only"
)
LIMIT_MB = 1600
"""Of the fast mode: a base of half a billion weights, encoder, codec and libraries."""


def resident_kb(tensor: torch.Tensor) -> int:
    """Memory that the mapping holds in which a tensor lies."""
    found = None
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            head = line.split(maxsplit=1)[0]
            if not head.endswith(":"):
                start, _, end = head.partition("-")
                found = int(start, 16) <= tensor.data_ptr() < int(end, 16)
            elif found and head == "Rss:":
                return int(line.split()[1])
    raise AssertionError("the tensor lies nowhere")


@pytest.fixture
def mapped(tmp_path):
    """A linear layer of 4 MB that lies in a file."""
    torch.manual_seed(0)
    save_file({"weight": torch.randn(1024, 1024)}, tmp_path / "model.safetensors")
    layer = nn.Linear(1024, 1024, bias=False)
    layer.weight = nn.Parameter(load_file(tmp_path / "model.safetensors")["weight"], requires_grad=False)
    return layer


@ON_LINUX
def test_pages_go_back_and_their_numbers_stay(mapped):
    before = mapped.weight.sum()
    files = MappedFiles()
    assert files.holds(mapped.weight)
    assert resident_kb(mapped.weight) > 3000
    files.release(mapped.weight)
    assert resident_kb(mapped.weight) < 200
    assert torch.equal(mapped.weight.sum(), before)


@ON_LINUX
def test_weights_go_back_after_each_use(mapped):
    files = MappedFiles()
    x = torch.randn(2, 1024)
    with files.released_after_use(mapped):
        inside = mapped(x)
        assert resident_kb(mapped.weight) < 200
    assert torch.equal(mapped(x), inside)
    assert not mapped._forward_hooks


@ON_LINUX
def test_what_was_written_to_stays(mapped):
    mapped.weight.mul_(2)
    before = mapped.weight.clone()
    files = MappedFiles()
    assert not files.holds(mapped.weight)
    files.release(mapped.weight)
    assert torch.equal(mapped.weight, before)


def test_weights_in_no_file_are_left_alone():
    weight = torch.randn(1024, 1024)
    before = weight.clone()
    files = MappedFiles()
    assert not files.holds(weight)
    files.release(weight)
    assert torch.equal(weight, before)


def test_elsewhere_nothing_happens(mapped, monkeypatch):
    monkeypatch.setattr(sys, "platform", "elsewhere")
    files = MappedFiles()
    assert not files.holds(mapped.weight)
    files.release(mapped.weight)


_BUILD = """
import json, pathlib, sys
from omni_adapter.bench.presets import random_talker
talker = random_talker("qwen2-0.5b", dtype="bfloat16")
vocabulary = talker.config.vocabulary
talker.model.code_heads.proj.weight.data[vocabulary.end :: vocabulary.size] = 0
talker.save_pretrained(sys.argv[1], include=("base", "encoder", "codec"))
path = pathlib.Path(sys.argv[1], "omni_config.json")
config = json.loads(path.read_text())
facts = config["base"]["fingerprint"]  # the words are made up, and their file counts one more
config["base"]["fingerprint"] = {key: facts[key] for key in facts if not key.startswith("tokenizer")}
path.write_text(json.dumps(config))
"""
_RUN = """
import json, resource, sys
import numpy as np
from omni_adapter import OmniAdapter
talker = OmniAdapter.from_pretrained(sys.argv[1], precision=sys.argv[2])
question = np.sin(np.arange(48_000) * 0.2).astype(np.float32) * 0.3, 16_000
reply = talker.chat(question, max_new_tokens=24)
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_mb": peak_kb * 1024 / 1e6, "steps": reply.steps, "audio": len(reply.audio)}))
"""


@ON_LINUX
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_of_the_fast_mode(tmp_path):
    """Loading from files, hearing 3 s and speaking, in a fresh process."""
    folder = str(tmp_path / "talker")
    subprocess.run([sys.executable, "-c", _BUILD, folder], check=True, timeout=900)
    run = subprocess.run(
        [sys.executable, "-c", _RUN, folder, "int8"], check=True, timeout=900, capture_output=True, text=True
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["steps"] == 24
    assert measured["audio"] > 0
    assert measured["peak_mb"] <= LIMIT_MB
