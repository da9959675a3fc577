"""Wrap language models of three families: one code path, whatever the architecture.

    python examples/any_model.py

The models are tiny and random, so that this runs in seconds without a network; with real ones it is
`OmniAdapter.wrap("some-org/some-model")`. Wrapping leaves the base's own answers as they are, bit for bit.
"""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging
from untrained_talker import make_snac, make_tokenizer, make_whisper

from omni_adapter import OmniAdapter, SnacCodec

logging.set_verbosity_error()
tokenizer = make_tokenizer()
size = len(tokenizer)
torch.manual_seed(0)
bases = [
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    ),
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=1024)),
    Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8,
            n_groups=1,
        )
    ),
]  # fmt: skip
codec = SnacCodec.from_model(make_snac())
encoder = make_whisper()

for base in bases:
    base.eval()
    ids = torch.tensor([tokenizer("What is the capital of France?")["input_ids"]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    talker = OmniAdapter.wrap(base, tokenizer=tokenizer, encoder=encoder, codec=codec, tts_layers=1)
    with torch.no_grad():
        after = talker.model.backbone(talker.model.backbone.embed(ids)).logits
    reply = talker.chat(text="What is the capital of France?", max_new_tokens=20)
    same = torch.equal(before, after)
    print(f"{type(base).__name__}: same answers as before: {same}, said {reply.duration_s:.1f} s")
