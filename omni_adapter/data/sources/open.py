"""Open one source of rows: parquet, JSON lines, audio folders, the Hub, streams, published data sets by name.

Source settings in, rows by number out. Everything is read through ``datasets`` but JSON lines, whose rows may
differ in form, and audio folders. Recordings stay undecoded, and damaged parts of files are counted. Knows
nothing of mixtures, samples or models.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from omni_adapter.data.rows import check_columns
from omni_adapter.data.sources.adapt import Chosen, adapt
from omni_adapter.data.sources.files import kind_of, local_files
from omni_adapter.data.sources.folders import AudioFolder
from omni_adapter.data.sources.json_lines import JsonLines
from omni_adapter.data.sources.registry import choose, hint
from omni_adapter.data.sources.spec import PLAN_FILE, TOTALS_FILE, Source, SourceSpec
from omni_adapter.data.sources.tables import (
    Stream,
    open_json_stream,
    open_parquet,
    open_repository,
    open_saved,
)
from omni_adapter.errors import DataError

_CARD = "README.md"  # says which files of a data set of the Hub belong to which split


def open_source(spec: SourceSpec, *, seed: int = 0) -> Source | Stream:
    """Open a source and check that it has the columns its task needs.

    Args:
        spec: what to open.
        seed: shuffles a stream.

    Raises:
        DataError: if it cannot be read, is empty, or lacks a column; the columns found are listed.
        MissingDependencyError: if ``datasets`` is not installed and the source needs it.
    """
    source = _open_any(spec, seed=seed)
    _check(source, spec)
    return source


def open_sources(specs: Sequence[SourceSpec], *, seeds: Sequence[int]) -> list[Source | Stream]:
    """Open several sources; those that differ in nothing but what is done with their rows are opened once.

    Args:
        specs: what to open.
        seeds: of each, to shuffle it if it is a stream.

    Raises:
        DataError: as ``open_source``.
        MissingDependencyError: as ``open_source``.
    """
    opened: dict[str, Source | Stream] = {}
    sources = []
    for spec, seed in zip(specs, seeds, strict=True):
        key = repr(replace(spec, task=None, weight=1.0, limit=None, shuffle=True))
        source = opened[key] if key in opened else _open_any(spec, seed=seed)
        _check(source, spec)
        if not isinstance(source, Stream):  # a stream stands somewhere, a table does not
            opened[key] = source
        sources.append(source)
    return sources


def usual_tasks(spec: SourceSpec) -> tuple[str, ...] | None:
    """Return what a published data set can teach, None for any other source."""
    chosen = choose(spec)
    return None if chosen is None else chosen.recipe.tasks


def _open_any(spec: SourceSpec, *, seed: int) -> Source | Stream:
    """A source in our schema or its own, its columns not yet checked."""
    chosen, shuffle_seed = choose(spec), seed if spec.shuffle else None
    if chosen is None:
        return _open(spec, seed=shuffle_seed)
    chosen.check_mapping(spec)
    return adapt(_open_published(spec, chosen, seed=shuffle_seed), chosen)


def _check(source: Source | Stream, spec: SourceSpec) -> None:
    """Refuse a source that lacks columns or rows."""
    unknown = [column for column in spec.columns if column not in source.columns]
    if unknown:
        raise DataError(
            f"{spec.path} has no column {', '.join(unknown)}; found the columns {', '.join(source.columns)}"
        )
    if spec.task is not None:
        names = {spec.columns.get(column, column) for column in source.columns}
        try:
            check_columns(names, task=spec.task, source=spec.path)
        except DataError as error:
            raise DataError(f"{error}{hint(spec)}") from error
    if not isinstance(source, Stream) and len(source) == 0:
        raise DataError(f"{spec.path} is empty")


def _open_published(spec: SourceSpec, chosen: Chosen, *, seed: int | None) -> Source | Stream:
    """A published data set with its own columns: a copy of it, or what the Hub has."""
    part, usual_split = chosen.part, SourceSpec.split
    split = spec.split if spec.split != usual_split else part.split
    if spec.recipe is None:
        hub_id = part.hub_id or chosen.recipe.hub_id
        if hub_id is None:
            name = chosen.recipe.name
            raise DataError(f"{name} reads files of your own: {{path: FOLDER, recipe: {name}}}")
        place = replace(spec, path=hub_id, name=spec.name or part.config, split=split)
        return open_repository(place, files=part.files, seed=seed)
    folder = Path(spec.path)
    is_repository = folder.is_dir() and not any(
        kind_of(file) == "audio" for file in local_files(spec.path) or ()
    )
    names = [file.name for file in folder.iterdir()] if is_repository else []
    if any(fnmatch(name, pattern) for pattern in part.files for name in names):
        return open_repository(replace(spec, split=split), files=part.files, seed=seed)
    if _CARD in names:
        return open_repository(replace(spec, name=spec.name or part.config, split=split), seed=seed)
    return _open(spec, seed=seed)


def _filled_columns(prepared: Path) -> tuple[str, ...]:
    """Columns of prepared data that hold anything: the files have every column of the schema."""
    try:
        return tuple(json.loads((prepared / TOTALS_FILE).read_text(encoding="utf-8"))["columns"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{prepared / TOTALS_FILE} does not say which columns are filled; prepare the data again"
        ) from error


def _open(spec: SourceSpec, *, seed: int | None) -> Source | Stream:
    files = local_files(spec.path)
    if files is None:
        if Path(spec.path).is_absolute() or spec.path.startswith((".", "~")) or "*" in spec.path:
            raise DataError(f"{spec.path} does not exist")
        return open_repository(spec, seed=seed)
    kinds, folder = {kind_of(file) for file in files} - {""}, Path(spec.path)
    root = folder if folder.is_dir() else files[0].parent
    if folder / PLAN_FILE in files and folder / TOTALS_FILE not in files:
        raise DataError(
            f"{spec.path} is not finished: run recipes/prepare.py again, it goes on where it stopped"
        )
    if "parquet" in kinds:
        parquet = [file for file in files if kind_of(file) == "parquet"]
        source = open_parquet(spec, parquet, root=root, seed=seed)
        return source.only(_filled_columns(folder)) if folder / TOTALS_FILE in files else source
    lines = [file for file in files if kind_of(file) == "json"]
    if lines and "audio" not in kinds and not spec.streaming:
        return JsonLines(lines, name=spec.path)
    if (folder / "state.json").is_file() and "arrow" in kinds:
        return open_saved(spec, files)
    if "audio" in kinds and folder.is_dir():
        return AudioFolder(folder, files)
    if lines:
        return open_json_stream(spec, lines, root=root, seed=seed)
    found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
    raise DataError(f"{spec.path} holds no parquet, JSON lines or audio; found {found}")
