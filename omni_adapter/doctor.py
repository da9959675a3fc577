"""Say what wrapping a base would do, before anything is downloaded or trained.

Names of a base, an encoder and a codec in, a ``Diagnosis`` out, as data or as a table. Works on configs and
the tokenizer: the models are built without weights, so that large ones cost no memory. Knows nothing of
decoding or training beyond what learns in each stage.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import snac
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

from omni_adapter import hub
from omni_adapter.audio.codec import SnacConfig, read_snac_config
from omni_adapter.backbone import Backbone
from omni_adapter.config import SNAC_24KHZ, OmniConfig, dump, parse
from omni_adapter.data.processor import OmniProcessor, find_text_end_ids
from omni_adapter.errors import BackboneError, CheckpointError, PromptError
from omni_adapter.model import ADDED_GROUPS, OmniModel
from omni_adapter.modules.audio_encoder import AudioEncoder
from omni_adapter.training.stages import LmMode, learning_groups

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LM_MODES: Mapping[str, LmMode] = {"align": "frozen", "adapt": "lora", "finetune": "full"}
_LEARNERS = (*ADDED_GROUPS, "lora", "language_model")

STAGES: Mapping[str, tuple[str, ...]] = {
    f"{number} {stage}": tuple(
        group for group in _LEARNERS if group in learning_groups(stage, lm_mode=lm_mode)
    )
    for number, (stage, lm_mode) in enumerate(_LM_MODES.items(), start=1)
}
"""Weight groups that learn in each training stage."""

_TRAINED_BYTES = 16  # a parameter that learns: weight, gradient and AdamW's two moments, float32 each
_CACHE_STEPS = 1000
_DTYPES = ("float32", "bfloat16")

_PUBLISHED_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "openai/whisper-small": {
        "d_model": 768,
        "encoder_layers": 12,
        "encoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
    }
}
"""Shapes of well-known encoders, for machines that cannot ask the Hub."""

_PUBLISHED_CODECS = {"hubertsiuzdak/snac_24khz": (SNAC_24KHZ, 19_842_914)}
"""Geometry and parameters of well-known codecs, likewise."""


@dataclass(frozen=True)
class BaseFacts:
    """What the base is.

    Attributes:
        name: as it was given.
        architecture: class of the model.
        model_type: key of the config class.
        parameters: weights, tied ones counted once.
        dtype: type of the weights in the files, or the one asked for.
        width: of the embeddings; None where the base cannot be fed embeddings.
        hidden_width: of the states that enter the head; None where that could not be seen.
        vocab_size: entries of the text logits.
        tied_head: whether embeddings and head share their weights.
        max_positions: steps that the positions reach; None if they have no end.
        chat_template: whether the tokenizer has one; None without a tokenizer.
        text_end_tokens: tokens that end an answer's text, by id.
        cache: kind of the state between steps; None where that could not be seen.
        cache_bytes: of that state after 1000 steps of one conversation.
        padding_is_exact: whether padded batches come out as single runs; None unless the weights were loaded.
    """

    name: str
    architecture: str
    model_type: str
    parameters: int
    dtype: str
    width: int | None = None
    hidden_width: int | None = None
    vocab_size: int | None = None
    tied_head: bool | None = None
    max_positions: int | None = None
    chat_template: bool | None = None
    text_end_tokens: dict[int, str] = field(default_factory=dict)
    cache: str | None = None
    cache_bytes: int | None = None
    padding_is_exact: bool | None = None


@dataclass(frozen=True)
class StageFacts:
    """What one training stage does.

    Attributes:
        trains: weight groups that learn.
        parameters: how many weights those are.
        memory_bytes: all weights, and gradients and AdamW states of those that learn; without activations.
    """

    trains: tuple[str, ...]
    parameters: int
    memory_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """What wrapping a base would do. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        base: the base.
        encoder: the audio encoder's name, width, steps of a full window.
        codec: the codec's name and geometry.
        groups: parameters of each weight group.
        stages: what learns in each training stage, and what that takes.
        inference_bytes: weights of the whole talker, by type of the base's weights.
        missing: what keeps the base from being wrapped, each with what to do.
        notes: what is good to know.
        skipped: checks that were not done, and why.
    """

    base: BaseFacts
    encoder: dict[str, Any]
    codec: dict[str, Any]
    groups: dict[str, int]
    stages: dict[str, StageFacts]
    inference_bytes: dict[str, int]
    missing: list[str]
    notes: list[str]
    skipped: list[str]


class _Encoder(NamedTuple):
    name: str
    module: AudioEncoder  # on shapes alone

    @property
    def window_steps(self) -> int:
        """Frames of a full window."""
        return self.module.num_steps(self.module.window_frames)


class _Codec(NamedTuple):
    name: str
    spec: Any
    parameters: int


@dataclass
class _Findings:
    """Collects what a diagnosis says in words."""

    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], T], *errors: type[Exception], what: str = "") -> T | None:
        """Return the result of ``action``; None if it raises one of ``errors``: what is missing."""
        try:
            return action()
        except errors as error:
            text = " ".join(str(error).split())
            self.missing.append(f"{what}: {text}" if what else text)
            return None


def diagnose(
    base: str | Path,
    *,
    encoder: str | Path = "openai/whisper-small",
    codec: str | Path = "hubertsiuzdak/snac_24khz",
    lora_rank: int = 16,
    dtype: str = "auto",
    load: bool = False,
    hub_options: hub.HubOptions | None = None,
    **settings: Any,
) -> Diagnosis:
    """Find out what wrapping a base would do.

    Args:
        base: Hub id or folder of a causal LM.
        encoder: Hub id or folder of a Whisper model.
        codec: Hub id or folder of a SNAC model.
        lora_rank: rank of the LoRA of stage 2.
        dtype: type of the base's weights in the estimates; ``auto`` takes that of the files.
        load: load the weights and try the model out as wrapping does; otherwise only the config is read.
        hub_options: revision, token and cache of the base.
        **settings: those of :meth:`OmniAdapter.wrap`, such as ``tts_layers`` and ``fusion``.

    Raises:
        BackboneError: if there is no such base, or it is no causal LM.
        ConfigError: if a setting is unknown or has a wrong value.
    """
    options, findings = hub_options or hub.HubOptions(), _Findings()
    config = hub.read_lm_config(str(base), options=options)
    with torch.device("meta"):
        lm = _build(config)
    used = _dtype_of(config) if dtype == "auto" else dtype
    facts = _facts_of_tokenizer(str(base), lm, options, findings)
    facts |= {"tied_head": _is_tied(lm), "dtype": used}
    _check_files(str(base), options, findings)
    found_encoder, found_codec = _find_encoder(str(encoder), findings), _find_codec(str(codec), findings)
    groups = {"language_model": _count(lm)}
    backbone = findings.attempt(lambda: Backbone(lm, probe=False), BackboneError)
    if backbone is not None:
        facts |= _facts_of_shapes(backbone, config, used, findings)
        if load:
            facts |= _facts_of_weights(str(base), options, findings)
        else:
            findings.skipped.append("runs of the real model: batches, cache and embeddings; pass --load")
        groups |= {"lora": _count_lora(lm, rank=lora_rank)}
        if found_encoder and found_codec:
            hidden_width = facts["hidden_width"] or facts["width"]
            model = _model_without_weights(backbone, hidden_width, found_encoder, found_codec, settings)
            groups |= {name: sum(p.numel() for p in model.groups()[name].values()) for name in ADDED_GROUPS}
    if found_encoder:
        groups["audio_encoder"] = _count(found_encoder.module)
        _check_positions(facts, found_encoder, findings)
    base_facts = BaseFacts(
        name=str(base),
        architecture=type(lm).__name__,
        model_type=str(config.model_type),
        parameters=groups["language_model"],
        **facts,
    )
    return Diagnosis(
        base=base_facts,
        encoder=_describe_encoder(found_encoder),
        codec=_describe_codec(found_codec),
        groups=groups,
        stages=_stages(groups, found_codec, used),
        inference_bytes=_inference_bytes(groups, found_codec),
        missing=findings.missing,
        notes=findings.notes,
        skipped=findings.skipped,
    )


# --- the base ---


def _facts_of_tokenizer(
    name: str, lm: PreTrainedModel, options: hub.HubOptions, findings: _Findings
) -> dict[str, Any]:
    tokenizer: Any = findings.attempt(
        lambda: hub.load_tokenizer(name, options),
        BackboneError,
        what="a tokenizer that can be loaded",
    )
    if tokenizer is None:
        return {}
    if not tokenizer.chat_template:
        findings.notes.append("no chat template: prompts are written plainly, as User: … and Assistant: …")
    ids = findings.attempt(
        lambda: find_text_end_ids(tokenizer, _eos_token_ids(name, lm, options)), PromptError
    )
    return {
        "chat_template": bool(tokenizer.chat_template),
        "text_end_tokens": {token: str(tokenizer.convert_ids_to_tokens(token)) for token in ids or ()},
    }


def _eos_token_ids(name: str, lm: PreTrainedModel, options: hub.HubOptions) -> list[int]:
    """Ids that the base's generation config, or else its config, stops at."""
    try:
        generation = GenerationConfig.from_pretrained(name, **options.arguments())
    except (OSError, ValueError):
        generation = lm.generation_config
    ids = generation.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _facts_of_shapes(
    backbone: Backbone, config: PreTrainedConfig, dtype: str, findings: _Findings
) -> dict[str, Any]:
    """What can be seen by running the model on shapes alone."""
    facts: dict[str, Any] = {
        "width": backbone.width,
        "vocab_size": backbone.vocab_size,
        "max_positions": backbone.max_positions,
    }
    steps = min(_CACHE_STEPS, backbone.max_positions or _CACHE_STEPS)
    try:
        hidden_width, cache, elements = _run_on_shapes(config, steps)
    except Exception as error:  # other people's code, in a mode that few of them know, may raise anything
        logger.info("%s does not run on shapes: %s", type(backbone.lm).__name__, error)
        findings.skipped.append("kind and size of the cache: this architecture does not run without weights")
        return {**facts, "hidden_width": None}
    size = elements * _CACHE_STEPS // steps * getattr(torch, dtype).itemsize
    if not cache:
        findings.notes.append("no cache: each step runs all before it again, so long replies become slow")
    return {**facts, "hidden_width": hidden_width, "cache": cache or "none", "cache_bytes": size}


