"""Alpaca-GPT4: 52,002 written instructions with answers of a large model.

``vicgalle/alpaca-gpt4``, parquet, one split ``train``. Not for commercial use.

=========== ======= ==================================================================
instruction string  what is to be done
input       string  to what; may be empty
output      string  the answer
text        string  the three in a prompt; not read
=========== ======= ==================================================================
"""

from omni_adapter.data.sources.recipe import Part, Recipe, Values


def _row(values: Values) -> Values:
    pieces = (values.get("instruction") or "", values.get("input") or "")
    return {"text_in": "\n".join(piece.strip() for piece in pieces if piece.strip())}


ALPACA = Recipe(
    name="alpaca-gpt4",
    hub_id="vicgalle/alpaca-gpt4",
    licence="cc-by-nc-4.0",
    language="en",
    tasks=("text_to_text",),
    columns={"text_in": ("instruction",), "text_out": ("output",)},
    parts={"all": Part()},
    row=_row,
)
