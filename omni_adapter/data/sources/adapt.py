"""A published data set in our schema: its rows, or one part of them, as its recipe makes them.

Source and recipe in, source out. Knows nothing of files.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from omni_adapter.data.sources.recipe import Part, Recipe, Rounds, Values, first_of
from omni_adapter.data.sources.spec import Source, SourceSpec
from omni_adapter.data.sources.tables import Stream
from omni_adapter.errors import DataError, RowError

logger = logging.getLogger(__name__)

_NEEDED = frozenset({"audio_in", "audio_out", "text_in", "text_out", "turns"})
_NAMES = frozenset({"id", "speaker"})  # numbers in some data sets, text in our schema
_SHOWN = 20  # values in an error


class Chosen:
    """A recipe and one of its parts.

    Args:
        recipe: the published data set.
        part: which part of it.
    """

    def __init__(self, recipe: Recipe, part: str) -> None:
        self.recipe, self.name = recipe, f"{recipe.name}:{part}"
        self.part: Part = recipe.parts[part]

    def columns(self, found: Sequence[str], *, source: str) -> tuple[str, ...]:
        """Return the columns of our schema that can be made of the columns found.

        Raises:
            DataError: if a column is missing that the published data set has.
        """
        ours = tuple(
            column for column, theirs in self.recipe.columns.items() if any(name in found for name in theirs)
        )
        missing = [
            " or ".join(theirs)
            for column, theirs in self.recipe.columns.items()
            if column in _NEEDED and column not in ours
        ]
        if missing:
            raise DataError(
                f"{source} is no copy of {self.recipe.name}: it lacks {', '.join(dict.fromkeys(missing))}; "
                f"found the columns {', '.join(sorted(found))}"
            )
        for column in self.recipe.foreign_codes.keys() & set(found):
            logger.info("%s: %s is left out, tokens of another codec", source, column)
        return ours + (("language",) if self.language and "language" not in ours else ())

    @property
    def language(self) -> str | None:
        """Language of the part's rows."""
        return self.part.language or self.recipe.language

    def convert(self, values: Values) -> dict[str, Any]:
        """Return one row in our schema.

        Raises:
            RowError: if the row is not as published.
        """
        row = {ours: first_of(values, theirs) for ours, theirs in self.recipe.columns.items()}
        if self.recipe.row is not None:
            row.update(self.recipe.row(values))
        for column in _NAMES & row.keys():
            row[column] = None if row[column] is None else str(row[column])
        row["language"] = row.get("language") or self.language
        return row

    def check_mapping(self, spec: SourceSpec) -> None:
        """Refuse a mapping that takes another codec's codes for ours.

        Raises:
            DataError: naming whose codes they are.
        """
        for column, owner in self.recipe.foreign_codes.items():
            if spec.columns.get(column) == "codes_out":
                raise DataError(
                    f"{spec.path}: {column} holds tokens of {owner}, which the codec cannot read; leave the "
                    "mapping out, and have answers encoded by recipes/prepare.py --speak audio_out"
                )


