"""SLAM-Omni's three data sets: spoken questions, several rounds in one row, and codes of another codec.

``worstchan/VoiceAssistant-400K-SLAM-Omni``, ``worstchan/UltraChat-300K-SLAM-Omni`` and
``worstchan/Belle_1.4M-SLAM-Omni``, parquet, one split ``train`` each:

============================= ==================================== =======================================
split_name                    string                               collection
index                         int64                                number of the conversation
round                         int64                                rounds up to this one
question                      string                               the question; with earlier rounds before
                                                                   it: ``<USER>: ... <ASSISTANT>: ...
                                                                   <USER>: ...``
question_audio                ``{array, path, sampling_rate}``     the last question as samples
answer                        string                               what is answered
answer_cosyvoice_speech_token list of int64                        the answer in tokens of CosyVoice
answer_snac                   string                               as in VoiceAssistant-400K; may be empty
============================= ==================================== =======================================

Recordings lie there as lists of samples, 800 GB for Belle: ``streaming: true`` spares the copy. The tokens of
CosyVoice are no codes of ours, and are left out; answers without ``answer_snac`` are spoken by
``recipes/prepare.py --speak audio_out``.
"""

import re

from omni_adapter.data.sources.recipe import Part, Recipe, Values
from omni_adapter.data.sources.voiceassistant import ALL_TASKS, COLUMNS, read_frames
from omni_adapter.errors import RowError

_SPEAKER = re.compile(r"<(USER|ASSISTANT)>:")
_ROLES = {"USER": "user", "ASSISTANT": "assistant"}
_WRITTEN = ("asr", "speech_to_text", "text_to_text")


def _row(values: Values) -> Values:
    start, *pieces = _SPEAKER.split(values.get("question") or "")
    turns = [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if start.strip():
        turns.insert(0, {"role": "user", "content": start.strip()})
    if turns and turns[-1]["role"] != "user":
        raise RowError("the question must end with what the user says", reason="bad_turns")
    return {
        "text_in": turns[-1]["content"] if turns else None,
        "turns": turns[:-1],
        "codes_out": read_frames(values.get("answer_snac")),
    }


def _recipe(name: str, hub_id: str, *, licence: str, language: str, tasks: tuple[str, ...]) -> Recipe:
    return Recipe(
        name=name,
        hub_id=hub_id,
        licence=licence,
        language=language,
        tasks=tasks,
        columns={**COLUMNS, "turns": ("question",)},
        parts={"all": Part()},
        row=_row,
        foreign_codes={"answer_cosyvoice_speech_token": "CosyVoice"},
    )


VOICEASSISTANT_SLAM_OMNI = _recipe(
    "voiceassistant-400k-slam-omni",
    "worstchan/VoiceAssistant-400K-SLAM-Omni",
    licence="mit",
    language="en",
    tasks=ALL_TASKS,
)
ULTRACHAT = _recipe(
    "ultrachat-300k-slam-omni",
    "worstchan/UltraChat-300K-SLAM-Omni",
    licence="mit",
    language="en",
    tasks=_WRITTEN,
)
BELLE = _recipe(
    "belle-1.4m-slam-omni",
    "worstchan/Belle_1.4M-SLAM-Omni",
    licence="gpl-3.0",
    language="zh",
    tasks=_WRITTEN,
)
