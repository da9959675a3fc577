"""Published data sets in miniature: the files, cards, columns and types of each, with a few rows of tones.

``PUBLISHED`` names the id on the Hub of each, and how its copy is made.
"""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml
from datasets import Audio, Features, List, Value

TEXT = Value("string")
NUMBER = Value("int64")
SENTENCES = ("How are you today?", "Tell me a story.", "What is the capital of France?", "Yes, of course.")
ANSWERS = ("I am fine, thank you.", "Once there was a small boat.", "Paris.", "The sea and the wind.")
COLLECTIONS = (
    "alpaca_gpt4", "identity", "qa_assistant_v1_7k", "rlhf", "trivia_single_choice", "trivia_multi_choice",
    "openassistant",
)  # fmt: skip
FRAMES = (3, 4)  # of spoken answers, in turn
CODEBOOK_SIZE = 64  # of the small codec
K = 7


def tone(number: int, *, rate: int, format: str = "FLAC", seconds: float = 0.25) -> bytes:
    """A recording, one pitch for each number."""
    time = np.arange(int(rate * seconds)) / rate
    wave = 0.3 * np.sin(2 * math.pi * (180 + 70 * number) * time)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def codes_of(number: int) -> list[list[int]]:
    """Codes [K, T] of an answer."""
    count = FRAMES[number % 2]
    return [[(number * 5 + row * 11 + frame) % CODEBOOK_SIZE for frame in range(count)] for row in range(K)]


def write_frames(codes: Sequence[Sequence[int]]) -> str:
    """Codes as VoiceAssistant-400K has them."""
    return " ".join("# " + " ".join(str(code) for code in frame) for frame in zip(*codes, strict=True))


def _card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """The card of a data set: which files belong to which configuration and split."""
    entries = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": path} for split, path in splits.items()],
            **({"default": True} if config != "default" and len(configs) == 1 else {}),
        }
        for config, splits in configs.items()
    ]
    text = yaml.safe_dump({"configs": entries}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{text}---\n", encoding="utf-8")


def _write(path: Path, rows: Sequence[Mapping[str, Any]], features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=features.arrow_schema), path)


def voiceassistant(folder: Path) -> Features:
    features = Features(
        {
            "split_name": TEXT, "index": TEXT, "round": TEXT, "question": TEXT, "question_audio": Audio(),
            "answer": TEXT, "answer_snac": TEXT,
        }
    )  # fmt: skip
    rows = []
    for number, collection in enumerate(COLLECTIONS):
        # The second collection has a conversation of two rounds.
        for turn in range(1, 3 if collection == "rlhf" else 2):
            which = (number + turn) % 4
            rows.append(
                {
                    "split_name": collection, "index": f"{number:06d}", "round": str(turn),
                    "question": SENTENCES[which], "answer": ANSWERS[which],
                    "question_audio": {"bytes": tone(number, rate=22_050, format="WAV"), "path": None},
                    "answer_snac": write_frames(codes_of(number)),
                }
            )  # fmt: skip
    _write(folder / "data" / "train-00000-of-00001.parquet", rows, features)
    _card(folder, {"default": {"train": "data/train-*"}})
    return features


def _slam_omni(folder: Path, *, rounds: bool, codes: bool) -> Features:
    features = Features(
        {
            "split_name": TEXT, "index": NUMBER, "round": NUMBER, "question": TEXT,
            "question_audio": {
                "array": List(Value("float32")), "path": TEXT, "sampling_rate": NUMBER,
            },
            "answer": TEXT, "answer_cosyvoice_speech_token": List(NUMBER), "answer_snac": TEXT,
        }
    )  # fmt: skip
    rows = []
    for number in range(3):
        question = SENTENCES[number]
        if rounds:
            question = f"<USER>: {SENTENCES[3]} <ASSISTANT>: {ANSWERS[3]} <USER>: {question}"
        wave, rate = soundfile.read(io.BytesIO(tone(number, rate=22_050)), dtype="float32")
        rows.append(
            {
                "split_name": "collection", "index": number, "round": 1 + rounds, "question": question,
                "question_audio": {"array": wave.tolist(), "path": f"{number}.wav", "sampling_rate": rate},
                "answer": ANSWERS[number], "answer_cosyvoice_speech_token": [3000 + number, 12, 4011],
                "answer_snac": write_frames(codes_of(number)) if codes else "",
            }
        )  # fmt: skip
    _write(folder / "data" / "train-00000-of-00001.parquet", rows, features)
    _card(folder, {"default": {"train": "data/train-*"}})
    return features


def voiceassistant_slam_omni(folder: Path) -> Features:
    return _slam_omni(folder, rounds=False, codes=True)


def ultrachat(folder: Path) -> Features:
    return _slam_omni(folder, rounds=True, codes=False)


belle = ultrachat