class Adapted:
    """Rows of a published data set, or of a part of it, in our schema.

    Args:
        source: the data set as it is published.
        chosen: recipe and part.

    Raises:
        DataError: if it is not what its recipe says, or the part is empty.
    """

    def __init__(self, source: Source, chosen: Chosen) -> None:
        self.name, self.root, self.lost_rows = source.name, source.root, source.lost_rows
        self._source, self._chosen = source, chosen
        self.columns = chosen.columns(source.columns, source=source.name)
        self._rows = _matching(source, chosen)
        rounds = chosen.recipe.rounds
        self._rounds = _Rounds(source, chosen, rounds) if rounds and rounds.number in source.columns else None
        if self._rounds is not None and "turns" not in self.columns:
            self.columns = (*self.columns, "turns")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = self._rows[index]
        values = self._source[number]
        try:
            row = self._chosen.convert(values)
            if self._rounds is not None:
                row["turns"] = self._rounds.earlier(values)
        except RowError as error:
            raise RowError(f"{self.name}, row {number}: {error}", reason=error.reason) from error
        return row

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row cannot be read or lacks it."""
        theirs = self._chosen.recipe.columns.get(column, ())
        if not theirs:
            yield from (None for _ in range(len(self)))
            return
        light = self._source.only(self._needed_by(column))
        for number in self._rows:
            try:
                yield self._chosen.convert(light[number]).get(column)
            except RowError:
                yield None

    def only(self, columns: Sequence[str]) -> Self:
        """Return the rows as they are: a recipe may need any column."""
        return self

    def fingerprint(self) -> str:
        """Return a digest that changes when the data, or what is taken of them, do."""
        return hashlib.sha256(f"{self._source.fingerprint()} {self._chosen.name}".encode()).hexdigest()

    def _needed_by(self, column: str) -> tuple[str, ...]:
        """Columns of theirs that one of ours is made of; all of them where it is not a plain copy."""
        if self._chosen.recipe.row is not None and column not in _NAMES:
            return self._source.columns
        return self._chosen.recipe.columns[column]


class _Rounds:
    """Earlier rounds of conversations that are spread over rows; only those of several rounds are kept."""

    def __init__(self, source: Source, chosen: Chosen, rounds: Rounds) -> None:
        self._rounds, self._chosen = rounds, chosen
        self._light = source.only(
            [name for column in ("text_in", "text_out") for name in chosen.recipe.columns[column]]
        )
        numbers = [_number(value) for value in source.values(rounds.number)]
        several = {
            key
            for key, number in zip(self._keys(source), numbers, strict=True)
            if number is not None and number > 1
        }
        self._places: dict[str, dict[int, int]] = {key: {} for key in several}
        for index, (key, number) in enumerate(zip(self._keys(source), numbers, strict=True)):
            if key in several and number is not None:
                self._places[key].setdefault(number, index)

    def earlier(self, values: Values) -> list[dict[str, str]]:
        """Return the rounds before a row's own as turns."""
        number = _number(values.get(self._rounds.number))
        key = self._key(values.get(column) for column in self._rounds.conversation)
        places = self._places.get(key)
        if number is None or places is None:
            return []
        turns: list[dict[str, str]] = []
        for earlier in range(min(1, *places), number):
            if earlier not in places:
                raise RowError(
                    f"round {number} of conversation {key} is there, round {earlier} is not",
                    reason="bad_turns",
                )
            said = self._light[places[earlier]]
            for role, column in (("user", "text_in"), ("assistant", "text_out")):
                text = first_of(said, self._chosen.recipe.columns[column])
                turns.append({"role": role, "content": str(text or "")})
        return turns

    def _keys(self, source: Source) -> Iterator[str]:
        columns = [source.values(column) for column in self._rounds.conversation]
        return (self._key(values) for values in zip(*columns, strict=True))

    @staticmethod
    def _key(values: Any) -> str:
        return json.dumps([str(value) for value in values])


def adapt(source: Source | Stream, chosen: Chosen) -> Source | Stream:
    """Return a published data set in our schema.

    In a stream, rows that belong to a conversation of several rounds have no earlier rounds to look up, and
    are rejected.

    Raises:
        DataError: if it is not what its recipe says, or the part is empty.
    """
    if not isinstance(source, Stream):
        return Adapted(source, chosen)
    for names, pattern in chosen.part.where.items():
        column = _first_there(names, source.columns, source.name)
        source.keep(column, partial(_matches, pattern))
    columns = chosen.columns(source.columns, source=source.name)
    source.convert(partial(_convert_alone, chosen), columns=columns, name=f"{source.name} as {chosen.name}")
    return source


def _convert_alone(chosen: Chosen, values: Values) -> Values:
    """One row without the rows around it."""
    rounds = chosen.recipe.rounds
    if rounds is not None and (number := _number(values.get(rounds.number))) is not None and number > 1:
        raise RowError(
            f"round {number} of a conversation needs the rounds before, which a stream cannot look up",
            reason="bad_turns",
        )
    return chosen.convert(values)


def _matching(source: Source, chosen: Chosen) -> Sequence[int]:
    """Numbers of the rows that belong to the part."""
    rows: Sequence[int] = range(len(source))
    for names, pattern in chosen.part.where.items():
        column = _first_there(names, source.columns, source.name)
        values = list(source.values(column))
        rows = [row for row in rows if _matches(pattern, values[row])]
        if not rows:
            found = sorted({str(value) for value in values})[:_SHOWN]
            raise DataError(
                f"{source.name} has no rows of {chosen.name}; its {column} holds {', '.join(found)}"
            )
    return rows


def _first_there(names: Sequence[str], found: Sequence[str], source: str) -> str:
    column = next((name for name in names if name in found), None)
    if column is None:
        raise DataError(
            f"{source} has no column {' or '.join(names)} to tell its parts by; found the columns "
            f"{', '.join(sorted(found))}"
        )
    return column


def _matches(pattern: str, value: Any) -> bool:
    return re.fullmatch(pattern, str(value), re.IGNORECASE | re.DOTALL) is not None


def _number(value: Any) -> int | None:
    """Number of a round: an int, or the digits of a text; None where there is none."""
    if isinstance(value, int):
        return value
    digits = re.search(r"\d{1,9}", str(value or ""))
    return int(digits.group()) if digits else None
