"""What the recipe tests train on: parts of a small talker in folders, and rows with speech and codes."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from examples.untrained_talker import Parts, make_parts
from omni_adapter import SnacCodec
from omni_adapter.audio.waveform import write_wav

PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How are you today?", "I am fine, thank you."),
    ("Tell me a story.", "Once there was a small boat."),
    ("about the sea", "Yes, of course."),
    ("the wind", "How are you?"),
    ("and the stars", "Tell me."),
    ("today", "The sea, the wind."),
    ("a small boat", "I am the wind."),
)


def write_parts(folder: Path, parts: Parts | None = None) -> dict[str, str]:
    """Save the parts of a talker; return the words of a command line that name them."""
    parts = parts or make_parts()
    parts.lm.save_pretrained(folder / "base")
    parts.tokenizer.save_pretrained(folder / "base")
    parts.whisper.save_pretrained(folder / "encoder")
    SnacCodec.from_model(parts.snac).save_pretrained(folder / "codec")
    return {name: str(folder / name) for name in ("base", "encoder", "codec")}


def write_rows(folder: Path, *, frames: int = 3, codebook_size: int = 64) -> Path:
    """Eight questions, each a tone of its own, and answers in text and in codes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (question, answer) in enumerate(PAIRS):
        seconds = np.arange(int(16_000 * 0.3)) / 16_000
        wave = 0.3 * np.sin(2 * math.pi * (200 + 150 * number) * seconds).astype(np.float32)
        write_wav(folder / f"{number}.wav", wave, sampling_rate=16_000)
        codes = torch.randint(codebook_size, (7, frames + number % 2), generator=generator)
        rows.append(
            {
                "id": f"row-{number}",
                "audio_in": f"{number}.wav",
                "text_in": question,
                "text_out": answer,
                "codes_out": codes.tolist(),
            }
        )
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_words(out: Path, *words: str) -> list[str]:
    """Words of a command line that make a run small."""
    return [
        f"out={out}", "precision=fp32", "threads=1", "data.batch_size=2", "data.workers=0", "data.window=8",
        "watch.trackers=[]", "watch.prompts=[]", "watch.log_every=1", "optim.num_steps=4",
        "optim.warmup_steps=0", "model.gradient_checkpointing=false", "optim.learning_rate=3e-3",
        "optim.accumulate=1", *words,
    ]  # fmt: skip
