"""The released Mini-Omni: its litgpt checkpoint as a talker (https://github.com/gpt-omni/mini-omni).

``lit_model.pth``, ``model_config.yaml``, tokenizer files and perhaps ``small.pt`` in, a talker out: a Qwen2
with the text rows of the joint tables, code embedding and heads with the audio rows, the audio adapter, and
the TTS blocks where the checkpoint has them. Knows nothing of how a talker is run or saved.

    lit_model.pth                                              talker
    transformer.wte.weight, lm_head.weight: text rows          the base's embedding and head
                            audio rows, 7 × 4160               code_embedding, code_heads
    transformer.h.N, transformer.ln_f                          the base's layers and final norm
    whisper_adapter.fc_1, fc_2, proj                           audio_adapter.gate, up, down
    transformer.post_adapter.N, post_adapter_audio_ln          tts_blocks.blocks.N, norm
    transformer.post_adapter_audio_lm_head                     code_heads, in place of lm_head's audio rows
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from omni_adapter.config import Positive, parse
from omni_adapter.errors import CheckpointError, ConfigError
from omni_adapter.importers.port import (
    DEFAULT_CODEC,
    DEFAULT_ENCODER,
    SPECIAL_IDS,
    ImportOptions,
    Source,
    keep_inside,
    lm_dtype,
    load_weights,
    text_marks,
)
from omni_adapter.modules.audio_encoder import AudioEncoder
from omni_adapter.talker import OmniAdapter
from omni_adapter.tensor_files import check_finite, check_shapes, read_torch_file
from omni_adapter.vocab import TextMarks

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "lit_model.pth"
CONFIG_FILE = "model_config.yaml"
ENCODER_FILE = "small.pt"

_MAX_LAYERS = 1000
_MAX_CONFIG_BYTES = 1 << 20
_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_POST = "transformer.post_adapter"

_FIXED: Final[Mapping[str, tuple[Any, Any]]] = {
    # setting: (what a talker can have, what litgpt takes where the file says nothing)
    "asr_adapter": ("llamamlp", "llamamlp"),
    "bias": (False, True),
    "lm_head_bias": (False, False),
    "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"),
    "n_expert": (0, 0),
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "parallel_residual": (False, True),
    "pos_type": ("rope", "rope"),
    "rope_condense_ratio": (1, 1),
    "rotary_percentage": (1, 0.25),
    "scale_embeddings": (False, False),
    "shared_attention_norm": (False, False),
}


@dataclass(frozen=True)
class LitConfig:
    """What matters of ``model_config.yaml``; names and defaults are litgpt's."""

    n_embd: Positive
    n_head: Positive
    n_layer: Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
    intermediate_size: Positive
    n_query_groups: Positive | None = None
    head_size: Positive | None = None
    block_size: Positive = 4096
    norm_eps: float = 1e-5
    rope_base: float = 10_000
    add_qkv_bias: bool | None = None
    tie_word_embeddings: bool = False
    text_vocab_size: Positive = 152_000
    audio_vocab_size: Positive = 4160
    cat_audio_vocab_size: Positive = 29_120
    whisper_adapter_dim: Positive = 768
    post_adapter: bool = False
    post_adapter_layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS)] = 6

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.query_groups:
            raise ValueError(
                f"n_head must divide n_embd and n_query_groups must divide n_head, got n_embd={self.n_embd}, "
                f"n_head={self.n_head}, n_query_groups={self.query_groups}"
            )
        if self.head_size not in (None, self.n_embd // self.n_head):
            raise ValueError(f"head_size must be n_embd / n_head, got {self.head_size}")
        if min(self.text_vocab_size, self.audio_vocab_size) <= SPECIAL_IDS:
            raise ValueError(
                f"text_vocab_size and audio_vocab_size hold {SPECIAL_IDS} marks beside their ids"
            )
        if self.cat_audio_vocab_size % self.audio_vocab_size:
            raise ValueError("cat_audio_vocab_size must be a multiple of audio_vocab_size")

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.n_query_groups or self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have biases; elsewhere there are none."""
        return bool(self.add_qkv_bias)

    @property
    def joint_rows(self) -> int:
        """Rows of the joint tables: text ids, then those of each code row."""
        return self.text_vocab_size + self.cat_audio_vocab_size

    @property
    def text_marks(self) -> TextMarks:
        """Ids of the text marks."""
        return text_marks(self.text_vocab_size)


class MiniOmniImporter:
    """Reads ``lit_model.pth`` and what belongs to it."""

    summary = "Mini-Omni: lit_model.pth, model_config.yaml, tokenizer files, and small.pt if it is there"
    takes: Collection[str] = frozenset({"encoder", "codec"})
    files: Collection[str] = (WEIGHTS_FILE, CONFIG_FILE, ENCODER_FILE, "*.json", "merges.txt", "README.md")

    def read(self, source: Source, *, options: ImportOptions) -> OmniAdapter:
        """Return the checkpoint as a talker that speaks as the original does.

        Its prompts, the mean over all streams, the full window of the encoder and the freely written code
        rows are the original's; a tied head is two equal tables here, which may part in training. Not the
        original's: an end mark counts in the very first step too, recordings longer than the encoder's window
        are heard to their end, and the sound of a stream has no seams and no missing end.

        Raises:
            CheckpointError: if files are missing, broken, or do not fit each other.
            ConfigError: if the checkpoint has a setting that a talker cannot have; the message names it.
        """
        weights_path, config_path = source.file(WEIGHTS_FILE), source.file(CONFIG_FILE)
        config = read_lit_config(config_path)
        tokenizer = _load_tokenizer(source, config)
        state = read_state(weights_path)
        config = _with_what_is_there(config, state, source=str(weights_path))
        check_state(state, config, source=str(weights_path))
        lm = build_lm(config, state, dtype=lm_dtype(options.dtype, state[_WTE]))
        encoder = _encoder(source, options, config)
        talker = OmniAdapter.wrap(
            lm,
            tokenizer=tokenizer,
            encoder=encoder,
            codec=options.codec or DEFAULT_CODEC,
            tts_layers=config.post_adapter_layers if config.post_adapter else 0,
            text_end_ids=[config.text_marks.end],
            **_settings(config),
            **replace(options.hub, revision=None).arguments(),
        )
        _check_codec(talker, config)
        for module, weights in _added(talker, config, state):
            load_weights(module, weights, source=str(weights_path))
        own = ("base", "encoder") if isinstance(encoder, AudioEncoder) else ("base",)
        return keep_inside(talker, own, source=source)


def read_lit_config(path: Path) -> LitConfig:
    """Read ``model_config.yaml``; settings that make no difference to a talker are passed over.

    Raises:
        ConfigError: naming the settings that a talker cannot have, or that have a wrong value.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes, which no config is")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}")
    wrong = [
        f"{name}={values.get(name, default)!r} instead of {only!r}"
        for name, (only, default) in _FIXED.items()
        if values.get(name, default) != only
    ]
    if "Gemma" in str(values.get("name")):
        wrong.append(f"name={values['name']!r}, whose norms litgpt computes in another way")
    if wrong:
        raise ConfigError(f"{path} has settings that a talker cannot have: {'; '.join(wrong)}")
    known = LitConfig.__dataclass_fields__
    return parse(LitConfig, {name: values[name] for name in known if name in values}, source=str(path))


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights by their litgpt names, mapped from the file where its form allows.

    Raises:
        CheckpointError: if the file is broken or holds anything but tensors by name.
    """
    state = read_torch_file(path, mapped=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold tensors by name, alone or under 'model'")
    return dict(state)


def expected_shapes(config: LitConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of this config holds, by its litgpt name."""
    width, inside = config.n_embd, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        _WTE: (config.joint_rows, width),
        _HEAD: (config.joint_rows, width),
        "transformer.ln_f.weight": (width,),
        "whisper_adapter.fc_1.weight": (inside, config.whisper_adapter_dim),
        "whisper_adapter.fc_2.weight": (inside, config.whisper_adapter_dim),
        "whisper_adapter.proj.weight": (width, inside),
    }
    for index in range(config.n_layer):
        shapes |= _block_shapes(f"transformer.h.{index}", config)
    if config.post_adapter:
        shapes[f"{_POST}_audio_ln.weight"] = (width,)
        shapes[f"{_POST}_audio_lm_head.weight"] = (config.cat_audio_vocab_size, width)
        for index in range(config.post_adapter_layers):
            shapes |= _block_shapes(f"{_POST}.{index}", config)
    return shapes


