"""Talkers of known sizes with random weights, for timing without any download; and those of a name.

A name in, a talker out. Speed does not depend on what the weights are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import snac
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.audio.codec import SnacCodec
from omni_adapter.errors import ConfigError
from omni_adapter.hub import CONFIG_FILE
from omni_adapter.talker import OmniAdapter

_WHISPER_SMALL = {
    "d_model": 768,
    "encoder_layers": 12,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
_SNAC_24KHZ = {
    "sampling_rate": 24000,
    "encoder_dim": 48,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 1024,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 4096,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}


@dataclass(frozen=True)
class Preset:
    """Sizes of a talker; its weights are random.

    Attributes:
        lm: config of the base, with its ``model_type``.
        encoder: config of the Whisper encoder.
        codec: arguments of the SNAC.
        tts_layers: TTS blocks.
    """

    lm: Mapping[str, Any]
    encoder: Mapping[str, Any]
    codec: Mapping[str, Any]
    tts_layers: int = 6


PRESETS: Mapping[str, Preset] = {
    "qwen2-0.5b": Preset(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        _WHISPER_SMALL,
        _SNAC_24KHZ,
    ),
    "qwen2-1.5b": Preset(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        _WHISPER_SMALL,
        _SNAC_24KHZ,
    ),
    "smollm2-135m": Preset(
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        _WHISPER_SMALL,
        _SNAC_24KHZ,
    ),
    "smollm2-360m": Preset(
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        _WHISPER_SMALL,
        _SNAC_24KHZ,
    ),
    "llama-3.2-1b": Preset(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        _WHISPER_SMALL,
        _SNAC_24KHZ,
    ),
    "tiny": Preset(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        _WHISPER_SMALL
        | {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        _SNAC_24KHZ | {"encoder_dim": 4, "decoder_dim": 64, "codebook_size": 64},
        tts_layers=2,
    ),
}
"""Talkers of known sizes, for timing without any download."""

SHAPES: Mapping[str, str] = {
    "tiny": "tiny",
    "0.1b": "smollm2-135m",
    "0.4b": "smollm2-360m",
    "0.5b": "qwen2-0.5b",
    "1b": "llama-3.2-1b",
    "1.5b": "qwen2-1.5b",
}
"""Presets by size."""

REFERENCE_CONTEXT_STEPS = 2048
"""Length of the published implementation's cache: the least that it accepts."""


def random_talker(preset: str, *, dtype: str = "float32", seed: int = 0, **settings: Any) -> OmniAdapter:
    """Build a talker with random weights of true size.

    Args:
        preset: key of ``PRESETS``.
        dtype: type of the base and of what is added.
        seed: of the weights.
        **settings: other arguments of ``wrap``, such as ``tts_layers`` and ``precision``.

    Raises:
        ConfigError: if there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset is called {preset!r}; there are {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**sizes.lm)
        lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
        assert isinstance(lm, PreTrainedModel)
        encoder = WhisperEncoder(WhisperConfig(**sizes.encoder))
        codec = SnacCodec.from_model(snac.SNAC(**sizes.codec))
    return OmniAdapter.wrap(
        lm,
        tokenizer=make_tokenizer(preset),
        encoder=encoder,
        codec=codec,
        seed=seed,
        **{"tts_layers": sizes.tts_layers, **settings},
    )


def load_talker(name: str, *, dtype: str = "auto", **loading: Any) -> OmniAdapter:
    """Load a saved talker, or wrap a plain causal LM.

    Args:
        name: folder or Hub id of either.
        dtype: type of the base and of what is added; ``auto`` takes that of the files.
        **loading: other arguments of ``from_pretrained`` or ``wrap``, such as ``precision``.

    Raises:
        OmniError: if it is neither.
    """
    is_talker = (Path(name) / CONFIG_FILE).is_file() if Path(name).is_dir() else _has_config(name)
    if is_talker:
        return OmniAdapter.from_pretrained(name, dtype=dtype, **loading)
    return OmniAdapter.wrap(name, dtype=dtype, **loading)


def make_question(seconds: float, rate: int) -> NDArray[np.float32]:
    """Something to hear: a tone that swells, with noise; speed does not depend on what is said."""
    time_s = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time_s))
    tone = np.sin(2 * np.pi * 220 * time_s) * np.sin(2 * np.pi * 3 * time_s)
    return np.asarray(0.3 * tone + 0.02 * noise, dtype=np.float32)


def question_for(talker: OmniAdapter, seconds: float) -> list[dict[str, Any]]:
    """Return a conversation that asks a talker something spoken of that length."""
    rate = talker.processor.log_mel.sampling_rate
    content = [{"type": "audio", "audio": (make_question(seconds, rate), rate)}]
    return [{"role": "user", "content": content}]


def make_tokenizer(preset: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a preset: a word for each id, so that whatever is decoded can be read."""
    vocab_size = PRESETS[preset].lm["vocab_size"]
    words = ["<end>", "<unknown>", *(f"word{index}" for index in range(2, vocab_size))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"
    )


def _has_config(name: str) -> bool:
    """Whether a repository of the Hub holds a talker; if it is none at all, wrapping says so."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(name, CONFIG_FILE)
    except (OSError, HFValidationError, HfHubHTTPError):
        return False
    return True
