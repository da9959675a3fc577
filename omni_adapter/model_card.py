"""The README of a saved talker: metadata that the Hub shows, a snippet that runs, figures and samples.

Facts in, Markdown out. Knows nothing of models, weights or the network.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from omni_adapter.config import OmniConfig, PartRef
from omni_adapter.errors import CheckpointError

CARD_FILE = "README.md"
_TASK = "any-to-any"  # the Hub's name for it
SAMPLES_FOLDER = "samples"
SAMPLE_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg"})
_MAX_CARD_BYTES = 1 << 20
_OWN_CARD = (
    "<!-- Written by omni-adapter from the files beside it. Take this line out to keep a text of your own "
    "when the folder is pushed. -->"
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the config.

    Attributes:
        name: Hub id or name of the talker, as the snippet loads it.
        num_added: parameters that were added to the base.
        evaluation: figures by name: the measure, a comma and the data set, such as
            ``{"WER, LibriSpeech test-clean": 0.061}``.
        samples: recordings of the talker, which lie beside the card in the folder ``samples``.
        datasets: what it was trained on: Hub id or name, and the licence of each.
    """

    name: str
    num_added: int
    evaluation: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[str | Path] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)


def write_model_card(folder: Path, *, config: OmniConfig, facts: CardFacts) -> None:
    """Write ``README.md`` and copy the samples that it links.

    Raises:
        CheckpointError: if a sample is missing or no recording, or two have one name.
    """
    _copy_samples(facts.samples, folder)
    (folder / CARD_FILE).write_text(make_card(config, facts), encoding="utf-8")


def make_card(config: OmniConfig, facts: CardFacts) -> str:
    """Return the card's Markdown, with the metadata that the Hub reads at its top."""
    spec, base = config.codec_spec, config.base
    rows = {
        "base model": f"{_link(base)} ({'stored here' if _is_inside(base) else 'by reference'})",
        "licence of the base model": base.license or "see its card",
        "audio encoder": _link(config.encoder),
        "codec": f"{_link(config.codec)}: {spec.num_codebooks} code rows, {spec.frame_rate_hz:.2f} frames "
        f"a second, {spec.sampling_rate} Hz",
        "added parameters": f"{facts.num_added:,}",
        "TTS blocks": str(config.tts.layers),
        "fusion": config.fusion,
        "tasks": "asr, tts, speech to text, speech to speech, text to speech, text to text",
    }
    sections = [
        f"---\n{_metadata(config, facts).to_yaml()}\n---\n\n# {facts.name}\n",
        "Hears and speaks: an audio adapter, TTS blocks and parallel code heads grafted onto "
        f"{_link(base)} with omni-adapter, after [Mini-Omni](https://arxiv.org/abs/2408.16725).\n",
        _SNIPPET.format(name=json.dumps(facts.name)),
        _table(("", ""), rows),
    ]
    if facts.evaluation:
        figures = {name: f"{value:g}" for name, value in facts.evaluation.items()}
        sections.append("## Evaluation\n\n" + _table(("measure", "value"), figures))
    if facts.datasets:
        sections.append("## Training data\n\n" + _table(("data set", "licence"), facts.datasets))
    if facts.samples:
        names = [Path(sample).name for sample in facts.samples]
        players = [
            f'{name}\n\n<audio controls src="{SAMPLES_FOLDER}/{quote(name)}"></audio>\n' for name in names
        ]
        sections.append("## Samples\n\n" + "\n".join(players))
    return "\n".join([*sections, _OWN_CARD, ""])


def is_own_card(text: str) -> bool:
    """Tell whether a card is as ``make_card`` wrote it, so that a newer one may take its place."""
    return _OWN_CARD in text


def read_license(card: Path) -> str | None:
    """Licence that a model's card states, None if the card has none or cannot be read."""
    try:
        if card.stat().st_size > _MAX_CARD_BYTES:
            return None
        text = card.read_text(encoding="utf-8")
        found = ModelCard(text, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return None
    names = found if isinstance(found, list) else [found]
    return ", ".join(name for name in names if isinstance(name, str) and name) or None


def _metadata(config: OmniConfig, facts: CardFacts) -> ModelCardData:
    base = config.base
    origin = hub_id(base)
    known = base.license if base.license and "," not in base.license else None
    return ModelCardData(
        library_name="omni-adapter",
        pipeline_tag=_TASK,
        base_model=origin,
        base_model_relation=("finetune" if _is_inside(base) else "adapter") if origin else None,
        license=known or "other",
        license_name="that-of-the-base-model" if known in (None, "other") else None,
        license_link=f"https://huggingface.co/{origin}" if origin and known in (None, "other") else None,
        datasets=[name for name in facts.datasets if name.count("/") == 1] or None,
        tags=["speech", "speech-to-speech", "omni-adapter", "mini-omni"],
        model_name=facts.name,
        eval_results=_results(facts.evaluation) or None,
    )


def _results(evaluation: Mapping[str, float]) -> list[EvalResult]:
    """The figures that name their data set, in the form in which the Hub lists them (its ``model-index``)."""
    named = {tuple(part.strip() for part in name.split(",", 1)): value for name, value in evaluation.items()}
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=name[1] if name[1].count("/") == 1 else _slug(name[1]),
            dataset_name=name[1],
            metric_type=_slug(name[0]),
            metric_name=name[0],
            metric_value=value,
        )
        for name, value in named.items()
        if len(name) > 1 and all(map(_slug, name))
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _copy_samples(samples: Sequence[str | Path], folder: Path) -> None:
    names = [Path(sample).name for sample in samples]
    for sample in map(Path, samples):
        if sample.suffix.lower() not in SAMPLE_SUFFIXES or not sample.is_file():
            known = ", ".join(sorted(SAMPLE_SUFFIXES))
            raise CheckpointError(f"a sample must be an existing recording ({known}), got {sample}")
        if names.count(sample.name) > 1:
            raise CheckpointError(f"two samples are called {sample.name}; rename one of them")
        (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(sample, folder / SAMPLES_FOLDER / sample.name)


def _is_inside(part: PartRef) -> bool:
    return part.id.startswith("./")


def hub_id(part: PartRef) -> str | None:
    """Hub id of a part, None if it came from elsewhere."""
    name = part.origin if _is_inside(part) else part.id
    return name if name and not Path(name).is_absolute() and name.count("/") == 1 else None


def _link(part: PartRef) -> str:
    origin = hub_id(part)
    if origin:
        return f"[{origin}](https://huggingface.co/{origin})"
    return "a model of its own" if _is_inside(part) else Path(part.id).name or "a model without a name"


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())]) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


_SNIPPET = """```python
from omni_adapter import OmniAdapter

talker = OmniAdapter.from_pretrained({name})
reply = talker.chat("question.wav")
print(reply.text)  # reply.audio: float32 samples at reply.sampling_rate
```
"""
