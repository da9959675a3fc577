"""LibriTTS: 586 hours of read English, made for speech synthesis.

``mythicinfinity/libritts``, parquet, configurations ``dev``, ``clean``, ``other`` and ``all``; or the
archives of openslr.org/60, unpacked, where each ``.wav`` has a ``.normalized.txt`` beside it.

=============== ============ ==================================================================
audio           audio        24 kHz
text_normalized string       what is read, numbers and signs in words
text_original   string       as in the book
speaker_id      string       reader
path            string       file in the original archive
chapter_id      string       chapter
id              string       utterance
=============== ============ ==================================================================
"""

from omni_adapter.data.sources.recipe import Recipe, libri_parts, read_speech

LIBRITTS = Recipe(
    name="libritts",
    hub_id="mythicinfinity/libritts",
    licence="cc-by-4.0",
    language="en",
    tasks=("asr", "tts"),
    columns=read_speech(("text_normalized", "text"), speaker=("speaker_id",), id=("id",)),
    parts=libri_parts("dev.clean", "dev.other", "test.clean", "test.other"),
)
