"""Train the tiny talker's audio encoder: a small Whisper encoder that can write down its world's speech.

    python examples/tiny_talker/encoder.py --world build/tiny/world --out build/tiny/encoder

Rows of ``WORLD`` -> an encoder that ``AudioEncoder.from_pretrained(OUT)`` loads. Knows nothing of language
models or codecs. The same command goes on after a stop, from the state in ``OUT-training``.

It learns with the CTC loss (Graves et al. 2006), through the very classes that hear for a talker, so that
recordings are as long as they are here too: first letters, then whole words, so that an adapter finds
words in its last frames. Then it goes on with lists of words that mean nothing, and words alone: from
questions by themselves it learns which words follow which, and puts them where they are expected. The layers
that read letters and words are not kept. Speed, voice and channel are varied in the
features (SpecAugment, Park et al. 2019, and stretched axes).
"""

import copy
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.audio.features import LogMel
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.modules.audio_encoder import AudioEncoder

sys.path.insert(0, str(Path(__file__).resolve().parent))

from part_training import (
    PartTrainer,
    Schedule,
    mixed_precision,
    pick_device,
    step_generator,
    training_arguments,
    training_folder,
    training_parser,
)

SIZES = {
    "num_mel_bins": 80,
    "d_model": 192,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "max_source_positions": 1500,
}

SCHEDULE = Schedule(num_steps=6000, learning_rate=2e-3, warmup_steps=200, weight_decay=0.01, check_every=250)
LISTS_SCHEDULE = Schedule(
    num_steps=6000, learning_rate=1.2e-3, warmup_steps=100, weight_decay=0.01, check_every=250
)
"""How lists are learned, after the questions."""

LISTS_SHARES = {"questions": 0.45, "lists": 0.35, "alone": 0.2}
"""What is drawn then."""

HELD_OUT_LISTS = 50
"""One list of so many is kept back, to judge by."""

BATCH_SIZE = 32

LETTERS = " abcdefghijklmnopqrstuvwxyz"
"""What is written down; id 0 is CTC's blank, so the first letter has id 1."""

LETTER_STEPS = 1750
"""Steps in which the last frames learn letters; words follow."""

EARLY_WEIGHT = 0.3
"""How much the letters that are read from half-way up count in the loss, beside those of the last frames."""

FLAT_STEPS = 800
"""Steps in which letters are also expected where they would be if all took as long: CTC alone needs long to
find out that there is anything to be heard. The expectation fades away over these steps."""

RARITY_POWER = 0.7
"""Of a word that is said n times, n to minus this power is what it adds to the chance of its recordings."""

SPEEDS, VOICES = (0.87, 1.15), (0.88, 1.13)
"""How much faster is spoken, and how much higher formants lie, in what is learned from."""

CHANNEL = 0.12
"""How far each of the slow waves over the bins goes that stand for a microphone, in units of the features."""

MASKS = ((0, 12), (0, 12), (1, 14), (1, 14))
"""What is masked: the axis, 0 for bins and 1 for frames, and the most of it."""

_GROUP = 16  # batches that are drawn together and sorted by length
_CHECKED = 200  # recordings of each held-out set that are judged on the way


class Clip(NamedTuple):
    """A recording and what it says."""

    path: Path
    text: str


