"""Choices that the paper leaves open, tried on the tiny world: trained by the same recipes, judged alike.

    python examples/tiny_talker/ablations.py --out build/tiny [--scale 0.4] [--only NAME ...] [--list]

What ``make.py`` made in; ``OUT/ablations.json`` and ``OUT/ablations.md`` out. A choice is tried where it
matters: what speaking depends on in the stage that learns to speak, how the LM learns in stages 2 and 3, on
from the recipe's stage 1, and decoding with the finished talker. A variant is the shipped recipe with a few
settings given on its command line, nothing else, and a share of its steps. Variants that are in the JSON are
skipped, and a run that was stopped goes on.
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

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make import KINDS, ROOT
from make import plan as plan_of_all

_NONE: Mapping[str, Any] = {}


class Trial(NamedTuple):
    """Where choices are tried.

    Attributes:
        name: what it is called.
        parts: parts of ``make.py`` that are trained for it; none for the finished talker.
        figures: what is judged.
    """

    name: str
    parts: tuple[str, ...]
    figures: tuple[str, ...]


READING = Trial("speaking", ("speak",), ("reading WER", "codec WER", "ended by itself"))
ANSWERING = Trial(
    "answering",
    ("adapt", "finetune"),
    ("answer from text", "answer from speech", "transcript WER", "reply WER", "ended by itself"),
)
DECODING = Trial("decoding", (), ANSWERING.figures)
TRIALS = (READING, ANSWERING, DECODING)


class Variant(NamedTuple):
    """One choice.

    Attributes:
        trial: where it is tried.
        axis: what is chosen.
        name: what for.
        settings: given on the command line of each stage.
        decoding: fields of ``GenerationSettings``.
    """

    trial: Trial
    axis: str
    name: str
    settings: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = _NONE

    @property
    def key(self) -> str:
        """Names it among all."""
        return f"{self.axis}: {self.name}"


SHIPPED = "as shipped"
BLOCKS, WEIGHTS, LM = "TTS blocks", "weights of the rows", "the LM in stages 2 and 3"
VARIANTS: tuple[Variant, ...] = (
    Variant(READING, "speaking", SHIPPED),
    Variant(READING, BLOCKS, "0", ("model.wrap.tts_layers=0",)),
    *(
        Variant(
            READING, BLOCKS, f"{layers}, {init}",
            (f"model.wrap.tts_layers={layers}", f"model.wrap.tts.init={init}"),
        )
        for layers in (2, 6)
        for init in ("identity", "scaled")
    ),
    Variant(READING, "fusion", "mean", ("model.wrap.fusion=mean",)),
    *(
        Variant(READING, "text lead", f"{steps} steps", (f"model.wrap.delay.text_lead={steps}",))
        for steps in (2, 4)
    ),
    Variant(READING, WEIGHTS, "alike", ("loss.row_weights=null",)),
    Variant(ANSWERING, "answering", SHIPPED),
    Variant(ANSWERING, WEIGHTS, "text as much as each row of codes", ("loss.text_weight=1.0",)),
    Variant(ANSWERING, LM, "LoRA", ("model.lm=lora", "model.lora.rank=16", "optim.group_rates={}")),
    Variant(DECODING, "decoding", "batch-parallel, as shipped"),
    Variant(DECODING, "decoding", "parallel", decoding={"batch_parallel": False}),
)  # fmt: skip
"""The shipped recipe, and what differs from it, trial by trial."""


class Stage(NamedTuple):
    """One training run.

    Attributes:
        command: what makes it.
        folder: where it runs.
        talker: folder of its result.
    """

    command: tuple[str, ...]
    folder: Path
    talker: Path


def plan(variant: Variant, out: Path, *, kind: str, scale: float) -> list[Stage]:
    """Return the training runs of a variant: parts of ``make.py``, with its settings, in folders of its own.

    Args:
        variant: what to train.
        out: folder of everything; runs with the same settings have the same folder in its ``ablations``.
        kind: architecture of the LM.
        scale: share of the steps of the shipped configs.
    """
    stages: list[Stage] = []
    told: list[str] = []
    for part in plan_of_all(out, kind=kind):
        if part.name not in variant.trial.parts:
            continue
        command = list(part.command)
        config = Path(command[command.index("--config") + 1]).read_text(encoding="utf-8")
        words = [*_shortened(yaml.safe_load(config), scale), *variant.settings]
        told.extend((part.name, config, *words))
        digest = hashlib.blake2b("\n".join((kind, *told)).encode(), digest_size=4).hexdigest()
        run = out / "ablations" / f"{part.name}-{digest}"
        command = [f"out={run}" if word.startswith("out=") else word for word in command]
        if stages:
            command[command.index("--start") + 1] = str(stages[-1].talker)
        command += ["watch.progress=false", *words]
        stages.append(Stage(tuple(command), run, run / part.result.parent.name))
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


def judge(
    trial: Trial, talker: Path, world: Path, *, count: int, jobs: int, decoding: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of a talker on held-out questions, or on reading out their answers."""
    from evaluate import Ears, choose, read_world

    from omni_adapter import OmniAdapter

    known = read_world(world)
    this = OmniAdapter.from_pretrained(talker, dtype="float32")
    ears, questions = Ears(known.words, jobs=jobs), choose(known.questions, count)
    if trial is READING:
        return _judge_reading(this, questions, ears)
    return _judge_answers(this, questions, ears, decoding)


