"""Every error that omni_adapter raises on purpose, in one tree.

OmniError
├── ConfigError               a setting is unknown, of the wrong type or out of range   (ValueError)
├── AudioError                a recording cannot be used; `.reason` is a stable code     (ValueError)
├── CodeGridError             a grid of codes has the wrong shape or holds illegal ids   (ValueError)
├── BackboneError             a language model lacks something that wrapping needs       (ValueError)
├── PromptError               messages, task or chat template do not fit together        (ValueError)
│   └── ContextOverflowError  prompt and reply do not fit into the base's positions
├── DataError                 a data set cannot be used, or too much of it is bad        (ValueError)
│   └── RowError              one row cannot serve its task; `.reason` is a stable code
├── TrainingError             a run must stop: no step is sound, or memory ran out       (RuntimeError)
├── BusyError                 a server is full or closed, or a reply was cut off         (RuntimeError)
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


class DataError(OmniError, ValueError):
    """A data set cannot be used: columns are missing, files are unreadable, or too many rows are bad."""


class RowError(DataError):
    """One row of a data set cannot serve its task.

    Attributes:
        reason: stable code of the cause, such as ``"no_text_out"``; safe to count and compare.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TrainingError(OmniError, RuntimeError):
    """A training run must stop: its steps are not sound, or its batches do not fit into memory."""


class BusyError(OmniError, RuntimeError):
    """A server takes no more conversations, or one was cancelled or cut off before its reply was over."""


class CheckpointError(OmniError, ValueError):
    """A saved folder is broken, incomplete or made for another base."""


class MissingDependencyError(OmniError, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; run: pip install 'omni-adapter[{extra}]'")
