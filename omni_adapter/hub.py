"""Load parts by name, save and load what was added, share it.

Folders and Hub ids in, parts out, and back. Only safetensors and JSON are read and written; a base, encoder
or codec that is not the one a checkpoint was made with is refused. Knows nothing of decoding or training.
"""

import copy
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from omni_adapter.audio.codec import Codec, SnacCodec
from omni_adapter.config import FORMAT_VERSION, OmniConfig, PartRef, dump, parse
from omni_adapter.errors import BackboneError, CheckpointError
from omni_adapter.model import OmniModel
from omni_adapter.modules.audio_encoder import AudioEncoder
from omni_adapter.tensor_files import read_safetensors

logger = logging.getLogger(__name__)

CONFIG_FILE = "omni_config.json"
WEIGHTS_FILE = "omni_model.safetensors"
LORA_FOLDER = "lora"
PARTS = ("base", "encoder", "codec")
_MAX_CONFIG_BYTES = 1 << 20
_FILES_OF_A_TALKER = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "preprocessor_config.json",
    "lora/*",
    "base/*",
    "encoder/*",
    "codec/*",
)


@dataclass(frozen=True)
class HubOptions:
    """Where and how to look for parts; names and meanings are those of transformers.

    Attributes:
        revision: branch, tag or commit.
        token: access token; None for the one that was logged in with.
        cache_dir: folder of downloads.
        local_files_only: never go to the network.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of ``from_pretrained``."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }


def load_base(
    base: str | Path | PreTrainedModel,
    *,
    tokenizer: Any,
    options: HubOptions,
    lm_arguments: Mapping[str, Any],
) -> tuple[PreTrainedModel, Any, PartRef]:
    """Return a causal LM, its tokenizer and how to name it.

    Args:
        base: Hub id, folder, or a loaded model.
        tokenizer: a loaded tokenizer; None to load the base's.
        options: where to look.
        lm_arguments: more arguments of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype``.

    Raises:
        BackboneError: if there is no causal LM or no tokenizer.
    """
    if isinstance(base, PreTrainedModel):
        name = str(base.config._name_or_path or "")
        lm = base
    else:
        name = str(base)
        lm = _load_lm(name, options, lm_arguments)
    if tokenizer is None:
        if not name:
            raise BackboneError("the base came as a loaded model without a name; pass its tokenizer= as well")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options.arguments())
        except (OSError, ValueError) as error:
            raise BackboneError(f"{name} has no tokenizer that transformers can load: {error}") from error
    return lm, tokenizer, PartRef(name, revision=getattr(lm.config, "_commit_hash", None))


def read_lm_config(name: str, *, options: HubOptions) -> PreTrainedConfig:
    """Return the config of a causal LM; code of others is never run.

    Raises:
        BackboneError: if there is no config, or it is not that of a causal LM.
    """
    try:
        config = AutoConfig.from_pretrained(name, **options.arguments())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{name} cannot be loaded as a causal LM: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BackboneError(
            f"{name} is a {type(config).__name__}, which has no causal LM in transformers; pass a decoder"
        )
    assert isinstance(config, PreTrainedConfig)
    return config


def load_encoder(encoder: Any, *, options: HubOptions) -> tuple[AudioEncoder, PartRef]:
    """Return an audio encoder and how to name it; ``encoder`` is a Hub id, a folder, or a loaded model."""
    if isinstance(encoder, AudioEncoder):
        return encoder, PartRef("")
    loaded = AudioEncoder.from_pretrained(encoder, **options.arguments())
    name = str(encoder) if isinstance(encoder, str | Path) else str(encoder.config._name_or_path or "")
    return loaded, PartRef(name, revision=options.revision)


def load_codec(codec: Any, *, options: HubOptions) -> tuple[Codec, PartRef]:
    """Return a codec and how to name it; ``codec`` is a Hub id or folder of SNAC, or a loaded codec."""
    if isinstance(codec, str | Path):
        return SnacCodec.from_pretrained(codec, **options.arguments()), PartRef(
            str(codec), revision=options.revision
        )
    return codec, PartRef("")


def check_fingerprint(part: str, ref: PartRef, found: Mapping[str, Any]) -> None:
    """Refuse a part that is not the one that a checkpoint was made with.

    Raises:
        CheckpointError: naming the first differing facts with both values.
    """
    differing = [key for key, value in ref.fingerprint.items() if _plain(found.get(key)) != _plain(value)]
    if differing:
        facts = "; ".join(
            f"{key} was {_short(ref.fingerprint[key])}, is {_short(found.get(key))}" for key in differing[:4]
        )
        raise CheckpointError(
            f"this {part} is not the one the checkpoint was made with ({ref.id or 'unnamed'}): {facts}; "
            f"load that {part}, or train again on this one"
        )


def fetch_folder(name: str | Path, *, options: HubOptions, subfolder: str = "") -> Path:
    """Return the local folder of a saved talker, downloading it if ``name`` is a Hub id.

    Raises:
        CheckpointError: if there is no such folder or repository, or it holds no talker.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _FILES_OF_A_TALKER]
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=patterns, **options.arguments()))
        except (HFValidationError, OSError) as error:
            raise CheckpointError(
                f"{name} is neither a folder nor a repository on the Hub: {error}"
            ) from error
    folder = folder / subfolder
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}, so no talker was saved there")
    return folder