def _judge_reading(talker: Any, questions: list[Any], ears: Any) -> dict[str, Any]:
    """Figures of reading answers out."""
    from evaluate import ask_all, decode, reply_clips
    from judge import count_word_errors

    texts = [question.answer for question in questions]
    asked = [[{"role": "user", "content": text}] for text in texts]
    replies = ask_all(talker, asked, task="tts")
    codes = [torch.tensor(question.codes) for question in questions]
    read = count_word_errors(texts, ears.hear(reply_clips(replies)))
    ceiling = count_word_errors(texts, ears.hear(decode(talker, codes)))
    ended = [reply.finish_reason == "end" for reply in replies]
    return {
        "questions": len(questions),
        "reading WER": read.rate,
        "codec WER": ceiling.rate,
        "ended by itself": sum(ended) / len(ended),
        "intervals": {"reading WER": read.interval()[1:]},
    }


def _judge_answers(
    talker: Any, questions: list[Any], ears: Any, decoding: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures of answers to questions in seen voices."""
    from evaluate import examine, summarise

    figures = summarise(examine(talker, questions, ears, voices=("seen",), **decoding))
    spoken = figures["spoken_replies"]["seen"]
    return {
        "questions": figures["questions"],
        "answer from text": figures["text_answers"]["from text"]["value"],
        "answer from speech": figures["text_answers"]["from speech, seen voices"]["value"],
        "transcript WER": figures["transcripts"]["seen"]["wer"]["value"],
        "reply WER": spoken["wer"]["value"],
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
    return {
        "trial": variant.trial.name,
        "settings": list(variant.settings),
        "decoding": dict(variant.decoding),
    }


def write_tables(results: Mapping[str, Any]) -> str:
    """Return the results in Markdown, a table for each trial, in the order of ``VARIANTS``."""
    lines: list[str] = []
    for trial in TRIALS:
        known = [variant for variant in VARIANTS if variant.trial is trial and variant.key in results]
        if not known:
            continue
        lines += [f"| choice | | {' | '.join(trial.figures)} |", f"|---|---|{'---|' * len(trial.figures)}"]
        for variant in known:
            figures = [f"{100 * results[variant.key]['figures'][name]:.1f} %" for name in trial.figures]
            lines.append(f"| {variant.axis} | {variant.name} | {' | '.join(figures)} |")
        figures, budget = (results[known[0].key][key] for key in ("figures", "budget"))
        trained = f"{budget['scale']:g} of the recipe's steps" if trial.parts else "the finished talker"
        lines += ["", f"{figures['questions']} held-out questions; {trained}.", ""]
    return "\n".join(lines)


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
            variant.trial,
            stages[-1].talker if stages else out / f"talker-{arguments.kind}",
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
        path.with_suffix(".md").write_text(write_tables(results), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Try what the paper leaves open, on the tiny world.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder of everything")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="architecture of the LM")
    parser.add_argument("--scale", type=float, default=0.4, help="share of the recipe's steps")
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