def _build(config: PreTrainedConfig, **arguments: Any) -> PreTrainedModel:
    lm = AutoModelForCausalLM.from_config(config, **arguments)  # type: ignore[no-untyped-call]
    assert isinstance(lm, PreTrainedModel)
    lm.train(False)
    return lm


def _run_on_shapes(config: PreTrainedConfig, steps: int) -> tuple[int, str, int]:
    """Run the model without any weights; return the hidden width, and kind and numbers of its cache."""
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    level = fakes.level
    fakes.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            # The type is one that all kernels know; sizes are counted in numbers, not bytes.
            lm = _build(config, dtype=torch.bfloat16)
            backbone = Backbone(lm, probe=False)
            ids = torch.zeros(1, steps, dtype=torch.long)
            output = backbone(backbone.embed(ids), use_cache=True, logits_to_keep=1)
    finally:
        fakes.setLevel(level)
    assert output.cache is not None
    if backbone.replays:
        return output.hidden.shape[-1], "", 0
    states = output.cache.states.values()
    return output.hidden.shape[-1], ", ".join(_kind(state) for state in states), _elements(states, set())


def _kind(state: Any) -> str:
    """Class of a cache, and of its layers."""
    layers = Counter(type(layer).__name__ for layer in getattr(state, "layers", ()))
    inside = ", ".join(f"{count} × {name}" for name, count in layers.items())
    return f"{type(state).__name__} ({inside})" if inside else type(state).__name__


