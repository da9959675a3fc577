"""Choices that the paper leaves open, tried on the tiny world: trained by the same recipes, judged alike.

    python examples/tiny_talker/ablations.py --out build/tiny --scale 0.15 [--only NAME ...] [--list]

The tiny world's parts in; ``OUT/ablations.json`` and ``OUT/ablations.md`` out. A variant is the shipped
recipe with a few settings given on its command line, nothing else, and a share of its steps. Variants that
are in the JSON are skipped, stages that two variants have in common are trained once, and a run that was
stopped goes on.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make import KINDS, ROOT
from make import plan as plan_of_all

from omni_adapter.data.layout import TASKS
from omni_adapter.training.stages import get_stage

_NONE: Mapping[str, Any] = {}


class Variant(NamedTuple):
    """One choice.

    Attributes:
        axis: what is chosen.
        name: what for.
        wrap: settings of the talker, given where the LM is wrapped.
        loss: settings of the loss, given to the stages that learn to speak.
        lm: settings of the LM, given to the stages in which it learns, 2 and 3.
        decoding: fields of ``GenerationSettings``.
    """

    axis: str
    name: str
    wrap: tuple[str, ...] = ()
    loss: tuple[str, ...] = ()
    lm: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = _NONE

    @property
    def key(self) -> str:
        """Names it among all."""
        return f"{self.axis}: {self.name}"

    def words(self, *, wraps: bool, speaks: bool, moves_lm: bool) -> Iterator[str]:
        """Yield what it adds to the command line of a stage, by what the stage does."""
        yield from (f"model.wrap.{setting}" for setting in self.wrap if wraps)
        yield from (f"loss.{setting}" for setting in self.loss if speaks)
        yield from (f"model.{setting}" for setting in self.lm if moves_lm)


BLOCKS, WEIGHTS = "TTS blocks", "weights of the rows"
VARIANTS: tuple[Variant, ...] = (
    Variant("recipe", "as shipped"),
    Variant("decoding", "parallel, not batch-parallel", decoding={"batch_parallel": False}),
    Variant(BLOCKS, "0", wrap=("tts_layers=0",)),
    *(
        Variant(BLOCKS, f"{layers}, {init}", wrap=(f"tts_layers={layers}", f"tts.init={init}"))
        for layers in (2, 6)
        for init in ("identity", "scaled")
    ),
    Variant("fusion", "mean", wrap=("fusion=mean",)),
    *(Variant("text lead", f"{steps} steps", wrap=(f"delay.text_lead={steps}",)) for steps in (2, 4)),
    Variant(WEIGHTS, "coarse codes more", loss=("row_weights=[2.0,1.5,0.5,0.5,1.5,0.5,0.5]",)),
    Variant(WEIGHTS, "text as much as all codes", loss=("text_weight=7.0",)),
    Variant("the LM in stages 2 and 3", "LoRA", lm=("lm=lora", "lora.rank=16")),
    Variant("the LM in stages 2 and 3", "full", lm=("lm=full",)),
)
"""The shipped recipe, then what differs from it."""


class Stage(NamedTuple):
    """One training run: its command, its folder, and the talker that it makes."""

    command: tuple[str, ...]
    folder: Path

    @property
    def talker(self) -> Path:
        """Folder of the result."""
        return self.folder / "talker"


def plan(variant: Variant, out: Path, *, kind: str, scale: float) -> list[Stage]:
    """Return the training runs of a variant: those of ``make.py``, with its settings, in folders of its own.

    Args:
        variant: what to train.
        out: folder of everything; runs with the same settings have the same folder in its ``ablations``.
        kind: architecture of the LM.
        scale: share of the steps of the shipped configs.
    """
    stages: list[Stage] = []
    told: list[str] = []
    for part in plan_of_all(out, kind=kind):
        if "--config" not in part.command:
            continue
        command = list(part.command)
        config = Path(command[command.index("--config") + 1])
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        learning = get_stage(values["stage"])
        tasks = values["data"].get("tasks") or learning.tasks
        added = variant.words(
            wraps=not stages, speaks=any(TASKS[task].speaks for task in tasks), moves_lm=learning.trains_lm
        )
        words = [*_shortened(values, scale), *added]
        told.extend((part.name, config.read_text(encoding="utf-8"), *words))
        digest = hashlib.blake2b("\n".join((kind, *told)).encode(), digest_size=4).hexdigest()
        run = out / "ablations" / f"{part.name}-{digest}"
        command = [f"out={run}" if word.startswith("out=") else word for word in command]
        if stages:
            command[command.index("--start") + 1] = str(stages[-1].talker)
        stages.append(Stage((*command, "watch.progress=false", *words), run))
    return stages


def _shortened(values: Mapping[str, Any], scale: float) -> Iterator[str]:
    """A share of the steps of a stage, and of those in which its rate rises."""
    for key in ("num_steps", "warmup_steps"):
        if key in values["optim"]:
            yield f"optim.{key}={max(1, round(scale * values['optim'][key]))}"


def train(stages: Sequence[Stage]) -> float:
    """Make the runs that are not there; return their seconds, of earlier ones too.

    Raises:
        RuntimeError: if a recipe fails.
    """
    seconds = 0.0
    for stage in stages:
        clock = stage.folder / "seconds.json"
        if not (stage.talker / "omni_config.json").is_file():
            print(f"  {shlex.join(stage.command)}", flush=True)
            started = time.monotonic()
            done = subprocess.run(stage.command, cwd=ROOT, check=False)
            if done.returncode or not (stage.talker / "omni_config.json").is_file():
                raise RuntimeError(
                    f"{stage.folder.name} ended with exit code {done.returncode}; "
                    "the same command goes on from there"
                )
            clock.write_text(json.dumps(time.monotonic() - started), encoding="utf-8")
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
        seconds += json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
    return seconds


def judge(talker: Path, world: Path, *, count: int, jobs: int, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a talker on held-out questions, asked by seen voices."""
    from evaluate import Ears, choose, examine, read_world, summarise

    from omni_adapter import OmniAdapter

    known = read_world(world)
    found = examine(
        OmniAdapter.from_pretrained(talker, dtype="float32"),
        choose(known.questions, count),
        Ears(known.words, jobs=jobs),
        voices=("seen",),
        **decoding,
    )
    figures = summarise(found)
    spoken = figures["spoken_replies"]["seen"]
    return {
        "questions": figures["questions"],
        "answer from text": figures["text_answers"]["from text"]["value"],
        "answer from speech": figures["text_answers"]["from speech, seen voices"]["value"],
        "transcript WER": figures["transcripts"]["seen"]["wer"]["value"],
        "reply WER": spoken["wer"]["value"],
        "reply WER against own text": spoken["wer_against_own_text"]["value"],
        "codec WER": figures["ceilings"]["codec"]["wer"]["value"],
        "ended by itself": figures["endings"]["value"],
        "intervals": {
            "answer from speech": _bounds(figures["text_answers"]["from speech, seen voices"]),
            "transcript WER": _bounds(figures["transcripts"]["seen"]["wer"]),
            "reply WER": _bounds(spoken["wer"]),
        },
    }


