"""Every error that omni_adapter raises on purpose, in one tree.

OmniError
├── ConfigError               a setting is unknown, of the wrong type or out of range   (ValueError)
├── AudioError                a recording cannot be used; `.reason` is a stable code     (ValueError)
├── CodeGridError             a grid of codes has the wrong shape or holds illegal ids   (ValueError)
├── BackboneError             a language model lacks something that wrapping needs       (ValueError)
├── PromptError               messages, task or chat template do not fit together        (ValueError)
│   └── ContextOverflowError  prompt and reply do not fit into the base's positions
├── CheckpointError           a saved folder is broken or does not fit its base          (ValueError)
└── MissingDependencyError    an optional package is not installed                       (ImportError)
"""


class OmniError(Exception):
    """Base of every error that omni_adapter raises on purpose."""


class ConfigError(OmniError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class AudioError(OmniError, ValueError):
    """A recording cannot be used.

    Attributes:
        reason: stable code of the cause, such as ``"empty"`` or ``"not_finite"``; safe to count and compare.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class CodeGridError(OmniError, ValueError):
    """A grid of codes has the wrong shape or holds ids that its codec does not know."""


class BackboneError(OmniError, ValueError):
    """A language model lacks something that hearing or speaking needs."""


class PromptError(OmniError, ValueError):
    """Messages, task or chat template do not fit together."""


class ContextOverflowError(PromptError):
    """Prompt and reply do not fit into the positions that the base LM knows."""


class CheckpointError(OmniError, ValueError):
    """A saved folder is broken, incomplete or made for another base."""


class MissingDependencyError(OmniError, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; run: pip install 'omni-adapter[{extra}]'")