def _read_speech(
    folder: Path,
    features: Features,
    *,
    splits: Sequence[str],
    config: str,
    path: str,
    row: Callable[..., Any],
) -> Features:
    """Recordings with what is read in them, three a split."""
    for place, split in enumerate(splits):
        rows = [row(split, 3 * place + number) for number in range(3)]
        _write(folder / path.format(split=split) / f"{split}-00000-of-00001.parquet", rows, features)
    _card(folder, {config: {split: f"{path.format(split=split)}/{split}-*" for split in splits}})
    return features


LIBRI_SPLITS = ("train.clean.100", "train.clean.360", "train.other.500")


def libritts(folder: Path) -> Features:
    features = Features(
        {
            "audio": Audio(sampling_rate=24_000), "text_normalized": TEXT, "text_original": TEXT,
            "speaker_id": TEXT, "path": TEXT, "chapter_id": TEXT, "id": TEXT,
        }
    )  # fmt: skip

    def row(split: str, number: int) -> dict[str, Any]:
        name = f"84_121123_{number:06d}_000000"
        return {
            "audio": {"bytes": tone(number, rate=24_000, format="WAV"), "path": f"{name}.wav"},
            "text_normalized": ANSWERS[number % 4], "text_original": ANSWERS[number % 4].upper(),
            "speaker_id": "84", "path": f"LibriTTS/{split}/84/121123/{name}.wav", "chapter_id": "121123",
            "id": name,
        }  # fmt: skip

    splits = (*LIBRI_SPLITS, "dev.clean", "dev.other", "test.clean", "test.other")
    return _read_speech(folder, features, splits=splits, config="all", path="data/{split}", row=row)


def librispeech(folder: Path) -> Features:
    features = Features(
        {
            "file": TEXT, "audio": Audio(sampling_rate=16_000), "text": TEXT, "speaker_id": NUMBER,
            "chapter_id": NUMBER, "id": TEXT,
        }
    )  # fmt: skip

    def row(split: str, number: int) -> dict[str, Any]:
        name = f"84-121123-{number:04d}"
        return {
            "file": f"{name}.flac", "audio": {"bytes": tone(number, rate=16_000), "path": f"{name}.flac"},
            "text": ANSWERS[number % 4].upper().strip(".,"), "speaker_id": 84, "chapter_id": 121123,
            "id": name,
        }  # fmt: skip

    splits = (*LIBRI_SPLITS, "validation.clean", "validation.other", "test.clean", "test.other")
    return _read_speech(folder, features, splits=splits, config="all", path="all/{split}", row=row)


