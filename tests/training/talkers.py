"""Talkers of width 32 with three code rows, and batches for them."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.audio.features import Features
from omni_adapter.backbone import Backbone
from omni_adapter.config import AudioAdapterConfig, CodecSpec, OmniConfig, PartRef, TtsConfig
from omni_adapter.data.collator import Batch, Sample, collate
from omni_adapter.data.layout import TASKS, Answer, AudioSegment, GridRules, TextSegment, lay_out
from omni_adapter.model import OmniModel
from omni_adapter.modules.audio_encoder import AudioEncoder
from tests.families import VOCAB_SIZE, build_fresh

CODEC = CodecSpec(sampling_rate=800, hop_length=4, level_strides=(2, 1), codebook_size=16)
ROWS = CODEC.num_codebooks
MEL_BINS = 8
TEXT_END = 2
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {},
    "gemma2": {"final_logit_softcapping": 2.0},  # capped, and far from linear
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
}


def build_model(family: str | PreTrainedModel = "llama", *, seed: int = 0, **settings) -> OmniModel:
    """A talker around a fresh LM of a family, every weight random."""
    lm = build_fresh(family, **FAMILIES.get(family, {})) if isinstance(family, str) else family
    backbone = Backbone(lm)
    torch.manual_seed(seed)
    whisper = WhisperConfig(
        num_mel_bins=MEL_BINS,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=32,
    )
    part = PartRef("nowhere")
    config = OmniConfig(
        base=part,
        encoder=part,
        codec=part,
        codec_spec=CODEC,
        width=backbone.width,
        hidden_width=backbone.hidden_width,
        encoder_width=16,
        encoder_stride=2,
        text_end_ids=(TEXT_END,),
        audio_adapter=AudioAdapterConfig(hidden_width=24),
        tts=TtsConfig(layers=1, heads=2, intermediate_width=24, init="scaled"),
        **settings,
    )
    return OmniModel(backbone, AudioEncoder(WhisperEncoder(whisper).eval()), config=config)


def make_sample(
    task: str, rules: GridRules, *, text: Sequence[int] = (7, 8, 9), frames: int = 2, seed: int = 0
) -> Sample:
    """A sample of a task; hearing ones hear six frames of noise, which take three steps."""
    noise = torch.Generator().manual_seed(seed)
    spec = TASKS[task]
    prompt = [TextSegment((5, 6))]
    recordings = ()
    if spec.hears:
        prompt.append(AudioSegment(3))
        recordings = ([Features(torch.randn(MEL_BINS, 6, generator=noise), 6)],)
    prompt.append(TextSegment((4,)))
    codes = torch.randint(0, CODEC.codebook_size, (ROWS, frames), generator=noise) if spec.speaks else None
    return Sample(lay_out(prompt, task=task, rules=rules, answer=Answer(tuple(text), codes)), recordings)


def make_samples(rules: GridRules, tasks: Sequence[str] = tuple(TASKS), *, seed: int = 0) -> list[Sample]:
    """Samples of all tasks, of different lengths."""
    noise = torch.Generator().manual_seed(seed)
    return [
        make_sample(
            task,
            rules,
            text=torch.randint(3, VOCAB_SIZE - 8, (2 + index % 3,), generator=noise).tolist(),
            frames=1 + index % 4,
            seed=seed + index,
        )
        for index, task in enumerate(tasks)
    ]


def make_batch(rules: GridRules, tasks: Sequence[str] = tuple(TASKS), *, seed: int = 0) -> Batch:
    """A batch of all tasks, padded on the right."""
    return collate(make_samples(rules, tasks, seed=seed), rules=rules, side="right")
