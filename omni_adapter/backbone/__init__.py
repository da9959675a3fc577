"""Any causal LM of transformers behind a handful of methods.

Embeddings in, text logits and hidden states out: [B, S, D] -> [B, S, V] and [B, S, hidden width]. The only
package that touches other people's models, through public calls of transformers and PEFT; what a model can do
is read from its signatures and seen by running a few tokens, never from its name. Knows nothing of audio,
codes, tokenizers or prompts.

    inspection.py   what can be read off an LM without running it
    fixed.py        layers of a cache whose memory is taken once
    caches.py       what an LM hands from step to step, and rows of it
    runner.py       one pass of an LM over embeddings
    probes.py       what only running a few tokens tells
    projection.py   hidden states to logits, by the LM's own head
    static.py       a step in shapes that never change, for an accelerator to record
    packing.py      several samples in one row
    lora.py         LoRA: where it can go, on and off, to a folder and back
    carried.py      an adapter of others that a base comes with
    backbone.py     ``Backbone``, which puts them together

A file imports from those above it.
"""

from omni_adapter.backbone.backbone import Backbone
from omni_adapter.backbone.caches import BackboneCache
from omni_adapter.backbone.carried import ADAPTER_CONFIG, ADAPTER_FILES, Carried, read_carried, take_adapter
from omni_adapter.backbone.inspection import inspect_base
from omni_adapter.backbone.lora import is_lora
from omni_adapter.backbone.packing import Packing
from omni_adapter.backbone.runner import BackboneOutput

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILES",
    "Backbone",
    "BackboneCache",
    "BackboneOutput",
    "Carried",
    "Packing",
    "inspect_base",
    "is_lora",
    "read_carried",
    "take_adapter",
]
