"""Sections about everything but speed: memory, start, and what precision costs.

A workshop in, rows of plain values out. Memory and start are measured in processes of their own.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from omni_adapter.bench.modes import MODES, REFERENCES, why_not
from omni_adapter.bench.presets import SHAPES
from omni_adapter.bench.probe import Probe
from omni_adapter.bench.reference import shape_of
from omni_adapter.bench.speed import Row
from omni_adapter.bench.workshop import Workshop
from omni_adapter.engine import relative_error
from omni_adapter.errors import OmniError
from omni_adapter.talker import OmniAdapter

_IMPORT = "import omni_adapter; omni_adapter.OmniAdapter"
_OWN_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \| (\s*)(\S+)")


def compare_startup(workshop: Workshop) -> dict[str, Any]:
    """Time the import of the package, and how much of it is ours."""
    workshop.say("startup: imports")
    _python("-c", _IMPORT)  # compiles what is not compiled yet
    rounds = max(workshop.settings.rounds // 2, 1)
    bare = [_timed("-c", "pass") for _ in range(rounds)]
    package = [_timed("-c", "import omni_adapter") for _ in range(rounds)]
    everything = [_timed("-c", _IMPORT) for _ in range(rounds)]
    own_s, total_s = own_import_time(_python("-X", "importtime", "-c", _IMPORT).stderr)
    return {
        "interpreter_s": min(bare),
        "import_s": min(package) - min(bare),
        "import_all_s": min(everything) - min(bare),
        "own_s": own_s,
        "traced_s": total_s,
    }


def own_import_time(trace: str) -> tuple[float, float]:
    """Seconds of the package's own modules, and of all, from what ``python -X importtime`` prints."""
    own = total = 0
    for match in _OWN_LINE.finditer(trace):
        microseconds, name = int(match[1]), match[4]
        total += microseconds
        own += microseconds if name.partition(".")[0] == "omni_adapter" else 0
    return own / 1e6, total / 1e6


def compare_memory(workshop: Workshop) -> dict[str, Any]:
    """Load each mode in a process of its own and let it answer."""
    names = [mode.name for mode in MODES if why_not(mode) is None]
    shape = None
    if workshop.is_random:
        plain = workshop.talker("plain")
        settings = workshop.settings
        shape = asdict(shape_of(plain, context_steps=settings.context_steps, post_layers=0))
        names += REFERENCES
        del plain
    workshop.release()
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for name in names:
        workshop.say(f"memory: {name}")
        probe = Probe(
            mode=name,
            source=workshop.source,
            device=str(workshop.device),
            threads=torch.get_num_threads(),
            seconds=workshop.settings.seconds,
            steps=workshop.settings.reply_steps // 2,
            stride=workshop.settings.stride,
            preset=SHAPES.get(workshop.name),
            shape=shape,
        )
        try:
            done = _python("-m", "omni_adapter.bench.probe", json.dumps(asdict(probe)))
        except OmniError as error:
            failures[name] = " ".join(str(error).split())
            continue
        rows.append({"mode": name, **json.loads(done.stdout.strip().splitlines()[-1])})
    return {"rows": rows, "not_available": failures}


def compare_error(workshop: Workshop) -> dict[str, Any]:
    """Say how far each precision is from float32, in the logits of all heads and in what is heard."""
    plain = workshop.talker("plain")
    steps = workshop.settings.error_steps
    generator = torch.Generator().manual_seed(0)
    rules = plain.processor.rules
    codes = torch.randint(
        rules.vocabulary.codebook_size, (1, rules.num_codebooks, steps), generator=generator
    )
    text = torch.randint(plain.model.backbone.vocab_size, (1, 1, steps), generator=generator)
    grid = torch.cat((codes, text), dim=1).to(workshop.device)
    expected = _outputs(plain, grid, workshop)
    rows = []
    for mode in workshop.modes():
        if mode.precision is None:
            continue
        workshop.say(f"error: {mode.name}")
        came = _outputs(workshop.talker(mode.name), grid, workshop)
        row: Row = {"mode": mode.name}
        for name, truth in expected.items():
            row[f"{name}_error"] = relative_error(came[name], truth)
            if name != "heard":
                same = came[name].argmax(dim=-1) == truth.argmax(dim=-1)
                row[f"{name}_agreement"] = float(same.float().mean())
        rows.append(row)
    return {"steps": steps, "rows": rows}


@torch.inference_mode()
def _outputs(talker: OmniAdapter, grid: Tensor, workshop: Workshop) -> dict[str, Tensor]:
    """Logits of a grid, and the embeddings of the question."""
    output = talker.model(grid)
    waveform, _ = workshop.question()
    log_mel, padding = talker.processor.log_mel, talker.config.encoder_padding
    window = log_mel.windows(waveform, padding=padding)[0]
    features = window.values[None].to(workshop.device)
    lengths = torch.tensor([window.length], device=workshop.device)
    frames = talker.model.audio_encoder(features, lengths, padding=padding).frames
    return {"text": output.text_logits.float(), "codes": output.code_logits.float(), "heard": frames.float()}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python.

    Raises:
        OmniError: if it fails; the message holds the last line that it wrote.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OmniError(f"a process of its own failed: {lines[-1]}")
    return done


def _timed(*arguments: str) -> float:
    started_s = time.perf_counter()
    _python(*arguments)
    return time.perf_counter() - started_s
