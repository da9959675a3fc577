"""Train the tiny talker's language model on the texts of its world, and make its tokenizer.

    python examples/tiny_talker/lm.py --kind llama --world build/tiny/world --out build/tiny/lm-llama

Records of ``WORLD`` -> a causal LM of transformers with tokenizer and chat template, as ``from_pretrained``
takes them; it answers questions that training held out. Knows nothing of speech. The same command goes on
after a stop, from the state in ``OUT-training``.

Besides the records, the LM reads the wordings of training pairs that the world leaves unspoken, counts
further, and puts numbers, days and months in order. A held-out pair is asked for in none of them. Like LMs
that have read a lot, it can do two things that hearing builds on (paper, section 3.3, whose base LM brings
them along): it answers questions whose words come drawn out, with pauses between them, and it repeats any
words after ``<|repeat|>`` instead of answering. What comes out is the average of the weights over some
hundred steps, which knows sums and orders better than those of any one step.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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
from world import DAYS, MONTHS, NUMBERS, ORDER_KINDS, chances
from world import lessons as written_lessons

KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 64},
}
"""Architectures, by their ``model_type`` in transformers, with what they need besides ``SIZES``."""

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}

SCHEDULE = Schedule(
    num_steps=4500, learning_rate=2e-3, warmup_steps=100, weight_decay=0.3, check_every=250, average=0.998
)
BATCH_SIZE = 96
QUESTION_WEIGHT = 0.1
"""How much the words of a prompt count in the loss, beside 1 for those of an answer."""

CARD = (
    "---\nlicense: apache-2.0\n---\n\nA tiny language model, made by examples/tiny_talker of omni-adapter.\n"
)
"""What lies beside the weights: wrapping takes the licence from there."""

ORDER_STEPS = 800
"""Steps that take numbers and orders alone: at first, since among others they are learned by heart."""

DRAWN_OUT_SHARE, REPEATED_SHARE, LISTED_SHARE = 0.35, 0.25, 0.5
"""How many lessons have a drawn-out question, how many ask to repeat one, and how many of these list words
at random instead."""

MOST_LISTED = 9
"""Words in such a list."""

LASTING, PAUSES = (1, 1, 1, 2, 2, 3), (0, 0, 1, 1, 2, 3, 4, 5, 6, 8)
"""How many steps a drawn-out word may take, and a pause after it."""

BLUR = 0.4
"""Noise on drawn-out words, in units of the size of their embeddings: what is heard is never quite a word."""

ORDERED = (NUMBERS, DAYS, MONTHS)
"""Words whose embeddings start in order."""

PERIODS = (2.0, 4.0, 6.0, 10.0, 16.0, 25.0, 42.0, 84.0)
"""Lengths of the waves that mark places, in places."""

OWN_SHARE = 0.3
"""How much of its own each ordered word has beside its place."""

PAD, END, PAUSE, REPEAT = "<|pad|>", "<|end|>", "<|pause|>", "<|repeat|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, got ' ~ message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPOKEN_FORMS = (
    (r"['’]s\b", " is"), (r"['’]m\b", " am"), (r"['’]re\b", " are"), (r"['’]", ""), (r" [-−] ", " minus "),
    (r"\+", " plus "), *((rf"\b{number}\b", word) for number, word in enumerate(NUMBERS)),
    (r"\p{P}+", " "), (r"\s+", " "),
)  # fmt: skip
"""How writing becomes words as the world has them: short forms, signs, digits, then no punctuation."""

_GROUP = 16  # batches that are drawn together and sorted by length
_MULTIPLE = 4  # lengths of batches are rounded up to it


def make_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer in which each of ``words`` is one token; all else is written byte by byte.

    Text is put into the form of the world first: lower case, no punctuation. Single spaces part words, and
    decoding gives plain words again.
    """
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES), PAUSE, REPEAT]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    pieces = [piece for word in sorted(set(words)) for piece, _ in byte_level.pre_tokenize_str(word)]
    tokens = dict.fromkeys((*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces))
    bpe = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    )
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            *(normalizers.Replace(Regex(written), spoken) for written, spoken in SPOKEN_FORMS),
            normalizers.Strip(),
        ]
    )
    bpe.pre_tokenizer = byte_level
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=SIZES["max_position_embeddings"],
    )