def _elements(value: Any, seen: set[int]) -> int:
    """Numbers in all tensors of a cache, each counted once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Mapping):
        return sum(_elements(item, seen) for item in value.values())
    if isinstance(value, list | tuple) or type(value).__name__ == "dict_values":
        return sum(_elements(item, seen) for item in value)
    if isinstance(value, nn.Module | PreTrainedConfig | type) or not hasattr(value, "__dict__"):
        return 0
    return sum(_elements(item, seen) for item in vars(value).values())


def _facts_of_weights(name: str, options: hub.HubOptions, findings: _Findings) -> dict[str, Any]:
    """Load the model and try it out, as wrapping does."""
    backbone = findings.attempt(lambda: _load_backbone(name, options, findings), BackboneError)
    if backbone is None:
        return {}
    facts = {"hidden_width": backbone.hidden_width, "padding_is_exact": backbone.padding_is_exact}
    if not backbone.padding_is_exact:
        findings.notes.append("padding changes its results: conversations of a batch run one by one")
    if backbone.replays:
        findings.notes.append("its cache is not exact: each step runs all before it again")
        return {**facts, "cache": "none", "cache_bytes": 0}
    return facts


def _load_backbone(name: str, options: hub.HubOptions, findings: _Findings) -> Backbone:
    lm, _, _ = hub.load_base(name, tokenizer=object(), options=options, lm_arguments={})  # examined apart
    broken = [key for key, weight in lm.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        findings.missing.append(f"finite weights: {broken[0]} holds NaN or infinity; download it again")
    return Backbone(lm)


def _check_files(name: str, options: hub.HubOptions, findings: _Findings) -> None:
    """Look for weights that may be loaded."""
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
    else:
        try:
            files = HfApi(token=options.token).list_repo_files(name, revision=options.revision)
        except (OSError, HFValidationError, OfflineModeIsEnabled):
            findings.skipped.append("files of the weights: the Hub was not reached")
            return
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth")))
    if pickles:
        findings.missing.append(
            f"weights as safetensors: there is only {pickles[0]}, a pickle, which can run code when it is "
            "loaded; look for a converted revision, or convert it yourself if you trust it"
        )
    else:
        findings.missing.append("weights: no *.safetensors file is there")


def _is_tied(lm: PreTrainedModel) -> bool:
    head = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    try:
        embedding: Any = lm.get_input_embeddings()
    except NotImplementedError:
        return False
    return head is not None and getattr(embedding, "weight", None) is head.weight


def _dtype_of(config: PreTrainedConfig) -> str:
    dtype = config.dtype or config.get_text_config().dtype or "float32"
    return str(dtype).removeprefix("torch.")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_lora(lm: PreTrainedModel, *, rank: int) -> int:
    """Weights of LoRA on every linear layer but the head."""
    head = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return sum(
        rank * sum(module.weight.shape)
        for module in lm.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )


# --- encoder and codec ---


def _find_encoder(name: str, findings: _Findings) -> _Encoder | None:
    if name.endswith(".pt"):
        loaded = findings.attempt(lambda: AudioEncoder.from_pretrained(name), CheckpointError)
        return _Encoder(name, loaded) if loaded else None
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if name not in _PUBLISHED_ENCODERS:
            findings.missing.append(f"the encoder {name}: {' '.join(str(error).split())}")
            return None
        findings.skipped.append(f"files of the encoder {name}: not reached, so its published shape is used")
        config = WhisperConfig(**_PUBLISHED_ENCODERS[name])
    if not isinstance(config, WhisperConfig):
        findings.missing.append(f"an encoder: {name} is a {config.model_type} model; pass a Whisper model")
        return None
    with torch.device("meta"):
        module = AudioEncoder(WhisperEncoder(config))
    return _Encoder(name, module)


def _find_codec(name: str, findings: _Findings) -> _Codec | None:
    try:
        config: SnacConfig = read_snac_config(name)
    except CheckpointError as error:
        if name not in _PUBLISHED_CODECS:
            findings.missing.append(f"the codec {name}: {' '.join(str(error).split())}")
            return None
        findings.skipped.append(f"files of the codec {name}: not reached, so its published shape is used")
        return _Codec(name, *_PUBLISHED_CODECS[name])
    with torch.device("meta"):
        parameters = _count(snac.SNAC(**vars(config)))
    return _Codec(name, config.spec, parameters)


def _describe_encoder(encoder: _Encoder | None) -> dict[str, Any]:
    if encoder is None:
        return {}
    return {"name": encoder.name, "width": encoder.module.width, "window_steps": encoder.window_steps}


def _describe_codec(codec: _Codec | None) -> dict[str, Any]:
    if codec is None:
        return {}
    spec = codec.spec
    return {
        "name": codec.name,
        "num_codebooks": spec.num_codebooks,
        "codebook_size": spec.codebook_size,
        "frame_rate_hz": spec.frame_rate_hz,
        "sampling_rate": spec.sampling_rate,
        "parameters": codec.parameters,
    }


def _model_without_weights(
    backbone: Backbone, hidden_width: int, encoder: _Encoder, codec: _Codec, settings: Mapping[str, Any]
) -> OmniModel:
    """The talker on shapes alone, for its parameter counts."""
    config = _config(backbone.width, hidden_width, encoder, codec, settings)
    backbone.embedding_rms = 1.0
    backbone.hidden_width = hidden_width
    with torch.device("meta"):
        return OmniModel(backbone, encoder.module, config=config)


def _config(
    width: int, hidden_width: int, encoder: _Encoder, codec: _Codec, settings: Mapping[str, Any]
) -> OmniConfig:
    """What a talker of these parts would be, but for its parts' names."""
    rest = dict(settings)
    tts = {"layers": rest.pop("tts_layers", 6), **rest.pop("tts", {})}
    values = {
        "base": {"id": ""},
        "encoder": {"id": ""},
        "codec": {"id": ""},
        "codec_spec": dump(codec.spec),
        "width": width,
        "hidden_width": hidden_width,
        "encoder_width": encoder.module.width,
        "encoder_stride": encoder.module.stride,
        "text_end_ids": [0],
        "tts": tts,
        **rest,
    }
    return parse(OmniConfig, values, source="doctor")