def _bounds(entry: Mapping[str, float]) -> list[float]:
    return [entry["low"], entry["high"]]


def read_results(path: Path) -> dict[str, Any]:
    """Return the results so far, by key of the variant."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def is_done(results: Mapping[str, Any], variant: Variant, budget: Mapping[str, Any]) -> bool:
    """Tell whether a variant was judged with the same budget."""
    entry = results.get(variant.key)
    return entry is not None and entry["budget"] == budget and entry["settings"] == describe(variant)


def describe(variant: Variant) -> dict[str, Any]:
    """Return what a variant changes, as JSON."""
    changes = variant._asdict().items()
    return {
        name: dict(value) if isinstance(value, Mapping) else list(value)
        for name, value in changes
        if name not in ("axis", "name")
    }


FIGURES = (
    "answer from text", "answer from speech", "transcript WER", "reply WER", "reply WER against own text",
    "ended by itself",
)  # fmt: skip


def write_table(results: Mapping[str, Any]) -> str:
    """Return the results in Markdown, in the order of ``VARIANTS``."""
    known = [variant for variant in VARIANTS if variant.key in results]
    lines = [f"| choice | | {' | '.join(FIGURES)} |", f"|---|---|{'---|' * len(FIGURES)}"]
    for variant in known:
        figures = [f"{100 * results[variant.key]['figures'][name]:.1f} %" for name in FIGURES]
        lines.append(f"| {variant.axis} | {variant.name} | {' | '.join(figures)} |")
    if known:
        figures, budget = (results[known[0].key][key] for key in ("figures", "budget"))
        lines += [
            "",
            f"{figures['questions']} held-out questions, seen voices; {budget['scale']:g} of the recipe's "
            f"steps; the codec's own WER is {100 * figures['codec WER']:.1f} %.",
        ]
    return "\n".join([*lines, ""])


def run(arguments: argparse.Namespace) -> None:
    """Train and judge every variant that is missing."""
    out: Path = arguments.out
    chosen = [variant for variant in VARIANTS if not arguments.only or variant.key in arguments.only]
    path = out / "ablations.json"
    budget = {"scale": arguments.scale, "questions": arguments.questions}
    for variant in chosen:
        stages = plan(variant, out, kind=arguments.kind, scale=arguments.scale)
        if arguments.list:
            done = "done" if is_done(read_results(path), variant, budget) else "    "
            print(f"{done} {variant.key}: {' '.join(stage.folder.name for stage in stages)}")
            continue
        if is_done(read_results(path), variant, budget):
            print(f"{variant.key}: is there", flush=True)
            continue
        print(f"{variant.key}", flush=True)
        seconds = train(stages)
        figures = judge(
            stages[-1].talker,
            out / "world",
            count=arguments.questions,
            jobs=arguments.jobs,
            decoding=variant.decoding,
        )
        entry = {
            "budget": budget, "settings": describe(variant), "seconds": round(seconds, 1), "figures": figures,
        }  # fmt: skip
        results = {**read_results(path), variant.key: entry}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        path.with_suffix(".md").write_text(write_table(results), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Try what the paper leaves open, on the tiny world.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder of everything")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="architecture of the LM")
    parser.add_argument("--scale", type=float, default=0.15, help="share of the recipe's steps")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions to judge by")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that listen")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="keys of variants, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show the variants and stop")
    arguments = parser.parse_args()
    known = {variant.key for variant in VARIANTS}
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"no variant is called {', '.join(unknown)}; --list shows them")
    run(arguments)
    if not arguments.list:
        print((arguments.out / "ablations.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
