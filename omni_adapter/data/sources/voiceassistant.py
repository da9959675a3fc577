"""VoiceAssistant-400K: spoken questions and answers in the codes of SNAC (paper, section 4.1).

``gpt-omni/VoiceAssistant-400K``, parquet, one split ``train`` of 470,054 rows:

=============== ============= =========================================================================
split_name      string        which of seven collections the row is from: ``identity``,
                              ``qa_assistant_v1_7k``, ...
index           string        number of the conversation in its collection
round           string        number of the round in the conversation
question        string        what is asked
question_audio  audio         the question as speech, by a synthesizer with many voices
answer          string        what is answered
answer_snac     string        the answer as speech: ``# 3512 891 ... # 77 ...``, a ``#`` before the codes of
                              each frame
=============== ============= =========================================================================

The codes of a frame are the entries of the K code rows of SNAC as they stand, without offsets: for the codec
at 24 kHz one of the coarsest level, one of the middle level, two of the finest, one of the middle, two of the
finest. That is the order of our code rows.
"""

from collections.abc import Mapping

from omni_adapter.data.sources.recipe import Part, Recipe, Rounds, Values
from omni_adapter.errors import RowError

ALL_TASKS = ("asr", "tts", "speech_to_text", "speech_to_speech", "text_to_speech", "text_to_text")

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "audio_in": ("question_audio",),
    "text_in": ("question",),
    "text_out": ("answer",),
    "codes_out": ("answer_snac",),
}


def _collection(pattern: str) -> Part:
    return Part(where={("split_name",): pattern})


def read_frames(text: str | None) -> list[list[int]] | None:
    """Read codes written frame by frame, ``# 1 2 3 # 4 5 6``, as code rows.

    Args:
        text: the codes; None or nothing but space for an answer without any.

    Returns:
        K lists of T codes, None without any.

    Raises:
        RowError: if that is not what the text holds.
    """
    if text is None or not text.strip():
        return None
    start, *frames = text.split("#")
    if not frames or start.strip():
        raise RowError(f"codes must start with '#', got {text[:20]!r}", reason="bad_codes")
    if not frames[-1].strip():
        frames.pop()
    codes = [frame.split() for frame in frames]
    if not codes or any(len(frame) != len(codes[0]) or not frame for frame in codes):
        lengths = sorted({len(frame) for frame in codes})
        raise RowError(f"every frame has as many codes as the others, got {lengths}", reason="bad_codes")
    try:
        return [[int(code) for code in row] for row in zip(*codes, strict=True)]
    except ValueError as error:
        raise RowError(f"codes must be whole numbers: {error}", reason="bad_codes") from error


def _row(values: Values) -> Values:
    return {"codes_out": read_frames(values.get("answer_snac"))}


VOICEASSISTANT = Recipe(
    name="voiceassistant-400k",
    hub_id="gpt-omni/VoiceAssistant-400K",
    licence="apache-2.0",
    language="en",
    tasks=ALL_TASKS,
    columns=COLUMNS,
    parts={
        "all": Part(),
        "alpaca-gpt4": _collection(r".*alpaca.*"),
        "identity": _collection(r".*identity.*"),
        "qaassistant": _collection(r".*qa[-_ ]?assistant.*"),
        "rlhf": _collection(r".*rlhf.*"),
        "trivia-singlechoice": _collection(r".*trivia[-_ ]?single.*"),
        "trivia-multichoice": _collection(r".*trivia[-_ ]?multi.*"),
        "openassistant": _collection(r".*(open[-_ ]?assistant|oasst).*"),
    },
    row=_row,
    rounds=Rounds(conversation=("split_name", "index"), number="round"),
)
