"""LibriSpeech: 960 hours of read English, the usual measure of what a model hears.

``openslr/librispeech_asr``, parquet, configurations ``all``, ``clean`` and ``other``; or the archives of
openslr.org/12, unpacked, where a ``.trans.txt`` holds the transcripts of a chapter.

========== ======= ==================================================================
file       string  path of the recording
audio      audio   16 kHz
text       string  what is read, in capitals and without punctuation
speaker_id int64   reader
chapter_id int64   chapter
id         string  utterance, ``84-121123-0000``
========== ======= ==================================================================

Transcripts are taken in small letters, as those of Multilingual LibriSpeech are: no model should learn to
shout.
"""

from omni_adapter.data.sources.recipe import Recipe, Values, libri_parts, read_speech


def _row(values: Values) -> Values:
    text = values.get("text")
    text = text.lower() if isinstance(text, str) else text
    return {"text_in": text, "text_out": text}


LIBRISPEECH = Recipe(
    name="librispeech",
    hub_id="openslr/librispeech_asr",
    licence="cc-by-4.0",
    language="en",
    tasks=("asr", "tts"),
    columns=read_speech(("text",), speaker=("speaker_id",), id=("id",)),
    parts=libri_parts("validation.clean", "validation.other", "test.clean", "test.other"),
    row=_row,
)