def make_encoder(*, seed: int = 0, **sizes: int) -> AudioEncoder:
    """An untrained encoder that can learn, the same one for the same seed."""
    config = WhisperConfig(
        **(SIZES | sizes),
        dropout=0.0,
        vocab_size=64,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=1,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = AudioEncoder(WhisperEncoder(config))
    encoder.encoder.set_attn_implementation("eager")  # the quickest for recordings as short as these
    encoder.encoder.requires_grad_(True)
    encoder.encoder.embed_positions.requires_grad_(False)
    return encoder


class Scores(NamedTuple):
    """What is read from frames, [B, A', letters or words + 1]; the blank comes first."""

    words: Tensor
    letters: Tensor
    early_letters: Tensor
    num_frames: Tensor  # int64 [B]


class Reader(nn.Module):
    """The encoder, and what reads letters from its frames half-way up, and letters and words at the end.

    Args:
        encoder: the encoder.
        words: every word that may be said.

    Attributes:
        reads_words: whether words are what it has learned last.
    """

    def __init__(self, encoder: AudioEncoder, words: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.word_list = tuple(words)
        self.reads_words = False
        self.early_norm = nn.LayerNorm(encoder.width)
        self.early_letters = nn.Linear(encoder.width, len(LETTERS) + 1)
        self.letters = nn.Linear(encoder.width, len(LETTERS) + 1)
        self.words = nn.Linear(encoder.width, len(words) + 1)
        layers = encoder.encoder.layers
        layers[(len(layers) - 1) // 2].register_forward_hook(self._keep)
        self._early: Tensor | None = None

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._early = output

    def forward(self, features: Tensor, lengths: Tensor) -> Scores:
        """Return the scores of features [B, M, F] with their lengths [B]."""
        frames, steps = self.encoder(features, lengths)
        assert self._early is not None
        early = self.early_letters(self.early_norm(self._early[:, : frames.shape[1]]))
        self._early = None
        return Scores(self.words(frames), self.letters(frames), early, steps)


def make_reader(clips: Sequence[Clip], *, seed: int = 0) -> Reader:
    """An untrained encoder with what reads the words of ``clips``, the same one for the same seed."""
    words = sorted({word for clip in clips for word in clip.text.split()})
    encoder = make_encoder(seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        return Reader(encoder, words)


@dataclass
class Clips:
    """Recordings with their features, each of which is computed when it is first asked for.

    Attributes:
        clips: the recordings.
        log_mel: makes the features.
    """

    clips: Sequence[Clip]
    log_mel: LogMel
    _features: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Clips"]) -> "Clips":
        """Return the recordings of several, one behind the other, with the features that are known."""
        together = cls([], parts[0].log_mel)
        for part in parts:
            start = len(together.clips)
            together._features |= {start + index: values for index, values in part._features.items()}
            together.clips = [*together.clips, *part.clips]
        return together

    def features(self, index: int) -> Tensor:
        """Return the features of a recording, [M, F] in half precision."""
        if index not in self._features:
            waveform = read_waveform(self.clips[index].path, sampling_rate=self.log_mel.sampling_rate)
            self._features[index] = self.log_mel.windows(waveform)[0].values.half()
        return self._features[index]


class Batch(NamedTuple):
    """Recordings side by side."""

    features: Tensor  # [B, M, F]
    lengths: Tensor  # int64 [B]
    letters: Tensor  # int64 [sum of num_letters]
    num_letters: Tensor  # int64 [B]
    texts: tuple[str, ...]


def make_batch(clips: Clips, indices: Sequence[int]) -> Batch:
    """Put recordings side by side, silence after the shorter ones."""
    features = [clips.features(index).float() for index in indices]
    letters = [letter_ids(clips.clips[index].text) for index in indices]
    lengths = torch.tensor([values.shape[1] for values in features])
    longest = int(lengths.max())
    padded = torch.stack([F.pad(values, (0, longest - values.shape[1])) for values in features])
    texts = tuple(clips.clips[index].text for index in indices)
    return Batch(padded, lengths, torch.cat(letters), torch.tensor([len(ids) for ids in letters]), texts)


def letter_ids(text: str) -> Tensor:
    """Write a text as ids of ``LETTERS``, counted from 1."""
    return torch.tensor([LETTERS.index(letter) + 1 for letter in text])


def _log_shares(scores: Tensor) -> Tensor:
    return scores.float().log_softmax(-1).cpu()


def spread_letters(batch: Batch, steps: Tensor, *, size: int) -> Tensor:
    """Spread each recording's letters evenly over its frames: ids [B, size], 0 after the end."""
    frames = torch.arange(size)
    places = frames * batch.num_letters[:, None] // steps[:, None]  # [B, size], of a recording's letters
    starts = batch.num_letters.cumsum(0) - batch.num_letters
    is_heard = frames < steps[:, None]
    return batch.letters[(starts[:, None] + places) * is_heard] * is_heard


def vary(batch: Batch, chance: torch.Generator) -> Batch:
    """Change speed, voice and channel of a batch's features, and mask some of them."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(batch.lengths), *shape, generator=chance) * (high - low) + low

    size, num_bins, num_frames = batch.features.shape
    speed, voice = draw(*SPEEDS), draw(*VOICES)
    lengths = (batch.lengths / speed).long().clamp(min=1)
    longest = int(lengths.max())
    # Where each new value is read from, in the units of grid_sample: -1 and 1 are the borders.
    x = (torch.arange(longest) + 0.5) * speed[:, None] * 2 / num_frames - 1
    y = ((torch.arange(num_bins) + 0.5) * voice[:, None] * 2 / num_bins - 1).clamp(max=1)
    grid = torch.stack(
        (x[:, None].expand(size, num_bins, longest), y[..., None].expand(size, num_bins, longest)), dim=-1
    )
    features = F.grid_sample(batch.features[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    waves = torch.cos(torch.arange(3)[:, None] * torch.arange(num_bins) / num_bins * torch.pi)  # [3, M]
    features = features + (draw(-CHANNEL, CHANNEL, 3) @ waves)[..., None]
    for axis, most in MASKS:
        positions = torch.arange(features.shape[1 + axis])
        limit = lengths if axis else torch.full((size,), num_bins)
        width = draw(0, most)
        start = draw(0, 1) * (limit - width).clamp(min=0)
        masked = (positions >= start[:, None]) & (positions < (start + width)[:, None])
        features = features.masked_fill(masked[:, None] if axis else masked[..., None], 0.0)
    return batch._replace(features=features, lengths=lengths)


@dataclass
class EncoderTraining:
    """What one step of training needs.

    Attributes:
        reader: what learns.
        clips: what it hears.
        sources: how many of them belong together, in their order, and how large the share is that they have.
        batch_size: recordings a step.
        seed: decides which recordings a step takes and how they are varied.
        letter_steps: steps in which the last frames learn letters.
        flat_steps: steps in which letters are expected evenly spread as well.
    """

    reader: Reader
    clips: Clips
    sources: Sequence[tuple[int, float]] = ()
    batch_size: int = BATCH_SIZE
    seed: int = 0
    letter_steps: int = field(default_factory=lambda: LETTER_STEPS)
    flat_steps: int = field(default_factory=lambda: FLAT_STEPS)

    def __post_init__(self) -> None:
        texts = [clip.text.split() for clip in self.clips.clips]
        chances = []
        for size, share in self.sources or ((len(texts), 1.0),):
            own, texts = texts[:size], texts[size:]
            counts = Counter(word for words in own for word in words)
            rarities = torch.tensor(
                [sum(counts[word] ** -RARITY_POWER for word in words) / len(words) for words in own]
            )
            chances.append(share * rarities / rarities.sum())
        self.chances = torch.cat(chances)

    def batch(self, step: int) -> Batch:
        """Return the recordings of a step: of a group that is drawn at once, those of about one length."""
        chance = step_generator(self.seed, step // _GROUP)
        drawn = torch.multinomial(
            self.chances, _GROUP * self.batch_size, replacement=True, generator=chance
        ).tolist()
        drawn.sort(key=lambda index: len(self.clips.clips[index].text))
        part = int(torch.randperm(_GROUP, generator=chance)[step % _GROUP]) * self.batch_size
        batch = make_batch(self.clips, drawn[part : part + self.batch_size])
        return vary(batch, step_generator(self.seed + 1, step))

    def loss(self, step: int) -> Tensor:
        """Return the CTC loss of a step."""
        batch = self.batch(step)
        device = next(self.reader.parameters()).device
        with mixed_precision(device):
            scores = self.reader(batch.features.to(device), batch.lengths.to(device))
        steps = scores.num_frames.cpu()
        flat = 1 - step / self.flat_steps if self.flat_steps else 0.0
        early_loss = self._letter_loss(_log_shares(scores.early_letters), steps, batch, flat=flat)
        if step < self.letter_steps:
            loss = self._letter_loss(_log_shares(scores.letters), steps, batch, flat=flat)
        else:
            self.reader.reads_words = True
            loss = self._word_loss(_log_shares(scores.words), steps, batch)
        return (loss + EARLY_WEIGHT * early_loss) / (1 + EARLY_WEIGHT)

    def _word_loss(self, scores: Tensor, steps: Tensor, batch: Batch) -> Tensor:
        """CTC loss of log-probabilities [B, A', W]."""
        known = self.reader.word_list
        words = [torch.tensor([known.index(word) + 1 for word in text.split()]) for text in batch.texts]
        num_words = torch.tensor([len(ids) for ids in words])
        return F.ctc_loss(scores.transpose(0, 1), torch.cat(words), steps, num_words, zero_infinity=True)

    def _letter_loss(self, scores: Tensor, steps: Tensor, batch: Batch, *, flat: float) -> Tensor:
        """CTC loss of log-probabilities [B, A', L], and ``flat`` times that of evenly spread letters."""
        loss = F.ctc_loss(scores.transpose(0, 1), batch.letters, steps, batch.num_letters, zero_infinity=True)
        if flat <= 0:
            return loss
        return loss + flat * F.nll_loss(
            scores.transpose(1, 2), spread_letters(batch, steps, size=scores.shape[1]), ignore_index=0
        )


@torch.no_grad()
def transcribe(reader: Reader, clips: Clips, *, batch_size: int = 64) -> list[str]:
    """Write down recordings: the likeliest letter or word of every frame, repetitions and blanks left out."""
    order = sorted(range(len(clips.clips)), key=lambda index: len(clips.clips[index].text))
    texts = [""] * len(order)
    device = next(reader.parameters()).device
    signs, gap = (reader.word_list, " ") if reader.reads_words else (LETTERS, "")
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = make_batch(clips, part)
        scores = reader(batch.features.to(device), batch.lengths.to(device))
        best = (scores.words if reader.reads_words else scores.letters).argmax(-1)
        for index, ids, length in zip(part, best, scores.num_frames.tolist(), strict=True):
            kept = torch.unique_consecutive(ids[:length]).tolist()
            texts[index] = gap.join(signs[sign - 1] for sign in kept if sign)
    return texts


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Return the words that were inserted, left out or replaced, for each word that was said."""
    pairs = [(a.split(), b.split()) for a, b in zip(said, heard, strict=True)]
    return sum(_distance(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def _distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two lists of words."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def judge(reader: Reader, sets: Mapping[str, Clips]) -> dict[str, float]:
    """Return the word error rate of each set."""
    return {
        name: word_error_rate([clip.text for clip in clips.clips], transcribe(reader, clips))
        for name, clips in sets.items()
    }


def read_clips(rows: Path) -> list[Clip]:
    """Read which recordings a file of rows names, and what they say."""
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [Clip(rows.parent / row["audio_in"], row["text_in"]) for row in found]


def save_encoder(reader: Reader, folder: Path) -> Reader:
    """Write the encoder; return a copy that hears as what was written does.

    Weights are rounded to half precision, so that it makes no difference whether they are shipped like that.
    """
    rounded = copy.deepcopy(reader)
    with torch.no_grad():
        for parameter in rounded.encoder.parameters():
            parameter.copy_(parameter.half().to(parameter.dtype))
    rounded.encoder.save_pretrained(folder)
    return rounded


class Recordings(NamedTuple):
    """What there is to be heard, by set."""

    train: Mapping[str, Clips]  # questions, lists, alone
    heldout: Mapping[str, Clips]  # seen and unseen, questions in such voices; lists

    def some(self) -> dict[str, Clips]:
        """Return a part of the held-out sets, to judge by on the way."""
        return {name: Clips(clips.clips[:_CHECKED], clips.log_mel) for name, clips in self.heldout.items()}


def read_recordings(world: Path, log_mel: LogMel) -> Recordings:
    """Read which recordings the folder of a world has."""
    dictated = read_clips(world / "rows_dictation.jsonl")
    lists = [clip for clip in dictated if " " in clip.text]
    train = {
        "questions": read_clips(world / "rows_train.jsonl"),
        "lists": [clip for number, clip in enumerate(lists) if number % HELD_OUT_LISTS],
        "alone": [clip for clip in dictated if " " not in clip.text],
    }
    heldout = {name: read_clips(world / f"rows_heldout_{name}.jsonl") for name in ("seen", "unseen")}
    heldout["lists"] = lists[::HELD_OUT_LISTS]
    return Recordings(*({name: Clips(c, log_mel) for name, c in sets.items()} for sets in (train, heldout)))


def train_encoder(
    world: Path,
    out: Path,
    *,
    schedule: Schedule = SCHEDULE,
    lists_schedule: Schedule = LISTS_SCHEDULE,
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    until: int | None = None,
) -> dict[str, float]:
    """Train, or go on with training, and write the encoder.

    Args:
        world: folder with ``rows_train.jsonl``, ``rows_dictation.jsonl`` and, of seen and unseen voices,
            ``rows_heldout_*.jsonl``.
        out: folder to write to once training is over. What is needed to go on is in ``OUT-training``.
        schedule: how long and how fast, with questions alone.
        lists_schedule: the same, with lists and single words as well.
        device: where to train.
        batch_size: recordings a step.
        seed: of weights, batches and variations.
        until: stop before this step, for the next run to go on; steps with lists count on.

    Returns:
        Word error rate on held-out questions in seen and in unseen voices and on held-out lists, greedy CTC.
    """
    log_mel = make_encoder(seed=seed).log_mel()
    recordings = read_recordings(world, log_mel)
    some = recordings.some()
    questions = recordings.train["questions"]
    reader = make_reader(questions.clips, seed=seed).to(pick_device(device))
    size = sum(parameter.numel() for parameter in reader.encoder.parameters())
    print(f"{size:,} parameters, {len(questions.clips)} recordings", flush=True)
    folder = training_folder(out)
    trainer = PartTrainer(reader, schedule=schedule, folder=folder)
    reader.reads_words = trainer.step > LETTER_STEPS
    training = EncoderTraining(reader, questions, batch_size=batch_size, seed=seed)

    def check() -> str:
        return describe(judge(save_encoder(reader, folder / "so-far"), some))

    trainer.run(training.loss, check, until=until)
    if trainer.step < schedule.num_steps:
        return judge(save_encoder(reader, folder / "so-far"), recordings.heldout)
    together = Clips.joined(list(recordings.train.values()))
    print(f"{len(together.clips)} recordings with lists and words alone", flush=True)
    reader = with_words_of(reader, together.clips, seed=seed)
    trainer = PartTrainer(reader, schedule=lists_schedule, folder=folder / "lists")
    sources = [(len(clips.clips), LISTS_SHARES[name]) for name, clips in recordings.train.items()]
    training = EncoderTraining(
        reader, together, sources, batch_size=batch_size, seed=seed + 2, letter_steps=0, flat_steps=0
    )
    trainer.run(training.loss, check, until=None if until is None else until - schedule.num_steps)
    rounded = save_encoder(reader, out if trainer.step >= lists_schedule.num_steps else folder / "so-far")
    rates = judge(rounded, recordings.heldout)
    print(f"after {schedule.num_steps + trainer.step} steps: {describe(rates)} (all held out)", flush=True)
    return rates


@torch.no_grad()
def with_words_of(reader: Reader, clips: Sequence[Clip], *, seed: int = 0) -> Reader:
    """Return a reader that reads the words of ``clips``, with all that another one has learned."""
    wider = make_reader(clips, seed=seed).to(next(reader.parameters()).device)
    learned = reader.state_dict()
    rows = [0, *(1 + reader.word_list.index(word) for word in wider.word_list if word in reader.word_list)]
    places = [0, *(1 + place for place, word in enumerate(wider.word_list) if word in reader.word_list)]
    for name in ("words.weight", "words.bias"):
        values = wider.state_dict()[name].clone()
        values[places] = learned[name][rows]
        learned[name] = values
    wider.load_state_dict(learned)
    wider.reads_words = True
    return wider


def describe(rates: Mapping[str, float]) -> str:
    """Write word error rates."""
    names = {"seen": "seen voices", "unseen": "unseen voices", "lists": "lists"}
    return "held-out WER " + ", ".join(f"{rate:.1%} {names[name]}" for name, rate in rates.items())


def main() -> None:
    parser = training_parser("Train the tiny talker's audio encoder.", steps=SCHEDULE.num_steps)
    parser.add_argument("--out", type=Path, default=Path("build/tiny/encoder"), help="folder to write")
    arguments = parser.parse_args()
    train_encoder(
        arguments.world,
        arguments.out,
        **training_arguments(arguments, SCHEDULE),
    )


if __name__ == "__main__":
    main()
