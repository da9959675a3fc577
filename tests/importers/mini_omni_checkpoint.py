"""Checkpoints in the layout in which Mini-Omni was published, with random values, at any size."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import whisper
import yaml
from torch import Tensor

from examples.untrained_talker import make_tokenizer

EXTRA = {  # what the published model_config.yaml holds beside the sizes
    "asr_adapter": "llamamlp",
    "attn_dropout": 0.0,
    "bias": False,
    "force_align": False,
    "gelu_approximate": "none",
    "hf_config": {"name": "Qwen2-0.5B", "org": "Qwen"},
    "lm_head_bias": False,
    "mlp_class_name": "LLaMAMLP",
    "n_expert": 0,
    "n_expert_per_token": 0,
    "name": "Qwen2-0.5B",
    "norm_class_name": "RMSNorm",
    "padding_multiple": 512,
    "parallel_residual": False,
    "pos_type": "rope",
    "prompt_vocab_size": None,
    "rope_condense_ratio": 1,
    "rotary_percentage": 1.0,
    "scale_embeddings": False,
    "shared_attention_norm": False,
    "use_pretrain_phoneme_emb": False,
    "vocab_size": 50254,
}


@dataclass(frozen=True)
class Size:
    """Sizes of a checkpoint; the tables are as large as the published ones unless told otherwise."""

    n_embd: int = 32
    n_head: int = 4
    n_query_groups: int = 2
    n_layer: int = 2
    intermediate_size: int = 48
    text_vocab_size: int = 152_000
    audio_vocab_size: int = 4160
    whisper_adapter_dim: int = 32
    block_size: int = 2048
    rope_base: int = 1_000_000
    norm_eps: float = 1e-6
    add_qkv_bias: bool = True
    tie_word_embeddings: bool = False
    post_adapter: bool = False
    post_adapter_layers: int = 6


SMALL = Size(text_vocab_size=512, audio_vocab_size=128)
"""Tables of 448 + 64 text ids and seven rows of 64 + 64 ids."""


def lit_config(size: Size) -> dict:
    """The content of model_config.yaml."""
    rows = 7 * size.audio_vocab_size
    joint = {"cat_audio_vocab_size": rows, "padded_vocab_size": size.text_vocab_size + rows}
    return EXTRA | asdict(size) | joint | {"head_size": size.n_embd // size.n_head}


def lit_state(size: Size, *, seed: int = 9) -> dict[str, Tensor]:
    """The content of lit_model.pth."""
    generator = torch.Generator().manual_seed(seed)
    width, inside = size.n_embd, size.intermediate_size

    def normal(*shape: int, std: float | None = None) -> Tensor:
        std = shape[-1] ** -0.5 if std is None else std
        return torch.empty(shape).normal_(0, std, generator=generator)

    def norm() -> Tensor:
        return 1 + normal(width, std=0.2)

    def block(prefix: str) -> dict[str, Tensor]:
        fused = width + 2 * size.n_query_groups * (width // size.n_head)
        weights = {
            "norm_1.weight": norm(),
            "attn.attn.weight": normal(fused, width),
            "attn.proj.weight": normal(width, width),
            "norm_2.weight": norm(),
            "mlp.fc_1.weight": normal(inside, width),
            "mlp.fc_2.weight": normal(inside, width),
            "mlp.proj.weight": normal(width, inside),
        }
        if size.add_qkv_bias:
            weights["attn.attn.bias"] = normal(fused, std=0.5)
        return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}

    joint = size.text_vocab_size + 7 * size.audio_vocab_size
    state = {
        "transformer.wte.weight": normal(joint, width, std=1.0),
        "transformer.ln_f.weight": norm(),
        "whisper_adapter.fc_1.weight": normal(inside, size.whisper_adapter_dim),
        "whisper_adapter.fc_2.weight": normal(inside, size.whisper_adapter_dim),
        "whisper_adapter.proj.weight": normal(width, inside),
    }
    tied = size.tie_word_embeddings
    state["lm_head.weight"] = state["transformer.wte.weight"] if tied else normal(joint, width)
    for index in range(size.n_layer):
        state |= block(f"transformer.h.{index}")
    if size.post_adapter:
        state["transformer.post_adapter_audio_ln.weight"] = norm()
        state["transformer.post_adapter_audio_lm_head.weight"] = normal(7 * size.audio_vocab_size, width)
        for index in range(size.post_adapter_layers):
            state |= block(f"transformer.post_adapter.{index}")
    return state


def whisper_checkpoint(width: int) -> dict:
    """The content of small.pt: a whole Whisper of two layers, as the whisper package saves it."""
    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=width,
        n_audio_head=2,
        n_audio_layer=2,
        n_vocab=64,
        n_text_ctx=8,
        n_text_state=width,
        n_text_head=2,
        n_text_layer=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = whisper.model.Whisper(dims)
        torch.nn.init.normal_(model.decoder.positional_embedding)
    return {"dims": asdict(dims), "model_state_dict": model.state_dict()}


def write_tokenizer(folder: Path) -> None:
    """Tokenizer files under the names that they were published with."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_checkpoint(
    folder: Path, size: Size = SMALL, *, state: dict[str, Tensor] | None = None, encoder: bool = True
) -> Path:
    """Write a checkpoint as it was published, its encoder beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(lit_state(size) if state is None else state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(lit_config(size)), encoding="utf-8")
    write_tokenizer(folder)
    if encoder:
        torch.save(whisper_checkpoint(size.whisper_adapter_dim), folder / "small.pt")
    return folder
