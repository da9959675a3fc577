"""OpenOrca: 4.2 million written questions with answers of large models; the paper takes 2 million.

``Open-Orca/OpenOrca``, two parquet files, one split ``train``:

============= ======= ==================================================================
id            string  ``niv.242684``; the same question may come twice
system_prompt string  may be empty
question      string
response      string
============= ======= ==================================================================
"""

from omni_adapter.data.sources.recipe import Part, Recipe

OPEN_ORCA = Recipe(
    name="open-orca",
    hub_id="Open-Orca/OpenOrca",
    licence="mit",
    language="en",
    tasks=("text_to_text",),
    columns={
        "system": ("system_prompt",),
        "text_in": ("question",),
        "text_out": ("response",),
    },
    parts={
        "all": Part(),
        "1m": Part(files=("1M-*.parquet",)),
        "3.5m": Part(files=("3_5M-*.parquet",)),
    },
)
