"""MOSS-002-sft: 1.16 million written conversations of several rounds, English and Chinese.

``fnlp/moss-002-sft-data``, five JSON files, each one list: ``en_helpfulness.json``, ``en_honesty.json``,
``en_harmlessness.json``, ``zh_helpfulness.json``, ``zh_honesty.json``.

========== ======= ==================================================================
plain_text string  ``[Human]: ... <eoh> [MOSS]: ... <eoa> [Human]: ...``
prefix     string  instructions that make the assistant say it is MOSS; left out
num_turns  string  how many
========== ======= ==================================================================

The paper speaks both sides: ``recipes/prepare.py moss-002-sft --speak audio_in --speak audio_out``.
"""

import re

from omni_adapter.data.sources.recipe import Part, Recipe, Values
from omni_adapter.errors import RowError

_SPEAKER = re.compile(r"\[(Human|MOSS)\]:")
_END = re.compile(r"<eo[hmat]>")
_ROLES = {"Human": "user", "MOSS": "assistant"}


def _row(values: Values) -> Values:
    start, *pieces = _SPEAKER.split(values.get("plain_text") or "")
    turns = [
        {"role": _ROLES[speaker], "content": _END.sub("", text).strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "user":
        turns.pop()  # a question that nobody answered
    roles = [turn["role"] for turn in turns]
    if not turns or start.strip() or roles != ["user", "assistant"] * (len(turns) // 2):
        raise RowError(
            "a conversation must go '[Human]: ... <eoh> [MOSS]: ... <eoa>' in turn", reason="bad_turns"
        )
    return {"turns": turns}


MOSS = Recipe(
    name="moss-002-sft",
    hub_id="fnlp/moss-002-sft-data",
    licence="cc-by-4.0",
    language=None,
    tasks=("text_to_text",),
    columns={"turns": ("plain_text",)},
    parts={
        "english": Part(files=("en_*.json",), language="en"),
        "chinese": Part(files=("zh_*.json",), language="zh"),
        "all": Part(files=("*.json",)),
    },
    row=_row,
)
