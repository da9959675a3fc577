"""LJ Speech, and folders of one's own in its layout: one voice, 24 hours.

``keithito/lj_speech``, parquet, one split ``train`` of 13,100 rows; or the archive of keithito.com, unpacked:
``wavs/LJ001-0001.wav`` and ``metadata.csv``, a line ``LJ001-0001|as in the book|in words`` each, no header.

=============== ======= ==================================================================
id              string  ``LJ001-0001``
audio           audio   22,050 Hz
file            string  path of the recording
text            string  as in the book
normalized_text string  numbers and signs in words
=============== ======= ==================================================================
"""

from omni_adapter.data.sources.recipe import Part, Recipe, read_speech

LJSPEECH = Recipe(
    name="ljspeech",
    hub_id="keithito/lj_speech",
    licence="public domain",
    language="en",
    tasks=("asr", "tts"),
    columns=read_speech(("normalized_text", "text"), id=("id",)),
    parts={"train": Part()},
)