def check_state(state: Mapping[str, Tensor], config: LitConfig, *, source: str) -> None:
    """Compare the weights with the config.

    Raises:
        CheckpointError: naming missing, unknown, wrongly shaped or broken tensors, or tied ones that differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes(shapes, expected=expected_shapes(config), source=source)
    whole = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(f"{source} holds numbers of type {state[whole[0]].dtype} in {whole[0]}")
    check_finite(state, source=source)
    if config.tie_word_embeddings and not torch.equal(state[_WTE], state[_HEAD]):
        raise CheckpointError(
            f"{source}: {CONFIG_FILE} says tie_word_embeddings, but {_WTE} and {_HEAD} differ"
        )


def build_lm(config: LitConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the language model with the text rows of the joint tables."""
    marks, rows = config.text_marks, config.text_vocab_size
    lm_config = Qwen2Config(
        vocab_size=rows,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.query_groups,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rope_base)},
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=marks.end,
        pad_token_id=marks.pad,
    )
    weights = {
        "model.embed_tokens.weight": state[_WTE][:rows],
        "model.norm.weight": state["transformer.ln_f.weight"],
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = state[_HEAD][:rows]
    for index in range(config.n_layer):
        block = _block(f"transformer.h.{index}", config, state, qkv_bias=True)
        weights |= {f"model.layers.{index}.{_LM_NAMES[name]}": tensor for name, tensor in block.items()}
    # Copied: a slice of the file's table would keep the whole of it.
    weights = {name: tensor.to(dtype=dtype, copy=True) for name, tensor in weights.items()}
    loaded: Any = Qwen2ForCausalLM.from_pretrained(
        None, config=lm_config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    lm, info = loaded
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert isinstance(lm, PreTrainedModel)
    lm.train(False)
    return lm


_LM_NAMES: Final[Mapping[str, str]] = {
    "attention_norm.weight": "input_layernorm.weight",
    **{
        f"{own}.{kind}": f"self_attn.{theirs}.{kind}"
        for own, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for kind in ("weight", "bias")
    },
    "output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}
"""Names of a block's weights: ours in a TTS block, and those of the language model."""


def _block_shapes(prefix: str, config: LitConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one transformer block."""
    width, inside = config.n_embd, config.intermediate_size
    fused = width + 2 * config.query_groups * (width // config.n_head)
    shapes: dict[str, tuple[int, ...]] = {
        "norm_1.weight": (width,),
        "attn.attn.weight": (fused, width),
        "attn.proj.weight": (width, width),
        "norm_2.weight": (width,),
        "mlp.fc_1.weight": (inside, width),
        "mlp.fc_2.weight": (inside, width),
        "mlp.proj.weight": (width, inside),
    }
    if config.has_qkv_bias:
        shapes["attn.attn.bias"] = (fused,)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _block(
    prefix: str, config: LitConfig, state: Mapping[str, Tensor], *, qkv_bias: bool
) -> dict[str, Tensor]:
    """Weights of one transformer block by the names of our TTS blocks.

    Args:
        prefix: where the block stands in the checkpoint.
        config: its config.
        state: the checkpoint.
        qkv_bias: give biases, of zeros where the checkpoint has none.
    """
    weights = {
        "attention_norm.weight": state[f"{prefix}.norm_1.weight"],
        "output.weight": state[f"{prefix}.attn.proj.weight"],
        "mlp_norm.weight": state[f"{prefix}.norm_2.weight"],
        "gate.weight": state[f"{prefix}.mlp.fc_1.weight"],
        "up.weight": state[f"{prefix}.mlp.fc_2.weight"],
        "down.weight": state[f"{prefix}.mlp.proj.weight"],
    }
    fused = state[f"{prefix}.attn.attn.weight"]
    kinds = {"weight": fused}
    if qkv_bias:
        kinds["bias"] = state.get(f"{prefix}.attn.attn.bias", fused.new_zeros(fused.shape[0]))
    for kind, tensor in kinds.items():
        for name, part in zip(("query", "key", "value"), _unfused(tensor, config), strict=True):
            weights[f"{name}.{kind}"] = part
    return weights


def _unfused(fused: Tensor, config: LitConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a fused matrix or bias, which holds them group by group: q … q, k, v."""
    per_group = config.n_head // config.query_groups
    head_size = config.n_embd // config.n_head
    groups = fused.view(config.query_groups, per_group + 2, head_size, *fused.shape[1:])
    return groups[:, :per_group].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


def _settings(config: LitConfig) -> dict[str, Any]:
    """The original's ways, as settings of a talker."""
    settings: dict[str, Any] = {
        "fusion": "mean",
        "prompt_format": "mini_omni",
        "text_marks": asdict(config.text_marks),
        "encoder_padding": "mini_omni",
        "code_rule": "free",
        "audio_adapter": {"stack": 1, "hidden_width": config.intermediate_size},
    }
    if config.post_adapter:
        settings["tts"] = {
            "heads": config.n_head,
            "kv_heads": config.query_groups,
            "intermediate_width": config.intermediate_size,
            "rope_theta": config.rope_base,
            "norm_eps": config.norm_eps,
            "input": "before_norm",
            "qkv_bias": config.has_qkv_bias,
        }
    return settings


def _added(
    talker: OmniAdapter, config: LitConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[torch.nn.Module, dict[str, Tensor]]]:
    """Each grafted part with its weights."""
    model, text_rows = talker.model, config.text_vocab_size
    names = {"gate": "fc_1", "up": "fc_2", "down": "proj"}
    adapter = {f"{own}.weight": state[f"whisper_adapter.{lit}.weight"] for own, lit in names.items()}
    yield model.audio_adapter, adapter
    yield model.code_embedding, {"weight": state[_WTE][text_rows:]}
    if not config.post_adapter:
        yield model.code_heads, {"proj.weight": state[_HEAD][text_rows:]}
        return
    yield model.code_heads, {"proj.weight": state[f"{_POST}_audio_lm_head.weight"]}
    blocks = {"norm.weight": state[f"{_POST}_audio_ln.weight"]}
    for index in range(config.post_adapter_layers):
        block = _block(f"{_POST}.{index}", config, state, qkv_bias=config.has_qkv_bias)
        blocks |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
    yield model.tts_blocks, blocks


def _with_what_is_there(config: LitConfig, state: dict[str, Tensor], *, source: str) -> LitConfig:
    """The config as the weights bear it out; a tied head that was left out is put back."""
    if config.tie_word_embeddings and _HEAD not in state and _WTE in state:
        state[_HEAD] = state[_WTE]
    if config.post_adapter and not any(name.startswith(_POST) for name in state):
        # The published inference code switches post_adapter off, whatever the file says.
        logger.warning("%s has no post_adapter, although its config says so; imported without", source)
        return replace(config, post_adapter=False)
    return config


def _load_tokenizer(source: Source, config: LitConfig) -> Any:
    """The tokenizer beside the weights."""
    source.file("tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{source.name} has no tokenizer that transformers can load: {error}; it needs a tokenizer.json "
            "and a tokenizer_config.json that names its class"
        ) from error
    if len(tokenizer) > config.text_marks.end:
        raise CheckpointError(
            f"the tokenizer of {source.name} has {len(tokenizer)} ids, but by {CONFIG_FILE} the marks begin "
            f"at {config.text_marks.end}"
        )
    return tokenizer


def _encoder(source: Source, options: ImportOptions, config: LitConfig) -> AudioEncoder | str:
    """The audio encoder: the one asked for, the one beside the weights, or the published one by name."""
    if options.encoder is not None:
        return options.encoder
    path = source.path / ENCODER_FILE
    if not path.is_file():
        return DEFAULT_ENCODER
    encoder = AudioEncoder.from_pretrained(str(path))
    if encoder.width != config.whisper_adapter_dim:
        raise CheckpointError(
            f"{path} has frames of width {encoder.width}, but {CONFIG_FILE} says "
            f"whisper_adapter_dim: {config.whisper_adapter_dim}"
        )
    return encoder


def _check_codec(talker: OmniAdapter, config: LitConfig) -> None:
    """Refuse a codec or encoder whose sizes are not those that the checkpoint was trained with."""
    spec, vocabulary = talker.config.codec_spec, talker.config.vocabulary
    rows, size = config.cat_audio_vocab_size // config.audio_vocab_size, config.audio_vocab_size
    if (spec.num_codebooks, spec.codebook_size, vocabulary.size) != (rows, size - SPECIAL_IDS, size):
        raise CheckpointError(
            f"the checkpoint speaks {rows} code rows of {size - SPECIAL_IDS} codes, the codec has "
            f"{spec.num_codebooks} of {spec.codebook_size}; pass the codec that it was trained with"
        )
    if talker.config.encoder_width != config.whisper_adapter_dim:
        raise CheckpointError(
            f"the checkpoint hears frames of width {config.whisper_adapter_dim}, the encoder gives "
            f"{talker.config.encoder_width}; pass the encoder that it was trained with"
        )
