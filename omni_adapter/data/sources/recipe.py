"""A published data set as a recipe: where it lies, what it is for, and how its rows become ours.

Knows nothing of files or of single data sets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of a published data set.

    Attributes:
        config: configuration, as ``datasets`` names it.
        split: split, as ``datasets`` names it.
        files: patterns of the files that it is read from, where neither names it.
        hub_id: the data set that it lies in, where that is not the recipe's.
        where: pattern that the values of a column match in full, whatever their case; a column is a tuple of
            the names that it may have.
        language: ISO 639-1 code, where it is not the recipe's.
    """

    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    hub_id: str | None = None
    where: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    language: str | None = None


@dataclass(frozen=True)
class Rounds:
    """How rows of one conversation are told to belong together.

    Attributes:
        conversation: columns whose values rows of one conversation share.
        number: column with the number of the round, counted from 0 or 1.
    """

    conversation: tuple[str, ...]
    number: str


@dataclass(frozen=True)
class Recipe:
    """A published data set.

    Attributes:
        name: what it is called here.
        hub_id: its id on the Hub; None if it is only read from files of one's own.
        licence: as its publisher names it.
        language: ISO 639-1 code of all its rows; None where parts differ.
        tasks: what its rows can teach as they are published.
        columns: columns of our schema -> columns that they are taken from, the first one that is there.
        parts: its parts by name, the usual one first.
        row: makes what renaming cannot: values of one row in, columns of our schema out.
        rounds: how its conversations are spread over rows; None if each row stands alone.
        foreign_codes: columns with codes of other codecs, and whose they are; never read as ours.
    """

    name: str
    hub_id: str | None
    licence: str
    language: str | None
    tasks: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, Part]
    row: Callable[[Values], Values] | None = None
    rounds: Rounds | None = None
    foreign_codes: Mapping[str, str] = field(default_factory=dict)

    @property
    def usual_part(self) -> str:
        """Name of the part that is meant where none is named."""
        return next(iter(self.parts))


def read_speech(text: tuple[str, ...], **others: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Return the columns of speech that is read from a text: to be heard, and to be spoken.

    Args:
        text: columns that may hold the text.
        **others: further columns of our schema -> columns that they are taken from.
    """
    return {"audio_in": ("audio",), "audio_out": ("audio",), "text_in": text, "text_out": text, **others}


def libri_parts(*held_out: str) -> Mapping[str, Part]:
    """Return the parts of a data set that is split as LibriSpeech is: all of training first.

    Args:
        *held_out: its splits for validation and test.
    """
    train = ("train.clean.100", "train.clean.360", "train.other.500")
    splits = {name: Part("all", name) for name in (*train, *held_out)}
    return {"train": Part("all", "+".join(train)), **splits}


def first_of(values: Values, names: tuple[str, ...]) -> Any:
    """Return the value of the first of the columns that is there, None without any."""
    return next((values[name] for name in names if values.get(name) is not None), None)