def processor_without_weights(
    base: str | Path,
    *,
    encoder: str | Path = "openai/whisper-small",
    codec: str | Path = "hubertsiuzdak/snac_24khz",
    hub_options: hub.HubOptions | None = None,
    **settings: Any,
) -> OmniProcessor:
    """Return what lays rows out for a talker of these parts, without loading a weight.

    Args:
        base: Hub id or folder of a causal LM.
        encoder: Hub id or folder of a Whisper model.
        codec: Hub id or folder of a SNAC model.
        hub_options: revision, token and cache of the base.
        **settings: as for :func:`diagnose`.

    Raises:
        BackboneError: if there is no such base, or it has no tokenizer.
        CheckpointError: if encoder or codec cannot be found.
        ConfigError: if a setting is unknown or has a wrong value.
    """
    options, findings = hub_options or hub.HubOptions(), _Findings()
    config = hub.read_lm_config(str(base), options=options)
    found_encoder, found_codec = _find_encoder(str(encoder), findings), _find_codec(str(codec), findings)
    if found_encoder is None or found_codec is None:
        raise CheckpointError("; ".join(findings.missing))
    tokenizer: Any = hub.load_tokenizer(str(base), options)
    with torch.device("meta"):
        lm = _build(config)
    ends = find_text_end_ids(tokenizer, _eos_token_ids(str(base), lm, options))
    width = config.get_text_config().hidden_size
    told = _config(width, width, found_encoder, found_codec, settings | {"text_end_ids": list(ends)})
    return OmniProcessor(tokenizer, found_encoder.module.log_mel(), config=told)


