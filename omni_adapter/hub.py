"""Load parts by name, save and load what was added, share it.

Folders and Hub ids in, parts out, and back. Only safetensors and JSON are read and written; a base, encoder
or codec that is not the one a checkpoint was made with is refused. Knows nothing of decoding or training.
"""

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import transformers
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from omni_adapter.audio.codec import Codec, SnacCodec
from omni_adapter.config import FORMAT_VERSION, OmniConfig, PartRef, dump, parse
from omni_adapter.errors import BackboneError, CheckpointError, ConfigError
from omni_adapter.model import OmniModel
from omni_adapter.model_card import CARD_FILE, SAMPLES_FOLDER, read_license
from omni_adapter.modules.audio_encoder import PACKAGE_PREFIX, AudioEncoder
from omni_adapter.tensor_files import read_safetensors

CONFIG_FILE = "omni_config.json"
WEIGHTS_FILE = "omni_model.safetensors"
FEATURES_FILE = "preprocessor_config.json"
LORA_FOLDER = "lora"
PARTS = ("base", "encoder", "codec")

_MAX_JSON_BYTES = 1 << 20
_MAX_JSON_DEPTH = 32
_MAX_LAYERS = 1000
_FEATURE_LIMITS = {  # far above any encoder's, far below what fills the memory
    "chunk_length": 3600,
    "feature_size": 1000,
    "hop_length": 100_000,
    "n_fft": 100_000,
    "sampling_rate": 1_000_000,
}
_LORA_FILE = "adapter_config.json"
# Settings of PEFT that import modules by name, read other files, or add more than LoRA.
_LORA_REFUSED = (
    "auto_mapping",
    "corda_config",
    "eva_config",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "modules_to_save",
    "trainable_token_indices",
)
_PART_SUFFIXES = ("safetensors", "json", "jinja", "txt", "model")
_LM_ARGUMENTS = (
    "attn_implementation", "device_map", "dtype", "max_memory", "offload_folder", "quantization_config",
    "torch_dtype",
)  # fmt: skip
_RESERVED_ARGUMENTS = ("config", "output_loading_info", "trust_remote_code", "use_safetensors")

# The Hub's client raises the errors of its HTTP library when a connection breaks; this is their base.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_HUB_ERRORS = (OSError, ValueError, RuntimeError, RevisionResolutionError, _HTTP_ERROR)
# What transformers raises for a folder that is not what it says depends on where it trips over it.
_LOAD_ERRORS = (
    *_HUB_ERRORS,
    AttributeError,
    ImportError,
    LookupError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
)

_STAGING = ".saving"  # files of a save that is being written
_READY = ".saved"  # the same files, complete, while they move to their places
_RETIRED = ".replaced"  # files of the earlier save, until the new ones are in their places


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

    def pinned(self, name: str) -> "HubOptions":
        """Return the options with the commit that the revision stands for now; a folder has none.

        Everything that is loaded with them comes from one commit, even if the repository changes meanwhile.

        Raises:
            OSError: if ``name`` is neither a folder nor a repository that can be read; the message is the
                Hub's. Other errors of its client pass through too.
        """
        if Path(name).exists():
            return self
        commit = HfApi().resolve_revision(
            name,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
        )
        return replace(self, revision=commit.resolved)


class Loading(NamedTuple):
    """Keyword arguments of a call, sorted by what they are for."""

    options: HubOptions
    lm_arguments: dict[str, Any]
    others: dict[str, Any]


def sort_arguments(arguments: Mapping[str, Any]) -> Loading:
    """Tell where to look (``HubOptions``) from how to load the base (``dtype``, …) and from the others.

    Raises:
        ConfigError: if an argument would change what may be read.
    """
    reserved = [key for key in _RESERVED_ARGUMENTS if key in arguments]
    if reserved:
        raise ConfigError(
            f"{', '.join(reserved)} cannot be set: only safetensors are read, and code of others is never "
            "run; load the model yourself and pass it as the base"
        )
    places = {field.name for field in fields(HubOptions)}
    return Loading(
        HubOptions(**{key: value for key, value in arguments.items() if key in places}),
        {key: value for key, value in arguments.items() if key in _LM_ARGUMENTS},
        {key: value for key, value in arguments.items() if key not in {*places, *_LM_ARGUMENTS}},
    )


