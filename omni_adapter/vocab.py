"""Special ids of the code rows and of the text row. The only file that makes ids.

A code row speaks ``codebook_size`` codes followed by five marks. No id is ever added to the base LM's
vocabulary: the text row uses the base's own ids, and ``NO_TEXT`` where a step carries no text. Knows nothing
of models or layouts.
"""

from dataclasses import dataclass

NO_TEXT = -1
"""Fills the text row at steps that carry no text (audio spans, marks, after the end of the text)."""

IGNORE_INDEX = -100
"""Label of a position that carries no loss; the value that torch's cross-entropy ignores."""

_MARKS = ("end", "pad", "input", "answer", "asr")
_ALIGNMENT = 64  # rows of embedding and heads are rounded up to this for the matrix kernels


@dataclass(frozen=True)
class CodeVocabulary:
    """Ids of one code row: codes first, then the marks (the audio vocabulary of Mini-Omni).

    Args:
        codebook_size: entries of one codebook; codes are ``0 .. codebook_size - 1``.
    """

    codebook_size: int

    @property
    def end(self) -> int:
        """Follows the last code of a row, and closes an audio span of the prompt."""
        return self.codebook_size + _MARKS.index("end")

    @property
    def pad(self) -> int:
        """Stands where a row has no code: before its delay, after its end, under text-only steps."""
        return self.codebook_size + _MARKS.index("pad")

    @property
    def input(self) -> int:
        """Opens an audio span of the prompt."""
        return self.codebook_size + _MARKS.index("input")

    @property
    def answer(self) -> int:
        """Stands at the last step of the prompt when the answer is to be spoken."""
        return self.codebook_size + _MARKS.index("answer")

    @property
    def asr(self) -> int:
        """Stands at the last step of the prompt when the speech is to be transcribed."""
        return self.codebook_size + _MARKS.index("asr")

    @property
    def num_ids(self) -> int:
        """Codes and marks together."""
        return self.codebook_size + len(_MARKS)

    @property
    def size(self) -> int:
        """Rows of the embedding and of each head: ``num_ids`` rounded up to a multiple of 64."""
        return -(-self.num_ids // _ALIGNMENT) * _ALIGNMENT

    def mark(self, name: str) -> int:
        """Return the id of the mark ``name``, one of end, pad, input, answer, asr."""
        return self.codebook_size + _MARKS.index(name)


@dataclass(frozen=True)
class TextMarks:
    """Ids of the text marks of checkpoints trained with them (``prompt_format`` other than ``chat``)."""

    end: int
    pad: int
    input: int
    answer: int
    asr: int