# --- estimates ---


def _check_positions(facts: Mapping[str, Any], encoder: _Encoder, findings: _Findings) -> None:
    limit = facts.get("max_positions")
    if limit is not None and encoder.window_steps >= limit:
        findings.notes.append(
            f"a full window of the encoder takes {encoder.window_steps} of the base's {limit} positions; "
            "keep recordings short, or join encoder frames with audio_adapter={'stack': …}"
        )


def _stages(groups: Mapping[str, int], codec: _Codec | None, dtype: str) -> dict[str, StageFacts]:
    if any(group not in groups for trained in STAGES.values() for group in trained) or codec is None:
        return {}
    stages = {}
    for name, trained in STAGES.items():
        stages[name] = facts_of_stage(groups, trained, dtype)
    return stages


def facts_of_stage(groups: Mapping[str, int], trained: Sequence[str], dtype: str) -> StageFacts:
    """Return what training some weight groups takes.

    Args:
        groups: parameters of every group.
        trained: groups that learn.
        dtype: type of the base's weights.
    """
    parameters = sum(groups[group] for group in trained)
    frozen = {group: count for group, count in groups.items() if group not in trained and group != "lora"}
    memory = _TRAINED_BYTES * parameters + _weight_bytes(frozen, dtype)
    return StageFacts(tuple(trained), parameters, memory)


def _inference_bytes(groups: Mapping[str, int], codec: _Codec | None) -> dict[str, int]:
    if codec is None or not set(ADDED_GROUPS) <= set(groups):
        return {}
    kept = {group: count for group, count in groups.items() if group != "lora"}
    codec_bytes = codec.parameters * torch.float32.itemsize
    return {dtype: _weight_bytes(kept, dtype) + codec_bytes for dtype in _DTYPES}