# --- parts by name ---


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
        ref = PartRef(_id_of(name))
    else:
        name = str(base)
        try:
            options = options.pinned(name)
        except _HUB_ERRORS as error:
            raise BackboneError(_unreachable(name, error)) from error
        lm = _load_lm(name, options, lm_arguments)
        ref = PartRef(_id_of(name), revision=_commit(name, options), license=_license_of(name, options))
    if tokenizer is None:
        if not name:
            raise BackboneError("the base came as a loaded model without a name; pass its tokenizer= as well")
        tokenizer = _load_tokenizer(name, options)
    return lm, tokenizer, ref


def read_lm_config(name: str, *, options: HubOptions) -> PreTrainedConfig:
    """Return the config of a causal LM; code of others is never run.

    Raises:
        BackboneError: if there is no config, or it is not that of a causal LM.
    """
    if not Path(name).exists() and not _is_hub_id(name):
        raise BackboneError(_nowhere(name))
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
        return loaded, PartRef(_id_of(str(loaded.encoder.config._name_or_path or "")))
    name = str(encoder)
    if name.startswith(PACKAGE_PREFIX):
        return AudioEncoder.from_pretrained(name), PartRef(name)
    options = _pinned_part(name, options)
    loaded = AudioEncoder.from_pretrained(name, **options.arguments())
    return loaded, PartRef(_id_of(name), revision=_commit(name, options))


def load_codec(codec: Any, *, options: HubOptions) -> tuple[Codec, PartRef]:
    """Return a codec and how to name it; ``codec`` is a Hub id or folder of SNAC, or a loaded codec.

    Raises:
        CheckpointError: if there is no such codec.
    """
    if not isinstance(codec, str | Path):
        return codec, PartRef("")
    name = str(codec)
    options = _pinned_part(name, options)
    loaded = SnacCodec.from_pretrained(name, **options.arguments())
    return loaded, PartRef(_id_of(name), revision=_commit(name, options))


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


# --- loading a talker ---


def fetch_folder(
    name: str | Path, *, options: HubOptions, subfolder: str = "", without: Collection[str] = ()
) -> Path:
    """Return the local folder of a saved talker, downloading it if ``name`` is a Hub id.

    Args:
        name: folder or Hub id.
        options: where to look.
        subfolder: folder of the talker inside ``name``.
        without: parts that need not be downloaded, because the caller has them.

    Raises:
        CheckpointError: if there is no such folder or repository, or it holds no talker.
    """
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts or "\\" in subfolder:
        raise CheckpointError(f"subfolder must be a folder inside {name}, got {subfolder!r}")
    if Path(name).is_dir():
        folder = Path(name) / inside
        if folder.is_dir():
            _recover(folder)
    else:
        folder = _download(str(name), options, inside, without) / inside
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}, so no talker was saved there")
    return folder


def read_config(folder: Path) -> OmniConfig:
    """Read ``omni_config.json``.

    Raises:
        CheckpointError: if the file is too large, no JSON, or of another format.
        ConfigError: if a key is unknown or has a wrong value.
    """
    path = folder / CONFIG_FILE
    values = _read_json(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this version of omni-adapter reads {FORMAT_VERSION}; "
            "install the omni-adapter that wrote it, or save it again"
        )
    return parse(OmniConfig, values, source=str(path))


