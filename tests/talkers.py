"""Talkers that a test may change."""

from examples.untrained_talker import make_parts
from omni_adapter import OmniAdapter, SnacCodec


def fresh_talker(**settings) -> OmniAdapter:
    """Wrap small random parts, which have no names, with one TTS block or as ``settings`` say."""
    parts = make_parts()
    return OmniAdapter.wrap(
        parts.lm,
        tokenizer=parts.tokenizer,
        encoder=parts.whisper,
        codec=SnacCodec.from_model(parts.snac),
        **{"tts_layers": 1, **settings},
    )