def read_config(folder: Path) -> OmniConfig:
    """Read ``omni_config.json``.

    Raises:
        CheckpointError: if the file is too large, no JSON, or of a newer format.
        ConfigError: if a key is unknown or has a wrong value.
    """
    path = folder / CONFIG_FILE
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, at most {_MAX_CONFIG_BYTES} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(values).__name__}")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this version of omni-adapter reads {FORMAT_VERSION}; "
            "install the omni-adapter that wrote it, or save it again"
        )
    return parse(OmniConfig, values, source=str(path))


def part_location(ref: PartRef, folder: Path) -> str | Path:
    """Return where a part of the talker in ``folder`` lies: a Hub id or a folder.

    Raises:
        CheckpointError: if the reference leaves the folder or is empty.
    """
    if not ref.id:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names no id for one of its parts; pass it as an argument"
        )
    if not ref.id.startswith("./"):
        return ref.id
    if ref.id[2:] not in PARTS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {ref.id!r} is not one of {', '.join(PARTS)} inside the folder"
        )
    return folder / ref.id[2:]


def save_added(folder: Path, model: OmniModel, *, config: OmniConfig, with_lora: bool = True) -> None:
    """Write config, added weights and LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.added_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if with_lora and model.backbone.has_lora:
        model.backbone.save_lora(folder / LORA_FOLDER)
    text = json.dumps(dump(config), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_added(folder: Path, model: OmniModel) -> None:
    """Load added weights and LoRA into a freshly built model.

    Raises:
        CheckpointError: if tensors are unknown, missing, wrongly shaped or not finite.
    """
    own = dict(model.added_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in own.items()}
    for name, tensor in read_safetensors(folder / WEIGHTS_FILE, expected=expected).items():
        own[name].data.copy_(tensor)
    if (folder / LORA_FOLDER).is_dir():
        model.backbone.load_lora(folder / LORA_FOLDER)


def save_parts(
    folder: Path, names: Collection[str], *, config: OmniConfig, lm: PreTrainedModel, tokenizer: Any,
    encoder: AudioEncoder, codec: Codec,
) -> OmniConfig:  # fmt: skip
    """Write whole parts beside the added weights and return a config that refers to them.

    Raises:
        CheckpointError: if a part is unknown, or one that is not written has no name to refer to.
    """
    unknown = set(names) - set(PARTS)
    if unknown:
        raise CheckpointError(
            f"parts that can be saved are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}"
        )
    for part in PARTS:
        if part not in names and not getattr(config, part).id:
            raise CheckpointError(
                f"the {part} came as a loaded model without a name, so it cannot be referred to; "
                f"pass include=({part!r},) to save it beside, or wrap it by its Hub id"
            )
    if "base" in names:
        lm.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    if "encoder" in names:
        encoder.save_pretrained(folder / "encoder")
    if "codec" in names:
        codec.save_pretrained(folder / "codec")
    moved = {part: replace(getattr(config, part), id=f"./{part}", revision=None) for part in names}
    return replace(config, **moved)


def plain_lm(model: OmniModel, *, merged: bool) -> PreTrainedModel:
    """Return the LM as transformers made it, LoRA merged or left out; a copy if there is LoRA."""
    if not model.backbone.has_lora:
        return model.backbone.lm
    backbone = copy.deepcopy(model.backbone)
    if merged:
        backbone.merge_lora()
    else:
        backbone.drop_lora()
    return backbone.lm


def write_model_card(folder: Path, *, config: OmniConfig, name: str) -> None:
    """Write ``README.md`` with the metadata that the Hub shows and a snippet that runs."""
    base = config.base.id if not config.base.id.startswith("./") else None
    data = ModelCardData(
        library_name="omni-adapter",
        pipeline_tag="any-to-any",
        base_model=base,
        license=_license_of(config.base.id) or "other",
        license_name=None if _license_of(config.base.id) else "that-of-the-base-model",
        tags=["speech", "speech-to-speech", "omni-adapter", "mini-omni"],
    )
    spec = config.codec_spec
    text = _CARD.format(
        metadata=data.to_yaml(),
        name=name,
        base=config.base.id,
        encoder=config.encoder.id,
        codec=config.codec.id,
        rows=spec.num_codebooks,
        rate=spec.sampling_rate,
        frame_rate=spec.frame_rate_hz,
        fusion=config.fusion,
        tts_layers=config.tts.layers,
        license=data.license,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    commit_message: str,
    revision: str | None,
) -> str:
    """Upload a folder to the Hub as one commit and return its address."""
    api = HfApi(token=token, library_name="omni-adapter")
    created = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=created.repo_id, folder_path=folder, commit_message=commit_message, revision=revision
    )
    return str(commit.commit_url)


_CARD = """---
{metadata}
---