def part_location(ref: PartRef, folder: Path, *, trusted: bool) -> str | Path:
    """Return where a part of the talker in ``folder`` lies: a Hub id or a folder.

    Args:
        ref: the part, as the talker's config names it.
        folder: where the talker lies.
        trusted: whether the talker came from this machine, so that it may name other folders of it.

    Raises:
        CheckpointError: if the reference is empty, leaves the folder, or names nothing that may be read.
    """
    source = folder / CONFIG_FILE
    if not ref.id:
        raise CheckpointError(f"{source} names no id for one of its parts; pass it as an argument")
    if ref.id.startswith("./"):
        if ref.id[2:] not in PARTS:
            raise CheckpointError(f"{source}: {ref.id!r} is not one of {', '.join(PARTS)} inside the folder")
        return folder / ref.id[2:]
    if Path(ref.id).is_absolute() and trusted:
        if not Path(ref.id).exists():
            raise CheckpointError(
                f"{source} names {ref.id}, which does not exist; pass the part as an argument"
            )
        return ref.id
    if not ref.id.startswith(PACKAGE_PREFIX) and not _is_hub_id(ref.id):
        raise CheckpointError(
            f"{source} names the part {ref.id!r}, which is no Hub id; pass the part as an argument"
        )
    return ref.id


def load_added(folder: Path, model: OmniModel) -> None:
    """Load added weights and LoRA into a freshly built model.

    Raises:
        CheckpointError: if tensors are unknown, missing, wrongly shaped or not finite, or the settings beside
            them are out of range.
    """
    _check_features(folder / FEATURES_FILE)
    own = dict(model.added_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in own.items()}
    for name, tensor in read_safetensors(folder / WEIGHTS_FILE, expected=expected).items():
        own[name].data.copy_(tensor)
    if (folder / LORA_FOLDER).is_dir():
        _check_lora(folder / LORA_FOLDER / _LORA_FILE, max_rank=model.config.hidden_width)
        model.backbone.load_lora(folder / LORA_FOLDER)


# --- saving a talker ---


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what is written there takes the place of an earlier talker in ``folder``.

    A save that fails, or is killed at any moment, leaves the earlier talker or the new one, never a mixture.
    Files of others in ``folder`` stay.

    Raises:
        CheckpointError: if a folder of others is where a part would go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        retiring = _retiring(folder, staging)
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    # The config goes first and comes last: in between, the folder holds no talker instead of half of one.
    (folder / _RETIRED).mkdir()
    for name in sorted(retiring, key=lambda name: name != CONFIG_FILE):
        os.rename(folder / name, folder / _RETIRED / name)
    os.rename(staging, folder / _READY)
    _recover(folder)


def parts_inside(config: OmniConfig, include: Collection[str]) -> tuple[str, ...]:
    """Return the parts to write beside the added weights.

    Those are the ones asked for, and those that came inside the talker's folder: they have no other home.

    Raises:
        CheckpointError: if a part is unknown, or one that is not written has no name to refer to.
    """
    unknown = set(include) - set(PARTS)
    if isinstance(include, str) or unknown:
        raise CheckpointError(
            f"parts that can be saved are {', '.join(PARTS)}, got "
            f"{include if isinstance(include, str) else ', '.join(sorted(unknown))}"
        )
    inside = [part for part in PARTS if part in include or getattr(config, part).id.startswith("./")]
    for part in PARTS:
        if part not in inside and not getattr(config, part).id:
            raise CheckpointError(
                f"the {part} came as a loaded model without a name, so it cannot be referred to; "
                f"pass include=({part!r},) to save it beside, or wrap it by its Hub id"
            )
    return tuple(inside)


def save_parts(
    folder: Path, names: Collection[str], *, config: OmniConfig, lm: PreTrainedModel, tokenizer: Any,
    encoder: AudioEncoder, codec: Codec,
) -> OmniConfig:  # fmt: skip
    """Write whole parts beside the added weights and return a config that refers to them."""
    if "base" in names:
        lm.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    if "encoder" in names:
        encoder.save_pretrained(folder / "encoder")
    if "codec" in names:
        codec.save_pretrained(folder / "codec")
    moved: dict[str, Any] = {part: _moved(getattr(config, part), f"./{part}") for part in names}
    return replace(config, **moved)


