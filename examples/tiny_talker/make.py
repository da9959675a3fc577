"""Make the tiny talker from nothing: world, parts, three stages, judgement. What `make tiny` runs.

    python examples/tiny_talker/make.py [--out build/tiny] [--kind llama] [--until finetune] [--list]

Every part is a command of its own, shown before it runs; a part whose result is there is skipped, and one
that was stopped goes on where it was. The talker goes to OUT/talker, the judgement to OUT/report.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("llama", "qwen2", "mistral")


class Part(NamedTuple):
    """One step on the way.

    Attributes:
        name: what to call it.
        command: what makes it, run from the root of the repository.
        result: the file that is there once it is made.
    """

    name: str
    command: tuple[str, ...]
    result: Path


def script(name: str, *arguments: object) -> tuple[str, ...]:
    """A command that runs one of this folder's scripts."""
    return (sys.executable, str(HERE / f"{name}.py"), *map(str, arguments))


def recipe(stage: int, config: str, *arguments: object) -> tuple[str, ...]:
    """A command that runs one of the library's own recipes, unchanged."""
    path = ROOT / "recipes" / f"stage{stage}.py"
    return (
        sys.executable,
        str(path),
        "--config",
        str(HERE / "configs" / f"{config}.yaml"),
        *map(str, arguments),
    )


def plan(out: Path, *, kind: str = "llama") -> list[Part]:
    """Return all parts, in the order in which they are made.

    Args:
        out: folder of everything.
        kind: architecture of the LM; world, encoder and codec are the same for all.
    """
    world, encoder, codec, rows, dictation = (
        out / name for name in ("world", "encoder", "codec", "rows", "dictation")
    )
    lm = out / f"lm-{kind}"
    stages = {name: out / kind / name for name in ("speak", "hear", "adapt", "finetune")}
    # Where a stage keeps an average of the weights, that is what goes on.
    talkers = {
        name: folder / ("talker" if name == "speak" else "talker-average") for name, folder in stages.items()
    }
    written, answers, reading = (
        world / f"rows_{name}.jsonl" for name in ("written", "taught_coded", "reading_coded")
    )
    talker, report = out / f"talker-{kind}", out / f"report-{kind}"
    parts = ("--encoder", encoder, "--codec", codec)
    # What is taught comes last, so that its being there says that all are.
    to_encode = [
        world / f"rows_{name}.jsonl" for name in ("heldout_seen", "heldout_unseen", "reading", "taught")
    ]

    def prepare(name: str, source: Path, target: Path) -> Part:
        command = (sys.executable, ROOT / "recipes" / "prepare.py", source, "--out", target, *parts)
        return Part(name, tuple(map(str, command)), target / "prepared.json")

    def train(stage: int, name: str, *start: object, data: Sequence[Path]) -> Part:
        sources = (word for path in data for word in ("--data", path))
        command = recipe(stage, name, *start, *sources, f"out={stages[name]}")
        return Part(name, command, talkers[name] / "omni_config.json")

    return [
        Part("world", script("build_world", "--out", world), world / "rows_train.jsonl"),
        Part("lm", script("lm", "--kind", kind, "--world", world, "--out", lm), lm / "config.json"),
        Part(
            "encoder", script("encoder", "--world", world, "--out", encoder), encoder / "model.safetensors"
        ),
        Part("codec", script("codec", "--data", world, "--out", codec), codec / "model.safetensors"),
        Part(
            "codes", script("codec", "--data", world, "--out", codec, "--encode", *to_encode),
            world / "rows_taught_coded.jsonl",
        ),
        train(1, "speak", "--base", lm, *parts, data=(answers, reading)),
        prepare("rows", answers, rows),
        prepare("dictation", world / "rows_dictation.jsonl", dictation),
        train(1, "hear", "--start", talkers["speak"], data=(rows, dictation)),
        train(2, "adapt", "--start", talkers["hear"], data=(rows, dictation, written)),
        train(3, "finetune", "--start", talkers["adapt"], data=(rows, dictation, written, reading)),
        Part(
            "ship", script("ship", talkers["finetune"], "--out", talker), talker / "README.md",
        ),
        Part(
            "report",
            script(
                "evaluate", "--talker", talker, "--world", world, "--lm", lm, "--out", report,
                "--stages", *(f"{name}={folder}" for name, folder in talkers.items()),
            ),
            report / "report.json",
        ),
    ]  # fmt: skip


def make(parts: Sequence[Part]) -> None:
    """Make what is missing, in order; stop at the first part that fails."""
    for part in parts:
        if part.result.exists():
            print(f"{part.name}: is there ({part.result})", flush=True)
            continue
        print(f"{part.name}: {shlex.join(part.command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(part.command, cwd=ROOT, check=False)
        if done.returncode or not part.result.exists():
            sys.exit(
                f"{part.name} ended with exit code {done.returncode}; the same command goes on from there"
            )
        print(f"{part.name}: made in {(time.monotonic() - start) / 60:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny talker from nothing.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder of everything")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="architecture of the LM")
    parser.add_argument("--until", help="last part to make")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    arguments = parser.parse_args()
    parts = plan(arguments.out, kind=arguments.kind)
    names = [part.name for part in parts]
    if arguments.until is not None:
        if arguments.until not in names:
            parser.error(f"no part is called {arguments.until!r}; the parts are {', '.join(names)}")
        parts = parts[: names.index(arguments.until) + 1]
    if arguments.list:
        for part in parts:
            print(f"{part.name:10} {'made' if part.result.exists() else '    '} {shlex.join(part.command)}")
        return
    make(parts)


if __name__ == "__main__":
    main()
