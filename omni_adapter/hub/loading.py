"""Read a saved talker: its folder, its config, where its parts lie, its added weights.

A folder or Hub id in; a config and weights in a model out. The files are a stranger's: everything in them is
checked before it is used. Knows nothing of how parts are loaded.
"""

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

from omni_adapter.config import FORMAT_VERSION, OmniConfig, PartRef, parse
from omni_adapter.errors import CheckpointError
from omni_adapter.hub.atomic import recover
from omni_adapter.hub.files import (
    BASE_ADAPTER,
    CONFIG_FILE,
    DATASETS_FILE,
    FEATURES_FILE,
    LORA_FOLDER,
    PART_SUFFIXES,
    PARTS,
    WEIGHTS_FILE,
    read_json,
    short,
)
from omni_adapter.hub.options import HUB_ERRORS, HubOptions, is_hub_id, unreachable
from omni_adapter.model import OmniModel
from omni_adapter.modules.audio_encoder import PACKAGE_PREFIX
from omni_adapter.tensor_files import read_safetensors

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
            recover(folder)
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
    values = read_json(path)
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
        inside = (*PARTS, BASE_ADAPTER)
        if ref.id[2:] not in inside:
            raise CheckpointError(f"{source}: {ref.id!r} is not one of {', '.join(inside)} inside the folder")
        return folder / ref.id[2:]
    if Path(ref.id).is_absolute() and trusted:
        if not Path(ref.id).exists():
            raise CheckpointError(
                f"{source} names {ref.id}, which does not exist; pass the part as an argument"
            )
        return ref.id
    if not ref.id.startswith(PACKAGE_PREFIX) and not is_hub_id(ref.id):
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


def _download(name: str, options: HubOptions, inside: PurePosixPath, without: Collection[str]) -> Path:
    """Fetch a talker's own files, and nothing else of the repository, all from one commit."""
    parts = [part for part in PARTS if part not in without]
    patterns = [
        CONFIG_FILE,
        WEIGHTS_FILE,
        FEATURES_FILE,
        DATASETS_FILE,
        *(f"{part}/*.{suffix}" for part in (LORA_FOLDER, BASE_ADAPTER, *parts) for suffix in PART_SUFFIXES),
    ]
    options = options.pinned(name)
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[str(inside / pattern) for pattern in patterns], **options.arguments()
            )
        )
    except HUB_ERRORS as error:
        raise CheckpointError(unreachable(name, error)) from error


def _check_features(path: Path) -> None:
    values = read_json(path)
    for name, limit in _FEATURE_LIMITS.items():
        value = values.get(name, 1)
        if not isinstance(value, int | float) or not 0 < value <= limit:
            raise CheckpointError(f"{path}: {name} must be above 0 and at most {limit}, got {short(value)}")


def _check_lora(path: Path, *, max_rank: int) -> None:
    values = read_json(path)
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
        raise CheckpointError(f"{path}: ranks must be from 1 to {max_rank}, got {short(ranks)}")