def save_added(folder: Path, model: OmniModel, *, config: OmniConfig, with_lora: bool = True) -> None:
    """Write config, added weights and LoRA."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.added_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if with_lora and model.backbone.has_lora:
        model.backbone.save_lora(folder / LORA_FOLDER)
    text = json.dumps(dump(config), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


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


# --- sharing ---


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    commit_message: str,
    revision: str | None,
) -> str:
    """Make a saved talker the content of a repository, as one commit, and return the commit's address.

    Files of an earlier talker that this one lacks are deleted by the same commit; files of others stay.

    Raises:
        CheckpointError: if the Hub refuses, the connection breaks, or a part is a folder of this machine.
    """
    _check_shareable(folder)
    api = HfApi(token=token, library_name="omni-adapter")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        stale = _stale_files(present, new)
        # Not upload_folder: it makes several commits of a large folder, and each would be half a talker.
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, path) for name, path in sorted(new.items())),
            ],
            commit_message=commit_message,
            revision=revision,
        )
    except _HUB_ERRORS as error:
        raise CheckpointError(
            f"the talker was not pushed to {repo_id}: {error}; the repository holds what it held before, and "
            "calling push_to_hub again sends it whole"
        ) from error
    return str(commit.commit_url)


def _stale_files(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of an earlier talker in a repository that the new one does not have."""
    if CONFIG_FILE not in present:
        return []
    own = (LORA_FOLDER, SAMPLES_FOLDER, *PARTS)
    return sorted(
        name for name in present if name.partition("/")[0] in own and "/" in name and name not in new
    )


def _check_shareable(folder: Path) -> None:
    config = read_config(folder)
    for part in PARTS:
        name = getattr(config, part).id
        if Path(name).is_absolute():
            raise CheckpointError(
                f"the {part} is {name} on this machine, which others cannot load; "
                f"pass include=({part!r},) to push it too, or wrap it by its Hub id"
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


def _load_tokenizer(name: str, options: HubOptions) -> Any:
    try:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options.arguments())
        except _HTTP_ERROR:  # even one that is in the cache asks the Hub for more chat templates
            options = replace(options, local_files_only=True)
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options.arguments())
    except _LOAD_ERRORS as error:
        raise BackboneError(f"{name} has no tokenizer that transformers can load: {error}") from error


def _check_base_config(name: str, options: HubOptions) -> None:
    """Refuse a config that is too large or too deep, or that needs code from its repository."""
    path = cached_file(name, "config.json", **options.arguments())
    if path is None:
        raise BackboneError(f"{name} holds no config.json, so it is no model of transformers")
    values = _read_json(Path(path))
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise BackboneError(
            f"{name} needs code from its repository (auto_map in its config), which is never run; "
            "pass a model that transformers itself has, or load the model yourself and pass it as the base"
        )


def _pinned_part(name: str, options: HubOptions) -> HubOptions:
    try:
        return options.pinned(name)
    except _HUB_ERRORS as error:
        raise CheckpointError(_unreachable(name, error)) from error


def _unreachable(name: str, error: Exception) -> str:
    if not _is_hub_id(name):
        return _nowhere(name)
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return f"{name} is neither a folder nor among the downloads, and the Hub is not asked while offline"
    return f"{name} is neither a folder nor a repository on the Hub that can be read: {error}"


def _nowhere(name: str) -> str:
    return f"{name} does not exist: there is no such folder, and the Hub's names are owner/name"


def _id_of(name: str) -> str:
    """A name that means the same from every working folder."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _commit(name: str, options: HubOptions) -> str | None:
    return None if Path(name).exists() else options.revision


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _license_of(name: str, options: HubOptions) -> str | None:
    """Licence that the card of a model states; a card is a courtesy, so that none is no error."""
    if Path(name).is_dir():
        return read_license(Path(name) / CARD_FILE)
    try:
        return read_license(Path(hf_hub_download(name, CARD_FILE, **options.arguments())))
    except _HUB_ERRORS:
        return None


def _download(name: str, options: HubOptions, inside: PurePosixPath, without: Collection[str]) -> Path:
    """Fetch a talker's own files, and nothing else of the repository, all from one commit."""
    parts = [part for part in PARTS if part not in without]
    patterns = [
        CONFIG_FILE,
        WEIGHTS_FILE,
        FEATURES_FILE,
        *(f"{part}/*.{suffix}" for part in (LORA_FOLDER, *parts) for suffix in _PART_SUFFIXES),
    ]
    try:
        options = options.pinned(name)
        return Path(
            snapshot_download(
                name, allow_patterns=[str(inside / pattern) for pattern in patterns], **options.arguments()
            )
        )
    except _HUB_ERRORS as error:
        raise CheckpointError(_unreachable(name, error)) from error