def make_lm(kind: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """An untrained causal LM, the same one for the same seed."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **(SIZES | sizes),
        **KINDS[kind],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for words in ORDERED:
            _set_in_order(lm.get_input_embeddings().weight, tokenizer, words)
    return lm


@torch.no_grad()
def _set_in_order(embeddings: Tensor, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> None:
    """Give the embeddings of ordered words a part that follows their places, as waves of several lengths.

    LMs that have read a lot have such embeddings of numbers; without them, sums are learned by heart.
    """
    places = torch.arange(len(words), dtype=torch.float32)[:, None] * 2 * torch.pi / torch.tensor(PERIODS)
    waves = torch.cat((places.sin(), places.cos()), dim=1) / len(PERIODS) ** 0.5  # [words, waves], norm 1
    directions = torch.linalg.qr(torch.randn(embeddings.shape[1], waves.shape[1])).Q  # [D, waves]
    norm = embeddings.norm(dim=1).mean()
    for word, wave in zip(words, waves, strict=True):
        ids = tokenizer.encode(word)
        if len(ids) == 1:  # a word that this world does not have is no token
            embeddings[ids] = OWN_SHARE * embeddings[ids] + norm * (directions @ wave)


class Lesson(NamedTuple):
    """One question with its answer, in ids."""

    kind: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # the end included
    drawn_out: tuple[int, int] = (0, 0)  # where the prompt has words drawn out


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of the world's records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words_of(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return every word of the records."""
    texts = (
        text
        for record in records
        for text in (
            record["question"], record["answer"], *(turn["content"] for turn in record["turns"]),
        )
    )  # fmt: skip
    return {word for text in texts for word in text.split()}


def make_lessons(records: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[Lesson]:
    """Write records as prompts and answers, each once."""
    lessons: dict[Lesson, None] = {}
    for record in records:
        messages = [*record["turns"], {"role": "user", "content": record["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer([prompt, record["answer"] + END], add_special_tokens=False)["input_ids"]
        lessons[Lesson(record["kind"], tuple(ids[0]), tuple(ids[1]))] = None
    return list(lessons)


@dataclass(frozen=True)
class Marks:
    """Ids that have a place of their own in lessons."""

    user: int
    end: int
    pause: int
    repeat: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Marks":
        """Look them up."""
        return cls(*map(tokenizer.convert_tokens_to_ids, ("<|user|>", END, PAUSE, REPEAT)))

    def question(self, lesson: Lesson) -> tuple[int, int]:
        """Return where the last question lies in a prompt, which closes it and opens the answer."""
        after = len(lesson.prompt) - 2
        return after - lesson.prompt[:after][::-1].index(self.user), after

    def draw_out(self, lesson: Lesson, chance: random.Random) -> Lesson:
        """Let the words of the last question take longer, with pauses between them."""
        start, after = self.question(lesson)
        steps = [self.pause] * chance.choice(PAUSES)
        for word in lesson.prompt[start:after]:
            steps += [word] * chance.choice(LASTING) + [self.pause] * chance.choice(PAUSES)
        prompt = (*lesson.prompt[:start], *steps, *lesson.prompt[after:])
        return lesson._replace(prompt=prompt, drawn_out=(start, start + len(steps)))

    def repeated(self, lesson: Lesson) -> Lesson:
        """A lesson in which the last question of another is repeated."""
        return self.repeating(lesson.prompt[slice(*self.question(lesson))])

    def repeating(self, words: Sequence[int]) -> Lesson:
        """A lesson in which words are repeated."""
        return Lesson("repeated", (self.user, *words, self.end, self.repeat), (*words, self.end))


class Batch(NamedTuple):
    """Lessons side by side; what follows a lesson has weight 0, and a causal LM does not see it."""

    ids: Tensor  # int64 [B, S]
    weights: Tensor  # [B, S], of each id as something to be predicted
    drawn_out: Tensor  # bool [B, S], where words are drawn out


def make_batch(lessons: Sequence[Lesson], *, pad: int) -> Batch:
    """Put lessons side by side."""
    length = max(len(lesson.prompt) + len(lesson.answer) for lesson in lessons)
    length += -length % _MULTIPLE
    ids = torch.full((len(lessons), length), pad)
    weights = torch.zeros(len(lessons), length)
    drawn_out = torch.zeros(len(lessons), length, dtype=torch.bool)
    for row, lesson in enumerate(lessons):
        start, end = len(lesson.prompt), len(lesson.prompt) + len(lesson.answer)
        ids[row, :end] = torch.tensor(lesson.prompt + lesson.answer)
        weights[row, :start] = 0 if any(lesson.drawn_out) else QUESTION_WEIGHT
        weights[row, start:end] = 1
        drawn_out[row, slice(*lesson.drawn_out)] = True
    return Batch(ids, weights, drawn_out)


@dataclass
class LmTraining:
    """What one step of training needs.

    Attributes:
        lm: the LM.
        lessons: what it learns.
        pad: id after the end of a lesson.
        marks: ids of marks.
        words: ids of all words, for lists.
        batch_size: lessons a step.
        seed: decides which lessons a step takes.
    """

    lm: PreTrainedModel
    lessons: Sequence[Lesson]
    pad: int
    marks: Marks
    words: Sequence[int]
    batch_size: int = BATCH_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        self.chances = torch.tensor(chances([lesson.kind for lesson in self.lessons]))
        is_order = torch.tensor([lesson.kind in ORDER_KINDS for lesson in self.lessons])
        self.first_chances = self.chances * is_order if is_order.any() else self.chances

    def batch(self, step: int) -> Batch:
        """Return the lessons of a step: of a group that is drawn at once, those of about one length."""
        chance = step_generator(self.seed, step // _GROUP)
        is_first = step // _GROUP * _GROUP < ORDER_STEPS
        chances = self.first_chances if is_first else self.chances
        drawn = torch.multinomial(chances, _GROUP * self.batch_size, replacement=True, generator=chance)
        lessons = [self.lessons[i] for i in drawn.tolist()]
        if not is_first:
            manner = random.Random(chance.initial_seed())
            lessons = [self.vary(lesson, manner) for lesson in lessons]
        lessons.sort(key=lambda lesson: len(lesson.prompt) + len(lesson.answer))
        part = int(torch.randperm(_GROUP, generator=chance)[step % _GROUP]) * self.batch_size
        return make_batch(lessons[part : part + self.batch_size], pad=self.pad)

    def vary(self, lesson: Lesson, chance: random.Random) -> Lesson:
        """Return a lesson as it is, drawn out, or as something to repeat, which is drawn out too."""
        drawn = chance.random()
        if drawn < REPEATED_SHARE:
            if chance.random() < LISTED_SHARE:
                lesson = self.marks.repeating(chance.choices(self.words, k=chance.randint(1, MOST_LISTED)))
            else:
                lesson = self.marks.repeated(lesson)
        return self.marks.draw_out(lesson, chance) if drawn < REPEATED_SHARE + DRAWN_OUT_SHARE else lesson

    def spoken(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """Return lessons drawn out, and the questions of each as something to repeat, always the same."""
        chance = random.Random(self.seed)
        asked = map(self.marks.repeated, lessons)
        return [self.marks.draw_out(lesson, chance) for lesson in (*lessons, *asked)]

    def loss(self, step: int) -> Tensor:
        """Return the loss of a step: cross-entropy, answers above all."""
        ids, weights, drawn_out = (tensor.to(self.lm.device) for tensor in self.batch(step))
        embeddings = self.lm.get_input_embeddings()(ids)
        if drawn_out.any():
            noise = torch.randn(embeddings.shape, generator=step_generator(self.seed, -1 - step))
            size = BLUR * embeddings.detach().square().mean(dim=-1, keepdim=True).sqrt()
            embeddings = embeddings + noise.to(ids.device) * size * drawn_out[..., None]
        with mixed_precision(ids.device):
            logits = self.lm(inputs_embeds=embeddings, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def exact_match(
    lm: PreTrainedModel, lessons: Sequence[Lesson], *, pad: int, batch_size: int = 256
) -> dict[str, float]:
    """Return for each kind, and for ``all``, the share that greedy decoding answers word for word.

    Greedy decoding writes the answer if and only if each of its ids is the likeliest one after those before
    it, so one pass over the answer is enough.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    ordered = sorted(lessons, key=lambda lesson: len(lesson.prompt) + len(lesson.answer))
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        ids, weights, _ = (tensor.to(lm.device) for tensor in make_batch(part, pad=pad))
        likeliest = lm(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (likeliest != ids[:, 1:]) & (weights[:, 1:] == 1)
        for lesson, is_wrong in zip(part, wrong.any(-1).tolist(), strict=True):
            asked.update((lesson.kind, "all"))
            right.update(() if is_wrong else (lesson.kind, "all"))
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def describe(shares: Mapping[str, float]) -> str:
    """Write the share of all, and of each kind that is not perfect."""
    rest = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share < 1 and kind != "all")
    return f"held-out exact match {shares['all']:.2%}" + (f" ({rest})" if rest else "")


def train_lm(
    world: Path,
    out: Path,
    *,
    kind: str = "llama",
    schedule: Schedule = SCHEDULE,
    device: str = "cpu",
    seed: int = 0,
    until: int | None = None,
) -> dict[str, float]:
    """Train, or go on with training, and write LM and tokenizer.

    Args:
        world: folder with ``train.jsonl`` and ``heldout.jsonl``.
        out: folder to write to once training is over. What is needed to go on is in ``OUT-training``.
        kind: key of ``KINDS``.
        schedule: how long and how fast.
        device: where to train.
        seed: of weights and batches.
        until: stop before this step, for the next run to go on.

    Returns:
        Held-out exact match of each kind and of ``all``.
    """
    train, heldout = (read_records(world / f"{split}.jsonl") for split in ("train", "heldout"))
    words = sorted(words_of((*train, *heldout)))
    tokenizer = make_tokenizer(words)
    lm = make_lm(kind, tokenizer, seed=seed).to(pick_device(device))
    lm.set_attn_implementation("eager")  # the quickest for sentences as short as these
    pad = int(tokenizer.pad_token_id)
    lessons = make_lessons((*train, *written_lessons()), tokenizer)
    questions = make_lessons(heldout, tokenizer)
    training = LmTraining(
        lm,
        lessons,
        pad,
        Marks.of(tokenizer),
        [token for word in words for token in tokenizer.encode(word, add_special_tokens=False)],
        seed=seed,
    )
    print(f"{kind}, {lm.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(lessons)} lessons, "
          f"{len(questions)} held out", flush=True)  # fmt: skip
    folder = training_folder(out)
    trainer = PartTrainer(lm, schedule=schedule, folder=folder)

    def save(target: Path) -> str:
        """Write LM and tokenizer; return what the LM can do."""
        lm.save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "README.md").write_text(CARD, encoding="utf-8")
        drawn_out = exact_match(lm, training.spoken(questions), pad=pad)
        repeated = f"drawn out {drawn_out['all']:.2%}, repeated {drawn_out['repeated']:.2%}"
        return f"{describe(exact_match(lm, questions, pad=pad))}, {repeated}"

    trainer.run(training.loss, lambda: save(folder / "so-far"), until=until)
    with trainer.averaged():
        if trainer.step >= schedule.num_steps:
            print(f"{out}: {save(out)}", flush=True)
        return exact_match(lm, questions, pad=pad)


def main() -> None:
    parser = training_parser("Train the tiny talker's language model.", steps=SCHEDULE.num_steps)
    parser.add_argument("--kind", choices=KINDS, default="llama", help="architecture")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    train_lm(
        arguments.world,
        arguments.out,
        kind=arguments.kind,
        **training_arguments(arguments, SCHEDULE),
    )


if __name__ == "__main__":
    main()
