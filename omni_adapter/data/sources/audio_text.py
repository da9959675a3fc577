"""Recordings of one's own with what is said in them: to be heard, and to be spoken.

A folder with ``a.wav`` and ``a.txt`` beside it, with a ``metadata.csv`` or ``metadata.jsonl`` that names
``file_name`` and ``text``, or in the layout of LJ Speech; ``{path: recordings, recipe: audio-text}``.

======== ======= ==================================================================
id       string  name of the recording in the folder
audio    string  the same
text     string  what is said
speaker  string  whose voice it is, if the table says so
language string  ISO 639-1 code, likewise
======== ======= ==================================================================
"""

from omni_adapter.data.sources.recipe import Part, Recipe, read_speech

AUDIO_TEXT = Recipe(
    name="audio-text",
    hub_id=None,
    licence="your own",
    language=None,
    tasks=("asr", "tts"),
    columns=read_speech(
        ("normalized_text", "text", "transcription"),
        id=("id",),
        speaker=("speaker",),
        language=("language",),
    ),
    parts={"all": Part()},
)
