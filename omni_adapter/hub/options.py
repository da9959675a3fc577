"""Where to look for parts, and what a name stands for there.

Keyword arguments of a call in, options and one commit of the Hub out. Knows nothing of what is loaded with
them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from omni_adapter.errors import CheckpointError, ConfigError

# The Hub's client raises the errors of its HTTP library when a connection breaks; this is their base.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
HUB_ERRORS = (OSError, ValueError, RuntimeError, RevisionResolutionError, HTTP_ERROR)

_LM_ARGUMENTS = (
    "attn_implementation", "device_map", "dtype", "max_memory", "offload_folder", "quantization_config",
    "torch_dtype",
)  # fmt: skip
_RESERVED_ARGUMENTS = ("config", "output_loading_info", "trust_remote_code", "use_safetensors")


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
        return asdict(self)

    def pinned(self, name: str) -> "HubOptions":
        """Return the options with the commit that the revision stands for now; a folder has none.

        Everything that is loaded with them comes from one commit, even if the repository changes meanwhile.

        Raises:
            CheckpointError: if ``name`` is neither a folder nor a repository that can be read.
        """
        try:
            if Path(name).exists():
                return self
            commit = HfApi().resolve_revision(name, **self.arguments())
        except HUB_ERRORS as error:
            raise CheckpointError(unreachable(name, error)) from error
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


def is_hub_id(name: str) -> bool:
    """Tell whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def unreachable(name: str, error: Exception) -> str:
    """Say why nothing was found under a name."""
    if not is_hub_id(name):
        return nowhere(name)
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return f"{name} is neither a folder nor among the downloads, and the Hub is not asked while offline"
    return f"{name} is neither a folder nor a repository on the Hub that can be read: {error}"


def nowhere(name: str) -> str:
    """Say that a name is neither that of a folder nor one that the Hub could have."""
    return f"{name} does not exist: there is no such folder, and the Hub's names are owner/name"
