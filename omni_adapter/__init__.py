"""Give any causal language model of transformers hearing and speech.

Shape legend, used in every docstring: B batch, N samples, M mel bins, F feature frames, E encoder width, A
steps of an audio span, S steps of a sequence, D width of the base LM, K code rows, T frames of codes, V ids
of a vocabulary.

Names are imported when they are first used, so that ``import omni_adapter`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_adapter.audio.codec import Codec, SnacCodec
    from omni_adapter.config import OmniConfig
    from omni_adapter.data.processor import OmniProcessor
    from omni_adapter.errors import (
        AudioError,
        BackboneError,
        CheckpointError,
        ConfigError,
        OmniError,
        PromptError,
    )
    from omni_adapter.generation.generator import GenerationSettings
    from omni_adapter.generation.sampling import SamplingSettings
    from omni_adapter.generation.streaming import Chunk, Reply
    from omni_adapter.hub.files import TINY_TALKER
    from omni_adapter.model import OmniModel
    from omni_adapter.session import Session
    from omni_adapter.talker import OmniAdapter

__version__ = "0.1.0"

__all__ = [
    "TINY_TALKER",
    "AudioError",
    "BackboneError",
    "CheckpointError",
    "Chunk",
    "Codec",
    "ConfigError",
    "GenerationSettings",
    "OmniAdapter",
    "OmniConfig",
    "OmniError",
    "OmniModel",
    "OmniProcessor",
    "PromptError",
    "Reply",
    "SamplingSettings",
    "Session",
    "SnacCodec",
]

_HOMES = {
    "omni_adapter.audio.codec": ("Codec", "SnacCodec"),
    "omni_adapter.config": ("OmniConfig",),
    "omni_adapter.data.processor": ("OmniProcessor",),
    "omni_adapter.errors": (
        "AudioError",
        "BackboneError",
        "CheckpointError",
        "ConfigError",
        "OmniError",
        "PromptError",
    ),
    "omni_adapter.generation.generator": ("GenerationSettings",),
    "omni_adapter.generation.sampling": ("SamplingSettings",),
    "omni_adapter.generation.streaming": ("Chunk", "Reply"),
    "omni_adapter.hub.files": ("TINY_TALKER",),
    "omni_adapter.model": ("OmniModel",),
    "omni_adapter.session": ("Session",),
    "omni_adapter.talker": ("OmniAdapter",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'omni_adapter' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
