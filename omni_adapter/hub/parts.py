"""Load a base, an encoder or a codec by name, and tell whether it is the one a talker was made with.

Hub ids, folders and loaded models in; parts and references to them out. Only safetensors and JSON are read,
and code of strangers is never run. Knows nothing of the talker that the parts become.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from omni_adapter.audio.codec import Codec, SnacCodec
from omni_adapter.config import OmniConfig, PartRef
from omni_adapter.errors import BackboneError, CheckpointError
from omni_adapter.hub.files import CONFIG_FILE, read_json, short
from omni_adapter.hub.options import HTTP_ERROR, HUB_ERRORS, HubOptions, is_hub_id, nowhere
from omni_adapter.model_card import CARD_FILE, read_license
from omni_adapter.modules.audio_encoder import PACKAGE_PREFIX, AudioEncoder

_MAX_LAYERS = 1000
# What transformers raises for a folder that is not what it says depends on where it trips over it.
_LOAD_ERRORS = (
    *HUB_ERRORS,
    AttributeError,
    ImportError,
    LookupError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
)


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
        name, lm = str(base.config._name_or_path or ""), base
        ref = _reference(name)
    else:
        name = str(base)
        try:
            options = options.pinned(name)
        except CheckpointError as error:
            raise BackboneError(str(error)) from error
        lm = _load_lm(name, options, lm_arguments)
        ref = replace(_reference(name, options.revision), license=_license_of(name, options))
    if tokenizer is None:
        if not name:
            raise BackboneError("the base came as a loaded model without a name; pass its tokenizer= as well")
        tokenizer = load_tokenizer(name, options)
    return lm, tokenizer, ref


def read_lm_config(name: str, *, options: HubOptions) -> PreTrainedConfig:
    """Return the config of a causal LM; code of others is never run.

    Raises:
        BackboneError: if there is no config, or it is not that of a causal LM.
    """
    if not Path(name).exists() and not is_hub_id(name):
        raise BackboneError(nowhere(name))
    try:
        _check_base_config(name, options)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options.arguments())
    except BackboneError:
        raise
    except CheckpointError as error:
        raise BackboneError(str(error)) from error
    except _LOAD_ERRORS as error:
        raise BackboneError(f"{name} cannot be loaded as a causal LM: {error}") from error
    _lm_class(name, config)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MAX_LAYERS:
        raise BackboneError(f"{name} claims {layers} layers, at most {_MAX_LAYERS} are built")
    assert isinstance(config, PreTrainedConfig)
    return config


def load_encoder(encoder: Any, *, options: HubOptions) -> tuple[AudioEncoder, PartRef]:
    """Return an audio encoder and how to name it.

    Args:
        encoder: Hub id, folder, checkpoint file, ``whisper:`` name, or a loaded model.
        options: where to look.

    Raises:
        CheckpointError: if there is no such encoder.
    """
    if not isinstance(encoder, str | Path):
        loaded = AudioEncoder.from_pretrained(encoder)
        return loaded, _reference(str(loaded.encoder.config._name_or_path or ""))
    name = str(encoder)
    if name.startswith(PACKAGE_PREFIX):
        return AudioEncoder.from_pretrained(name), PartRef(name)
    options = options.pinned(name)
    loaded = AudioEncoder.from_pretrained(name, **options.arguments())
    return loaded, _reference(name, options.revision)


def load_codec(codec: Any, *, options: HubOptions) -> tuple[Codec, PartRef]:
    """Return a codec and how to name it; ``codec`` is a Hub id or folder of SNAC, or a loaded codec.

    Raises:
        CheckpointError: if there is no such codec.
    """
    if not isinstance(codec, str | Path):
        return codec, PartRef("")
    name = str(codec)
    options = options.pinned(name)
    loaded = SnacCodec.from_pretrained(name, **options.arguments())
    return loaded, _reference(name, options.revision)


def check_fingerprint(part: str, ref: PartRef, found: Mapping[str, Any]) -> None:
    """Refuse a part that is not the one that a checkpoint was made with.

    Raises:
        CheckpointError: naming the first differing facts with both values.
    """
    differing = [key for key, value in ref.fingerprint.items() if _plain(found.get(key)) != _plain(value)]
    if differing:
        facts = "; ".join(
            f"{key} was {short(ref.fingerprint[key])}, is {short(found.get(key))}" for key in differing[:4]
        )
        raise CheckpointError(
            f"this {part} is not the one the checkpoint was made with ({ref.id or 'unnamed'}): {facts}; "
            f"load that {part}, or train again on this one"
        )


def check_geometry(config: OmniConfig, *, vocab_size: int, encoder: AudioEncoder, codec: Codec) -> None:
    """Refuse parts whose numbers are not those of the config.

    Raises:
        CheckpointError: naming the number with both values.
    """
    for name, expected, found in (
        ("codec_spec", config.codec_spec, codec.spec),
        ("encoder_stride", config.encoder_stride, encoder.stride),
    ):
        if expected != found:
            raise CheckpointError(f"{name} is {expected} in {CONFIG_FILE}, but the part at hand has {found}")
    if max(config.text_end_ids) >= vocab_size:
        raise CheckpointError(
            f"text_end_ids {list(config.text_end_ids)} in {CONFIG_FILE} exceed the base's {vocab_size} ids"
        )


def _load_lm(name: str, options: HubOptions, lm_arguments: Mapping[str, Any]) -> PreTrainedModel:
    """Load a causal LM from safetensors; code and pickles of others are never run."""
    lm_class = _lm_class(name, read_lm_config(name, options=options))
    try:
        loaded: Any = lm_class.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options.arguments(),
            **lm_arguments,
        )
    except _LOAD_ERRORS as error:
        raise BackboneError(f"{name} cannot be loaded as a causal LM from safetensors: {error}") from error
    lm, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise BackboneError(
            f"{name} lacks {len(missing)} weights that its config needs, such as {missing[0]}; "
            "they would be random"
        )
    assert isinstance(lm, PreTrainedModel)
    return lm


def _lm_class(name: str, config: PreTrainedConfig) -> Any:
    """The class that loads a causal LM with this config: by its type, or as the config itself names it.

    Raises:
        BackboneError: if transformers has none.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    for architecture in config.architectures or ():
        named = getattr(transformers, architecture, None)
        if (
            isinstance(named, type)
            and issubclass(named, PreTrainedModel)
            and named.config_class is type(config)
        ):
            return named
    raise BackboneError(
        f"{name} is a {type(config).__name__}, which has no causal LM in transformers; pass a decoder"
    )