def vctk(folder: Path) -> Features:
    names = ("age", "gender", "accent", "region", "comment")
    features = Features(
        {
            "speaker_id": TEXT, "audio": Audio(sampling_rate=48_000), "file": TEXT, "text": TEXT,
            "text_id": TEXT, **dict.fromkeys(names, TEXT),
        }
    )  # fmt: skip
    rows = []
    for number in range(4):
        name = f"p225_{number // 2:03d}_mic{1 + number % 2}.flac"
        rows.append(
            {
                "speaker_id": "p225", "audio": {"bytes": tone(number, rate=48_000), "path": name},
                "file": f"VCTK-Corpus-0.92/wav48_silence_trimmed/p225/{name}", "text": ANSWERS[number // 2],
                "text_id": f"{number // 2:03d}", **dict.fromkeys(names, ""),
            }
        )  # fmt: skip
    _write(folder / "data" / "train-00000-of-00001.parquet", rows, features)
    _card(folder, {"default": {"train": "data/train-*"}})
    return features


def mls_english(folder: Path) -> Features:
    features = Features(
        {
            "audio": Audio(), "original_path": TEXT, "begin_time": Value("float64"),
            "end_time": Value("float64"), "transcript": TEXT, "audio_duration": Value("float64"),
            "speaker_id": TEXT, "book_id": TEXT,
        }
    )  # fmt: skip
    splits = ("dev", "test", "train")
    return _read_speech(
        folder, features, splits=splits, config="default", path="data", row=_mls_row("book_id")
    )


def mls(folder: Path) -> Features:
    features = Features(
        {
            "audio": Audio(), "original_path": TEXT, "begin_time": Value("float64"),
            "end_time": Value("float64"), "transcript": TEXT, "audio_duration": Value("float64"),
            "speaker_id": TEXT, "chapter_id": TEXT, "file": TEXT, "id": TEXT,
        }
    )  # fmt: skip
    make, configs = _mls_row("chapter_id"), ("german", "polish")
    for place, config in enumerate(configs):
        rows = []
        for number in range(3):
            name = f"4800_10003_{3 * place + number:06d}"
            rows.append({**make("train", number), "file": f"{name}.opus", "id": name})
        _write(folder / config / "train-00000-of-00001.parquet", rows, features)
    _card(folder, {config: {"train": f"{config}/train-*"} for config in configs})
    return features


def _mls_row(book: str) -> Callable[[str, int], dict[str, Any]]:
    def row(split: str, number: int) -> dict[str, Any]:
        return {
            "audio": {"bytes": tone(number, rate=16_000), "path": f"{number}.flac"},
            "original_path": "http://www.archive.org/download/book.mp3", "begin_time": 1.0, "end_time": 1.25,
            "transcript": ANSWERS[number % 4].lower().strip(".,"), "audio_duration": 0.25,
            "speaker_id": "4800", book: "10003",
        }  # fmt: skip

    return row


def ljspeech(folder: Path) -> Features:
    features = Features(
        {
            "id": TEXT, "audio": Audio(sampling_rate=22_050), "file": TEXT, "text": TEXT,
            "normalized_text": TEXT,
        }
    )  # fmt: skip
    rows = []
    for number in range(3):
        name = f"LJ001-{number:04d}"
        rows.append(
            {
                "id": name, "file": f"LJSpeech-1.1/wavs/{name}.wav", "text": f"{number} {ANSWERS[number]}",
                "audio": {"bytes": tone(number, rate=22_050, format="WAV"), "path": f"{name}.wav"},
                "normalized_text": f"number {ANSWERS[number]}",
            }
        )  # fmt: skip
    _write(folder / "main" / "train-00000-of-00001.parquet", rows, features)
    _card(folder, {"main": {"train": "main/train-*"}})
    return features


def open_orca(folder: Path) -> Features:
    features = Features({"id": TEXT, "system_prompt": TEXT, "question": TEXT, "response": TEXT})
    for place, name in enumerate(("1M-GPT4-Augmented", "3_5M-GPT3_5-Augmented")):
        rows = [
            {
                "id": f"niv.{2 * place + number}", "system_prompt": ("", "Be kind.")[number],
                "question": SENTENCES[number + 2 * place], "response": ANSWERS[number + 2 * place],
            }
            for number in range(2)
        ]  # fmt: skip
        _write(folder / f"{name}.parquet", rows, features)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return features


def moss(folder: Path) -> Features:
    for language in ("en", "zh"):
        rows = []
        for number in range(3):
            # Real conversations have several rounds.
            rounds = [
                f"[Human]: {SENTENCES[(number + turn) % 4]}<eoh> [MOSS]: {ANSWERS[(number + turn) % 4]}<eoa>"
                for turn in range(1 + number)
            ]
            prefix = "MOSS is an AI assistant developed by the FudanNLP Lab and Shanghai AI Lab."
            rows.append({"plain_text": " ".join(rounds), "prefix": prefix, "num_turns": str(1 + number)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{language}_helpfulness.json").write_text(json.dumps(rows, ensure_ascii=False))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return Features({"plain_text": TEXT, "prefix": TEXT, "num_turns": TEXT})


def alpaca(folder: Path) -> Features:
    features = Features({"instruction": TEXT, "input": TEXT, "output": TEXT, "text": TEXT})
    rows = [
        {
            "instruction": SENTENCES[number],
            "input": ("", "the sea")[number],
            "output": ANSWERS[number],
            "text": "",
        }
        for number in range(2)
    ]
    _write(folder / "data" / "train-00000-of-00001-6ef3991c06080e14.parquet", rows, features)
    _card(folder, {"default": {"train": "data/train-*"}})
    return features


class Published(NamedTuple):
    """A data set of the Hub: its name here, what makes a copy of it, and the rows of its usual part."""

    source: str
    make: Callable[[Path], Features]
    rows: int


PUBLISHED: Mapping[str, Published] = {
    "gpt-omni/VoiceAssistant-400K": Published("voiceassistant-400k", voiceassistant, 8),
    "worstchan/VoiceAssistant-400K-SLAM-Omni": Published(
        "voiceassistant-400k-slam-omni", voiceassistant_slam_omni, 3
    ),
    "worstchan/UltraChat-300K-SLAM-Omni": Published("ultrachat-300k-slam-omni", ultrachat, 3),
    "worstchan/Belle_1.4M-SLAM-Omni": Published("belle-1.4m-slam-omni", belle, 3),
    "mythicinfinity/libritts": Published("libritts", libritts, 9),
    "sanchit-gandhi/vctk": Published("vctk", vctk, 2),
    "openslr/librispeech_asr": Published("librispeech", librispeech, 9),
    "parler-tts/mls_eng": Published("multilingual-librispeech", mls_english, 3),
    "facebook/multilingual_librispeech": Published("multilingual-librispeech:german", mls, 3),
    "keithito/lj_speech": Published("ljspeech", ljspeech, 3),
    "Open-Orca/OpenOrca": Published("open-orca", open_orca, 4),
    "fnlp/moss-002-sft-data": Published("moss-002-sft", moss, 3),
    "vicgalle/alpaca-gpt4": Published("alpaca-gpt4", alpaca, 2),
}
