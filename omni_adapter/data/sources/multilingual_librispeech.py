"""Multilingual LibriSpeech: read books in eight languages, 44,659 hours of them English.

``facebook/multilingual_librispeech``, parquet, one configuration a language with the splits ``train``,
``dev``, ``test``, ``9_hours`` and ``1_hours``; English lies apart, in ``parler-tts/mls_eng``, with
``book_id`` in place of ``chapter_id`` and neither ``file`` nor ``id``.

============== ======== ==================================================================
audio          audio    16 kHz, or 48 kHz opus
original_path  string   the book's recording on the net
begin_time     float64  where in it, seconds
end_time       float64
transcript     string   what is read, in small letters and without punctuation
audio_duration float64  seconds
speaker_id     string   reader
chapter_id     string   chapter
file           string   name of the recording
id             string   utterance
============== ======== ==================================================================
"""

from omni_adapter.data.sources.recipe import Part, Recipe, read_speech

_LANGUAGES = {
    "german": "de", "dutch": "nl", "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt",
    "polish": "pl",
}  # fmt: skip

MULTILINGUAL_LIBRISPEECH = Recipe(
    name="multilingual-librispeech",
    hub_id="facebook/multilingual_librispeech",
    licence="cc-by-4.0",
    language=None,
    tasks=("asr", "tts"),
    columns=read_speech(("transcript",), speaker=("speaker_id",), id=("id",)),
    parts={
        "english": Part(hub_id="parler-tts/mls_eng", language="en"),
        **{name: Part(config=name, language=code) for name, code in _LANGUAGES.items()},
    },
)
