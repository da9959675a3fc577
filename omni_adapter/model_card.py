"""The README of a saved talker: metadata that the Hub shows, a snippet that runs, figures and samples.

Facts in, Markdown out. Knows nothing of models, weights or the network.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from omni_adapter.config import OmniConfig, PartRef
from omni_adapter.errors import CheckpointError

CARD_FILE = "README.md"
SAMPLES_FOLDER = "samples"
_MAX_CARD_BYTES = 1 << 20
_SAMPLE_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg"})


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the config.

    Attributes:
        name: Hub id or name of the talker, as the snippet loads it.
        num_added: parameters that were added to the base.
        evaluation: figures by name, such as ``{"WER, LibriSpeech test-clean": 0.061}``.
        samples: recordings of the talker, copied beside the card.
        datasets: what it was trained on: Hub id or name, and the licence of each.
    """

    name: str
    num_added: int
    evaluation: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[str | Path] = ()
    datasets: Mapping[str, str] = field(default_factory=dict)


def write_model_card(folder: Path, *, config: OmniConfig, facts: CardFacts) -> None:
    """Write ``README.md`` and the samples that it links.

    Raises:
        CheckpointError: if a sample is missing or no recording, or two have one name.
    """
    samples = _copy_samples(facts.samples, folder)
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
    if samples:
        players = [f'{name}\n\n<audio controls src="{SAMPLES_FOLDER}/{name}"></audio>\n' for name in samples]
        sections.append("## Samples\n\n" + "\n".join(players))
    (folder / CARD_FILE).write_text("\n".join(sections), encoding="utf-8")


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
    origin = _hub_id(base)
    known = base.license if base.license and "," not in base.license else None
    return ModelCardData(
        library_name="omni-adapter",
        pipeline_tag="any-to-any",
        base_model=origin,
        base_model_relation=("finetune" if _is_inside(base) else "adapter") if origin else None,
        license=known or "other",
        license_name="that-of-the-base-model" if known in (None, "other") else None,
        license_link=f"https://huggingface.co/{origin}" if origin and known in (None, "other") else None,
        datasets=[name for name in facts.datasets if name.count("/") == 1] or None,
        tags=["speech", "speech-to-speech", "omni-adapter", "mini-omni"],
    )


def _copy_samples(samples: Sequence[str | Path], folder: Path) -> list[str]:
    names = [Path(sample).name for sample in samples]
    for sample in map(Path, samples):
        if sample.suffix.lower() not in _SAMPLE_SUFFIXES or not sample.is_file():
            known = ", ".join(sorted(_SAMPLE_SUFFIXES))
            raise CheckpointError(f"a sample must be an existing recording ({known}), got {sample}")
        if names.count(sample.name) > 1:
            raise CheckpointError(f"two samples are called {sample.name}; rename one of them")
        (folder / SAMPLES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(sample, folder / SAMPLES_FOLDER / sample.name)
    return names


def _is_inside(part: PartRef) -> bool:
    return part.id.startswith("./")


def _hub_id(part: PartRef) -> str | None:
    """Hub id of a part, None if it came from elsewhere."""
    name = part.origin if _is_inside(part) else part.id
    return name if name and not Path(name).is_absolute() and name.count("/") == 1 else None


def _link(part: PartRef) -> str:
    origin = _hub_id(part)
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