def load_tokenizer(name: str, options: HubOptions) -> Any:
    """Load a tokenizer as its own files describe it.

    For bases of some types transformers takes the type's own class whatever the files say, and a tokenizer
    that was made for a base of its own then reads the same words as other ids. One that calls itself a plain
    tokenizer of the tokenizers library is therefore loaded as that.

    Raises:
        BackboneError: if transformers cannot load it.
    """
    try:
        try:
            return _read_tokenizer(name, options)
        except HTTP_ERROR:  # even one that is in the cache asks the Hub for more chat templates
            return _read_tokenizer(name, replace(options, local_files_only=True))
    except _LOAD_ERRORS as error:
        raise BackboneError(f"{name} has no tokenizer that transformers can load: {error}") from error


def _read_tokenizer(name: str, options: HubOptions) -> Any:
    named = get_tokenizer_config(name, **options.arguments()).get("tokenizer_class")
    if named in (PreTrainedTokenizerFast.__name__, "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(name, **options.arguments())
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options.arguments())


def _check_base_config(name: str, options: HubOptions) -> None:
    """Refuse a config that is too large or too deep, or that needs code from its repository."""
    path = cached_file(name, "config.json", **options.arguments())
    if path is None:
        raise BackboneError(f"{name} holds no config.json, so it is no model of transformers")
    values = read_json(Path(path))
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise BackboneError(
            f"{name} needs code from its repository (auto_map in its config), which is never run; "
            "pass a model that transformers itself has, or load the model yourself and pass it as the base"
        )


def _reference(name: str, commit: str | None = None) -> PartRef:
    """A reference that means the same from every working folder; a folder has no commit."""
    if name and Path(name).exists():
        return PartRef(str(Path(name).resolve()))
    return PartRef(name, revision=commit)


def _license_of(name: str, options: HubOptions) -> str | None:
    """Licence that the card of a model states; a card is a courtesy, so that none is no error."""
    if Path(name).is_dir():
        return read_license(Path(name) / CARD_FILE)
    try:
        return read_license(Path(hf_hub_download(name, CARD_FILE, **options.arguments())))
    except HUB_ERRORS:
        return None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