def _weight_bytes(groups: Mapping[str, int], dtype: str) -> int:
    """Bytes of weights; the encoder stays in float32."""
    size: int = getattr(torch, dtype).itemsize
    return sum(
        count * (torch.float32.itemsize if group == "audio_encoder" else size)
        for group, count in groups.items()
    )


# --- the table ---


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis for people."""
    base = diagnosis.base
    _section(console, "Base model", _base_rows(base))
    if diagnosis.encoder and diagnosis.codec:
        _section(console, "Hearing and speech", _parts_rows(diagnosis))
    if diagnosis.stages:
        _show_stages(diagnosis, console)
    _show_memory(diagnosis, console)
    for title, style, lines in (
        ("Good to know", "", diagnosis.notes),
        ("Not checked", "dim", diagnosis.skipped),
        ("Missing", "red", diagnosis.missing),
    ):
        if lines:
            console.print(Text(title, style="bold"))
            for line in lines:
                console.print(Padding(Text(f"· {line}", style=style), (0, 0, 0, 2)))
            console.print()
    if diagnosis.missing:
        verdict = Text(f"{base.name} cannot be wrapped as it is.", style="bold red")
    else:
        verdict = Text(f"{base.name} can be wrapped.", style="bold green")
    console.print(verdict, soft_wrap=True)


def _base_rows(base: BaseFacts) -> list[tuple[str, str]]:
    ends = ", ".join(f"{token!r} ({index})" for index, token in base.text_end_tokens.items())
    same_width = base.hidden_width in (None, base.width)
    width = f"{base.width}" if same_width else f"{base.width}, hidden states {base.hidden_width}"
    positions = "no end" if base.max_positions is None else str(base.max_positions)
    return [
        ("name", base.name),
        ("architecture", f"{base.architecture} ({base.model_type})"),
        ("parameters", f"{_millions(base.parameters)}, {base.dtype}"),
        ("width", width if base.width else "unknown"),
        ("vocabulary", f"{base.vocab_size or 'unknown'} (stays as it is)"),
        ("head", {True: "tied to the embedding", False: "its own", None: "unknown"}[base.tied_head]),
        ("positions", positions if base.width else "unknown"),
        ("cache", base.cache or "not checked"),
        ("chat template", {True: "yes", False: "no", None: "no tokenizer"}[base.chat_template]),
        ("answers end with", ends or "unknown"),
        (
            "padded batches",
            {True: "exact", False: "not exact: run apart", None: "not checked"}[base.padding_is_exact],
        ),
    ]


def _parts_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    encoder, codec = diagnosis.encoder, diagnosis.codec
    return [
        ("encoder", f"{encoder['name']}: width {encoder['width']}, frozen"),
        (
            "codec",
            f"{codec['name']}: {codec['num_codebooks']} rows of {codec['codebook_size']} codes, "
            f"{codec['frame_rate_hz']:.2f} frames a second, {codec['sampling_rate']} Hz",
        ),
    ]


def _show_stages(diagnosis: Diagnosis, console: Console) -> None:
    table = Table(title="Weights and what learns in each stage", title_justify="left", title_style="bold")
    table.add_column("weights")
    table.add_column("parameters", justify="right")
    for name in diagnosis.stages:
        table.add_column(f"stage {name}", justify="center")
    for group, count in diagnosis.groups.items():
        marks = ["learns" if group in stage.trains else "" for stage in diagnosis.stages.values()]
        table.add_row(group.replace("_", " "), _millions(count), *marks)
    table.add_section()
    stages = diagnosis.stages.values()
    table.add_row("learning", "", *(_millions(stage.parameters) for stage in stages))
    table.add_row("memory, AdamW", "", *(_gibibytes(stage.memory_bytes) for stage in stages))
    console.print(table)
    console.print(Text("Memory for training does not count activations, which grow with the batch.", "dim"))
    console.print()


def _show_memory(diagnosis: Diagnosis, console: Console) -> None:
    rows = [(f"weights in {dtype}", _gibibytes(size)) for dtype, size in diagnosis.inference_bytes.items()]
    if diagnosis.base.cache_bytes is not None:
        rows.append((f"cache of {_CACHE_STEPS} steps", f"{diagnosis.base.cache_bytes / 2**20:.1f} MiB"))
    if rows:
        _section(console, "Memory for talking", rows)


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)
    console.print()


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
