"""Where rows come from: files of one's own, data sets of the Hub, and published data sets by name."""

from omni_adapter.data.sources.adapt import Chosen
from omni_adapter.data.sources.folders import AudioFolder
from omni_adapter.data.sources.json_lines import JsonLines
from omni_adapter.data.sources.open import open_source, open_sources, usual_tasks
from omni_adapter.data.sources.recipe import Part, Recipe
from omni_adapter.data.sources.registry import SOURCES, choose, licences
from omni_adapter.data.sources.spec import PLAN_FILE, TOTALS_FILE, Source, SourceSpec, mix, rename
from omni_adapter.data.sources.tables import Stream, Table

__all__ = [
    "PLAN_FILE",
    "SOURCES",
    "TOTALS_FILE",
    "AudioFolder",
    "Chosen",
    "JsonLines",
    "Part",
    "Recipe",
    "Source",
    "SourceSpec",
    "Stream",
    "Table",
    "choose",
    "licences",
    "mix",
    "open_source",
    "open_sources",
    "rename",
    "usual_tasks",
]
