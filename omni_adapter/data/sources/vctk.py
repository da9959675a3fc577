"""VCTK: 44 hours of 110 English speakers, recorded by two microphones at once.

``sanchit-gandhi/vctk``, parquet, one split ``train`` of 88,156 rows, the same columns as
``CSTR-Edinburgh/vctk``, whose loading script ``datasets`` no longer runs; or the archive of
datashare.ed.ac.uk/handle/10283/3443, unpacked, with ``wav48_silence_trimmed/p225/p225_001_mic1.flac`` and
``txt/p225/p225_001.txt``.

========== ======= ==================================================================
speaker_id string  ``p225``
audio      audio   48 kHz
file       string  path of the recording, which ends with the microphone
text       string  what is read
text_id    string  ``001``
age        string
gender     string
accent     string
region     string
comment    string
========== ======= ==================================================================

The usual part is the first microphone's, so that nothing is learned twice.
"""

from omni_adapter.data.sources.recipe import Part, Recipe, read_speech

_FILE = ("file", "id")

VCTK = Recipe(
    name="vctk",
    hub_id="sanchit-gandhi/vctk",
    licence="cc-by-4.0",
    language="en",
    tasks=("asr", "tts"),
    columns=read_speech(("text",), speaker=("speaker_id",)),
    parts={
        "mic1": Part(where={_FILE: r".*_mic1\.\w+"}),
        "mic2": Part(where={_FILE: r".*_mic2\.\w+"}),
        "all": Part(),
    },
)
