"""Where rows come from: files of one's own, data sets of the Hub, and published data sets by name."""

from omni_adapter.data.sources.open import (
    PLAN_FILE,
    TOTALS_FILE,
    AudioFolder,
    JsonLines,
    Source,
    SourceSpec,
    Stream,
    Table,
    mix,
    open_source,
    rename,
)

__all__ = [
    "PLAN_FILE",
    "TOTALS_FILE",
    "AudioFolder",
    "JsonLines",
    "Source",
    "SourceSpec",
    "Stream",
    "Table",
    "mix",
    "open_source",
    "rename",
]