# {name}

Hears and speaks: an audio adapter, {tts_layers} TTS blocks and {rows} parallel code heads on
[{base}](https://huggingface.co/{base}), made with
omni-adapter after [Mini-Omni](https://arxiv.org/abs/2408.16725).

```python
from omni_adapter import OmniAdapter

talker = OmniAdapter.from_pretrained("{name}")
reply = talker.chat("question.wav")
print(reply.text)  # reply.audio: float32 samples at reply.sampling_rate
```

| | |
|---|---|
| base model | {base} (only what was added is stored here) |
| audio encoder | {encoder} |
| codec | {codec}: {rows} code rows, {frame_rate:.2f} frames a second, {rate} Hz |
| fusion | {fusion} |
| tasks | asr, tts, speech to text, speech to speech, text to speech, text to text |
| licence | that of the base model: {license} |
"""


def _load_lm(name: str, options: HubOptions, lm_arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Load a causal LM from safetensors; code and pickles of others are never run."""
    read_lm_config(name, options=options)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True, **options.arguments(), **lm_arguments
        )
    except (OSError, ValueError) as error:
        raise BackboneError(f"{name} cannot be loaded as a causal LM: {error}") from error
    assert isinstance(lm, PreTrainedModel)
    return lm


def _license_of(base: str) -> str | None:
    """Licence that the base's own card states, None if it has no card at hand."""
    try:
        card = ModelCard.load(Path(base) / "README.md" if Path(base).is_dir() else base)
        return str(card.data.license) if card.data.license else None
    except (
        Exception
    ) as error:  # a card is a courtesy: no network, no repository and a broken card all mean the same
        logger.info("no licence found for %s: %s", base, error)
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