def _check_features(path: Path) -> None:
    values = _read_json(path)
    for name, limit in _FEATURE_LIMITS.items():
        value = values.get(name, 1)
        if not isinstance(value, int | float) or not 0 < value <= limit:
            raise CheckpointError(f"{path}: {name} must be above 0 and at most {limit}, got {_short(value)}")


def _check_lora(path: Path, *, max_rank: int) -> None:
    values = _read_json(path)
    refused = [name for name in _LORA_REFUSED if values.get(name)]
    if refused:
        raise CheckpointError(f"{path} sets {', '.join(refused)}, which the LoRA of a talker does not have")
    if not isinstance(values.get("target_modules"), list):
        raise CheckpointError(f"{path}: target_modules must be a list of names")
    if not isinstance(values.get("init_lora_weights", True), bool):
        raise CheckpointError(f"{path}: init_lora_weights must be true or false")
    pattern = values.get("rank_pattern") or {}
    ranks = [values.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(isinstance(rank, int) and 0 < rank <= max_rank for rank in ranks):
        raise CheckpointError(f"{path}: ranks must be from 1 to {max_rank}, got {_short(ranks)}")


def _moved(ref: PartRef, place: str) -> PartRef:
    """The reference to a part that is saved inside the talker's folder; it remembers where it came from."""
    is_inside = ref.id.startswith("./")
    return replace(
        ref, id=place, origin=ref.origin if is_inside else (ref.id if _is_hub_id(ref.id) else None)
    )


def _retiring(folder: Path, staging: Path) -> set[str]:
    """Names in ``folder`` that make way for a new talker.

    Raises:
        CheckpointError: if one of them is a folder that no talker wrote.
    """
    own = {LORA_FOLDER, SAMPLES_FOLDER} if (folder / CONFIG_FILE).is_file() else set()
    if own:
        earlier = _read_json(folder / CONFIG_FILE)
        references = {part: earlier.get(part) for part in PARTS}
        own |= {
            part for part, ref in references.items() if isinstance(ref, dict) and ref.get("id") == f"./{part}"
        }
    new = {path.name for path in staging.iterdir()}
    taken = sorted(name for name in new - own if (folder / name).is_dir())
    if taken:
        raise CheckpointError(
            f"{folder} holds a folder {taken[0]!r} that no talker wrote; it is not replaced, save elsewhere"
        )
    return {name for name in new | own if (folder / name).exists()}


def _recover(folder: Path) -> None:
    """Finish or undo a save that was interrupted while files moved to their places."""
    ready, retired = folder / _READY, folder / _RETIRED
    try:
        if ready.is_dir():
            _move_all(ready, folder)
            shutil.rmtree(retired, ignore_errors=True)
            ready.rmdir()
        elif retired.is_dir():
            _move_all(retired, folder)
            retired.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds an interrupted save that cannot be completed ({error}); move what is in "
            f"{_READY} or else {_RETIRED} into {folder}"
        ) from error


def _move_all(source: Path, target: Path) -> None:
    """Move everything, the config last; a process beside this one may be doing the same."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        with suppress(FileNotFoundError):
            os.rename(path, target / path.name)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a stranger.

    Raises:
        CheckpointError: if it is too large or too deep, or no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, at most {_MAX_JSON_BYTES} are read")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(_MAX_JSON_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for items in inner for value in items if isinstance(value, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested more than {_MAX_JSON_DEPTH} levels deep")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
