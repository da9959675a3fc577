"""A whole small talker with random weights, made in seconds without a network.

    python examples/untrained_talker.py build/talker

Every part is of the real kind (a causal LM of transformers with its own tokenizer and chat template, a
Whisper encoder, a SNAC with the geometry of the published 24 kHz one), only small and untrained: it shows how
things work, not what they can say. The tests use it too.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import snac
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)

TEXT = (
    "What is the capital of France? The capital of France is Paris. How are you today? I am fine, thank you. "
    "Tell me a story about the sea, the wind and the stars. Yes, of course. Once there was a small boat. "
    "user assistant system"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class Parts(NamedTuple):
    """What a talker is wrapped from."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    whisper: WhisperModel
    snac: snac.SNAC


def make_parts(seed: int = 0) -> Parts:
    """Small random parts, the same ones for the same seed."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Parts(make_lm(tokenizer).eval(), tokenizer, make_whisper().eval(), make_snac().eval())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: it can write anything, and knows the words of TEXT."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_lm(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A causal LM of two layers."""
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # Single bytes are made unlikely, so that the noise that it writes is at least made of words.
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    is_byte = torch.tensor([len(token) == 1 for token in tokens])
    lm.lm_head.weight.data[is_byte] *= 0.1
    return lm


def make_whisper() -> WhisperModel:
    """A Whisper of two layers with the true features: 80 mel bins, windows of 30 s."""
    return WhisperModel(
        WhisperConfig(
            vocab_size=64,
            num_mel_bins=80,
            max_source_positions=1500,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        )
    )


def make_snac(codebook_size: int = 64) -> snac.SNAC:
    """A thin SNAC with the rates, strides and rows of the one for 24 kHz, and few codes."""
    return snac.SNAC(
        sampling_rate=24000,
        encoder_dim=4,
        encoder_rates=[2, 4, 8, 8],
        decoder_dim=64,
        decoder_rates=[8, 8, 4, 2],
        attn_window_size=None,
        codebook_size=codebook_size,
        codebook_dim=8,
        vq_strides=[4, 2, 1],
        noise=True,
        depthwise=True,
    )


def build_untrained_talker(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a small untrained talker with all its parts into ``folder``."""
    from omni_adapter import OmniAdapter, SnacCodec

    parts = make_parts(seed)
    talker = OmniAdapter.wrap(
        parts.lm,
        tokenizer=parts.tokenizer,
        encoder=parts.whisper,
        codec=SnacCodec.from_model(parts.snac),
        tts_layers=2,
        seed=seed,
    )
    # Untrained heads may end speech at any step; at logit zero the end is never the most likely id.
    vocabulary = talker.config.vocabulary
    talker.model.code_heads.proj.weight.data[vocabulary.end :: vocabulary.size] = 0
    talker.save_pretrained(folder, include=("base", "encoder", "codec"), name="untrained-talker")
    return Path(folder)


if __name__ == "__main__":
    print(f"saved an untrained talker in {build_untrained_talker(sys.argv[1])}")
