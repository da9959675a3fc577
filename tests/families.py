"""Every causal LM of transformers' mapping, tiny and random, from its config alone.

``build_family("llama")`` gives a model of two layers and width 32. One generic shrinker serves all config
classes; the few fields that only one family has are in ``OVERRIDES``.
"""

from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL_FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

POPULAR: tuple[str, ...] = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "cohere2",
    "deepseek_v3",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "falcon_h1",
    "mamba2",
    "jamba",
    "lfm2",
    "stablelm",
    "glm4",
    "ernie4_5",
)

VOCAB_SIZE = 128
WIDTH = 32
LAYERS = 2
HEADS = 4

SMALL: dict[str, Any] = {
    # every spelling of the common fields; a field is set where the family's config has it
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "n_embd": WIDTH,
    "embedding_size": WIDTH,
    "embedding_dim": WIDTH,
    "n_positions": 256,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "n_ctx": 256,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_blocks": LAYERS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "intermediate_size": 2 * WIDTH,
    "ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "encoder_ffn_dim": 2 * WIDTH,
    "n_inner": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "shared_intermediate_size": WIDTH,
    "expert_ffn_hidden_size": WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_topk": 2,
    "top_k_experts": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    "sliding_window": 8,
    "first_k_dense_replace": 1,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "use_cache": True,
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

_PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
}
_GEMMA4_ASSISTANT = {
    "text_config": _GEMMA4
    | dict.fromkeys(_PER_LAYER_INPUTS, 0)
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    }
}
_DOTS3 = {
    "num_key_value_heads": HEADS,
    "layer_types": ["full_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse"],
}
_QWEN4_EXP = _LINEAR_ATTENTION | {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 128,
    "split_ngram_parts": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 8, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
        "encoder_hash_byte_group_vocab": 128,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH},
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _PER_LAYER_INPUTS | {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4": {"text_config": _GEMMA4 | _PER_LAYER_INPUTS},
    "gemma4_assistant": _GEMMA4_ASSISTANT,
    "gemma4_text": _GEMMA4 | _PER_LAYER_INPUTS,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_assistant": _GEMMA4_ASSISTANT,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {"linear_attn_config": {"num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "moshi": {"sliding_window": 256},  # its full pass heeds no window, its cache does
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "qwen3_5": {"text_config": _LINEAR_ATTENTION},
    "qwen3_5_moe": {"text_config": _LINEAR_ATTENTION},
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "qwen3_5_text": _LINEAR_ATTENTION,
    "qwen3_next": _LINEAR_ATTENTION,
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attention_head_size": 8},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "shape_vocab_size": 128,
        "pronunciation_vocab_size": 128,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}

INVALID_DEFAULTS: dict[str, dict[str, Any]] = {
    name: {
        "text_config": dict.fromkeys(_PER_LAYER_INPUTS, 0)
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 4}
    }
    for name in ("gemma4_assistant", "gemma4_unified_assistant")
}
"""What the default config of a family must be given to be valid."""

DECODER_PARTS: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Configs of several models of which the causal LM takes one part."""


@cache
def build_family(model_type: str) -> PreTrainedModel:
    """Build a family's tiny model, once per session; callers leave it as it is."""
    return build_fresh(model_type)


def build_fresh(model_type: str, **changes: Any) -> PreTrainedModel:
    """Build a family's tiny model, random and ready for inference; ``changes`` go into its config."""
    config = tiny_config(model_type, **changes)
    torch.manual_seed(0)
    if (part := DECODER_PARTS.get(model_type)) is not None:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](getattr(config, part)).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Shrink the default config of a family; ``changes`` win."""
    kind = CONFIG_MAPPING[model_type]
    default = kind(**INVALID_DEFAULTS.get(model_type, {}))
    return kind(**_shrunk(default, OVERRIDES.get(model_type, {}) | changes))


def _shrunk(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a tiny config of the same class."""
    default = config.to_dict()
    known = set(default) | set(config.attribute_map)
    layers = _layers_to_keep(config)
    values = {
        name: value for name, value in SMALL.items() if name in known and name not in config.attribute_map
    }
    values = {name: len(layers) if name in LAYER_COUNTS else value for name, value in values.items()}
    if "qk_rope_head_dim" in known:
        values.pop("head_dim", None)  # follows from the parts of the latent attention's heads
        values["num_key_value_heads"] = HEADS
    special = [name for name in default if name.endswith(("_token_id", "_token_index")) and name not in SMALL]
    values |= {name: VOCAB_SIZE - 1 - index for index, name in enumerate(special)}
    for name, value in default.items():
        if name == "per_layer_config":
            continue
        if layers and isinstance(value, (list, tuple)) and len(value) == _num_layers(config):
            values[name] = [value[index] for index in layers]
        if isinstance(part := vars(config).get(name), PreTrainedConfig):
            values[name] = _shrunk(part, changes.get(name, {}))
    parts = {name for name, value in values.items() if isinstance(value, dict)}
    return values | {name: value for name, value in changes.items() if name not in parts}


def _num_layers(config: PreTrainedConfig) -> int:
    return next((count for name in LAYER_COUNTS if isinstance(count := getattr(config, name, None), int)), 0)


def _layers_to_keep(config: PreTrainedConfig) -> list[int]:
    """Indices of layers of the default config: the first of each kind, two at least."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    indices = sorted(first.values())
    return indices if len(indices) >= LAYERS else list(range(LAYERS))
