"""The world of the tiny talker: short questions and answers in a few hundred words.

Tables of facts go in, records of questions and answers go out: some thousands of pairs, each asked in a few
wordings, one in ten held out. Knows nothing of speech, tokenizers or models.

    python examples/tiny_talker/world.py        # prints how many there are of each kind

Texts are lower case without punctuation, numbers are words. A *pair* is what a question combines: the two
numbers of a sum, a country and the wrong city beside the right one, a name and a feeling. Held out is the
pair, so that training meets it in no wording and no order, neither as a question nor as an earlier turn. The
facts that an answer needs are all in training: "what is the capital of france" is, "is the capital of france
paris or rome" may be held out.

No two words sound the same, and letters are spelled only where their names are far apart ("b" and "d" are
not): replies are judged by ear.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import Any, Literal, NamedTuple, TypeVar

SEED = 4
"""Decides which pairs are held out and how each is worded."""

HELD_OUT = 0.1
"""Share of the pairs of each kind."""

DICTATIONS, READINGS = 6000, 5000
"""Lists of words to write down, and to read out."""

Split = Literal["train", "heldout"]

SPLITS: tuple[Split, ...] = ("train", "heldout")

_T = TypeVar("_T")

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
CAPITALS = {
    "france": "paris", "italy": "rome", "spain": "madrid", "germany": "berlin", "russia": "moscow",
    "japan": "tokyo", "china": "beijing", "egypt": "cairo", "greece": "athens", "england": "london",
    "norway": "oslo", "cuba": "havana", "austria": "vienna", "portugal": "lisbon",
}  # fmt: skip
COLORS = {
    "grass": "green", "sky": "blue", "snow": "white", "night": "black", "banana": "yellow", "tomato": "red",
    "chocolate": "brown", "carrot": "orange", "pig": "pink", "elephant": "gray", "lemon": "yellow",
    "milk": "white", "ocean": "blue", "frog": "green", "blood": "red",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "owl": "hoot", "lion": "roar",
    "mouse": "squeak", "bee": "buzz", "snake": "hiss", "frog": "croak", "bird": "tweet", "horse": "neigh",
}  # fmt: skip
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()
SPELLED = "milk smile home shoe owl elk lime slow mole six like smoke".split()
NAMES = "anna peter maria david laura oscar susan victor helen martin robert julia".split()
GOOD_FEELINGS = "happy proud excited healthy".split()
BAD_FEELINGS = "sad tired hungry thirsty angry lonely bored".split()
LIKED = "music football tennis chess swimming dancing movies chocolate milk snow coffee bread".split()
WORK = {
    "teacher": "school", "doctor": "hospital", "farmer": "farm", "cook": "kitchen", "judge": "court",
    "sailor": "ship", "waiter": "restaurant", "pilot": "airport", "actor": "theater",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("happy", "sad"),
    ("dark", "bright"), ("hard", "soft"), ("wet", "dry"), ("long", "short"), ("full", "empty"),
    ("clean", "dirty"), ("loud", "quiet"), ("strong", "weak"),
)  # fmt: skip
CLASSES = {
    "animal": "cow dog cat duck lion mouse snake horse elephant".split(),
    "fruit": "banana lemon apple lime".split(),
    "color": "green blue white black yellow red brown pink gray".split(),
    "day": DAYS,
    "month": [month for month in MONTHS if month != "may"],
    "city": list(CAPITALS.values()),
    "country": list(CAPITALS),
    "name": NAMES,
}
WITH_ARTICLE = ("animal", "fruit")
NOUNS = "house table window garden river mountain flower bottle pencil dog cow horse bird apple lemon".split()
ADJECTIVES = "green blue white black yellow red brown big small old young dark wet clean quiet".split()
SMALL_TALK = {
    "hello": "hello how are you",
    "good morning": "good morning how are you",
    "good evening": "good evening how are you",
    "how are you": "i am fine thank you",
    "how are you today": "i am fine thank you",
    "what is your name": "my name is robin",
    "who are you": "my name is robin",
    "thank you": "you are welcome",
    "thank you very much": "you are welcome",
    "can you hear me": "yes i can hear you",
    "can you help me": "yes i can help you",
    "can you count": "yes i can count",
    "can you spell": "yes i can spell",
    "where do you live": "i live in this computer",
    "are you a computer": "yes i am a computer",
    "what can you do": "i can count and spell and answer",
    "good night": "good night and sleep well",
    "goodbye": "goodbye and thank you",
    "see you tomorrow": "see you tomorrow",
}


class Turn(NamedTuple):
    """One message."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class Record:
    """One question with its answer.

    Attributes:
        id: the same in every run.
        kind: what is asked for.
        pair: what the question combines; wordings of one pair share it.
        turns: earlier messages, as text.
        question: the last message of the user.
        answer: the one right answer.
    """

    id: str
    kind: str
    pair: str
    turns: tuple[Turn, ...]
    question: str
    answer: str

    def as_row(self) -> dict[str, object]:
        """Return it as a JSON object."""
        turns = [turn._asdict() for turn in self.turns]
        return {
            "id": self.id, "kind": self.kind, "pair": self.pair, "turns": turns,
            "question": self.question, "answer": self.answer,
        }  # fmt: skip


class Exchange(NamedTuple):
    """One wording of a pair."""

    question: str
    answer: str
    turns: tuple[Turn, ...] = ()


class Pair(NamedTuple):
    """What a question combines, and how it may be asked.

    Attributes:
        fact: is a fact by itself and stays in training.
        uses: keys of pairs that the exchanges contain; training has none whose pair is held out.
    """

    kind: str
    key: str
    exchanges: tuple[Exchange, ...]
    fact: bool = False
    uses: tuple[str, ...] = ()


def draw(*key: object) -> float:
    """Return a number in [0, 1) that depends on ``key`` and the seed alone."""
    digest = hashlib.blake2b(repr((SEED, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _shuffled(items: Iterable[_T], *key: object) -> list[_T]:
    return sorted(items, key=lambda item: draw(*key, item))


def _key(kind: str, *parts: object, ordered: bool = False) -> str:
    """Return the name of a pair; unless ``ordered``, the same for its parts in any order."""
    names = [str(part) for part in parts]
    return f"{kind}: {', '.join(names if ordered else sorted(names))}"


def _choices(wordings: Sequence[str], right: str, wrong: str, answer: str) -> tuple[Exchange, ...]:
    """Every wording with its two choices, ``{a}`` and ``{b}``, in either order."""
    orders = ((right, wrong), (wrong, right))
    return tuple(Exchange(wording.format(a=a, b=b), answer) for wording in wordings for a, b in orders)


def _after(first: Exchange, second: Exchange) -> Exchange:
    """The second exchange, asked after the first."""
    turns = (*first.turns, Turn("user", first.question), Turn("assistant", first.answer))
    return Exchange(second.question, second.answer, turns)


def _result(value: int) -> str:
    return f"the answer is {NUMBERS[value]}"


def _sum(a: int, b: int) -> Exchange:
    return Exchange(f"what is {NUMBERS[a]} plus {NUMBERS[b]}", _result(a + b))


def _plus() -> Iterator[Pair]:
    wordings = ("what is {a} plus {b}", "how much is {a} plus {b}")
    for a, b in _sums():
        exchanges = _choices(wordings, NUMBERS[a], NUMBERS[b], _result(a + b))
        yield Pair("plus", _plus_key(a, b), tuple(dict.fromkeys(exchanges)))


def _sums() -> list[tuple[int, int]]:
    most = len(NUMBERS) - 1
    return [(a, b) for a in range(most + 1) for b in range(a, most + 1 - a)]


def _plus_key(a: int, b: int) -> str:
    return _key("plus", NUMBERS[a], NUMBERS[b])


def _minus_key(a: int, b: int) -> str:
    return _key("minus", NUMBERS[a], NUMBERS[b])


def _minus() -> Iterator[Pair]:
    wordings = ("what is {a} minus {b}", "how much is {a} minus {b}", "what is {a} take away {b}")
    for a in range(len(NUMBERS)):
        for b in range(a + 1):
            texts = [wording.format(a=NUMBERS[a], b=NUMBERS[b]) for wording in wordings]
            yield Pair("minus", _minus_key(a, b), tuple(Exchange(text, _result(a - b)) for text in texts))


def _comparisons() -> Iterator[Pair]:
    for small, big in combinations(NUMBERS, 2):
        exchanges = [
            *_choices(["which is bigger {a} or {b}", "which number is bigger {a} or {b}"], big, small,
                      f"{big} is bigger"),
            *_choices(["which is smaller {a} or {b}", "which number is smaller {a} or {b}"], small, big,
                      f"{small} is smaller"),
        ]  # fmt: skip
        yield Pair("comparison", _key("comparison", small, big), tuple(exchanges))


def _capitals() -> Iterator[Pair]:
    for country, city in CAPITALS.items():
        answer = f"the capital of {country} is {city}"
        questions = (f"what is the capital of {country}", f"tell me the capital of {country}")
        facts = tuple(Exchange(question, answer) for question in questions)
        yield Pair("capital", _key("capital", country), facts, fact=True)
        where = Exchange(f"in which country is {city}", f"{city} is in {country}")
        yield Pair("capital", _key("capital", city), (where,), fact=True)
        for other, wrong in CAPITALS.items():
            if other != country:
                exchanges = (
                    *_choices([f"is the capital of {country} {{a}} or {{b}}"], city, wrong, answer),
                    *_choices(
                        [f"which city is the capital of {country} {{a}} or {{b}}"], city, wrong, answer
                    ),
                    *_choices([f"is {city} in {{a}} or in {{b}}"], country, other, where.answer),
                )
                yield Pair("capital", _key("capital", country, other, ordered=True), exchanges)


def _colors() -> Iterator[Pair]:
    for thing, color in COLORS.items():
        answer = f"the {thing} is {color}"
        yield Pair("color", _key("color", thing), (_color(thing),), fact=True)
        for wrong in sorted(set(COLORS.values()) - {color}):
            wordings = (f"is the {thing} {{a}} or {{b}}", f"what color is the {thing} {{a}} or {{b}}")
            yield Pair("color", _key("color", thing, wrong), _choices(wordings, color, wrong, answer))


def _color(thing: str) -> Exchange:
    return Exchange(f"what color is the {thing}", f"the {thing} is {COLORS[thing]}")


def _sounds() -> Iterator[Pair]:
    return _doings(
        "sound",
        SOUNDS,
        answer="the {who} says {what}",
        facts=("what does the {who} say", "which animal says {what}"),
        choices=("which animal says {what}", "does the {who} say {a} or {b}"),
    )


def _doings(
    kind: str, table: Mapping[str, str], *, answer: str, facts: Sequence[str], choices: tuple[str, str]
) -> Iterator[Pair]:
    """Who does what, asked outright; and who of two, and what of two."""
    who_of_two, what_of_two = choices[0] + " the {a} or the {b}", choices[1]
    for who, what in table.items():
        fill = {"who": who, "what": what, "a": "{a}", "b": "{b}"}
        told = answer.format(**fill)
        exchanges = tuple(Exchange(question.format(**fill), told) for question in facts)
        yield Pair(kind, _key(kind, who), exchanges, fact=True)
        for other, wrong in table.items():
            if other != who:
                exchanges = (
                    *_choices([who_of_two.format(**fill)], who, other, told),
                    *_choices([what_of_two.format(**fill)], what, wrong, told),
                )
                yield Pair(kind, _key(kind, who, other, ordered=True), exchanges)


def _calendar() -> Iterator[Pair]:
    for unit, names in (("day", DAYS), ("month", MONTHS)):
        for i, name in enumerate(names):
            following = names[(i + 1) % len(names)]
            yield Pair(unit, _key(unit, "after", name), _which_beside(unit, name, following), fact=True)
        for early, late in combinations(names, 2):
            yield Pair(unit, _key(unit, early, late), _which_first(unit, early, late))


def _which_beside(unit: str, name: str, following: str) -> tuple[Exchange, ...]:
    return (
        Exchange(f"which {unit} comes after {name}", f"{following} comes after {name}"),
        Exchange(f"which {unit} comes before {following}", f"{name} comes before {following}"),
    )


def _which_first(unit: str, early: str, late: str) -> tuple[Exchange, ...]:
    return (
        *_choices([f"which {unit} comes first {{a}} or {{b}}"], early, late, f"{early} comes first"),
        *_choices([f"which {unit} comes last {{a}} or {{b}}"], late, early, f"{late} comes last"),
    )


def _spelling() -> Iterator[Pair]:
    letters = {word: " ".join(word) for word in SPELLED}
    for word, spelled in letters.items():
        questions = (f"spell {word}", f"please spell the word {word}")
        facts = tuple(Exchange(question, spelled) for question in questions)
        yield Pair("spelling", _key("spelling", word), facts, fact=True)
    for pair in combinations(SPELLED, 2):
        exchanges = [
            Exchange(wording.format(a=a, b=b), f"{letters[a]} {letters[b]}")
            for wording in ("spell {a} and {b}", "please spell the words {a} and {b}")
            for a, b in permutations(pair)
        ]
        yield Pair("spelling", _key("spelling", *pair), tuple(exchanges))


def _counting(most: int = 5) -> Iterator[Pair]:
    for low, high in combinations(range(len(NUMBERS)), 2):
        if high - low <= most:
            upwards = NUMBERS[low : high + 1]
            exchanges = [
                Exchange(wording.format(a=way[0], b=way[-1]), " ".join(way))
                for wording in ("count from {a} until {b}", "please count from {a} until {b}")
                for way in (upwards, upwards[::-1])
            ]
            yield Pair("counting", _key("counting", NUMBERS[low], NUMBERS[high]), tuple(exchanges))


def _small_talk() -> Iterator[Pair]:
    for question, answer in SMALL_TALK.items():
        yield Pair("small talk", _key("small talk", question), (Exchange(question, answer),), fact=True)
    for name in NAMES:
        for part in ("morning", "afternoon", "evening"):
            exchanges = tuple(
                Exchange(f"good {part} {me} {name}", f"good {part} {name} how are you")
                for me in ("my name is", "i am")
            )
            yield Pair("small talk", _key("small talk", name, part), exchanges)
        for feeling in (*GOOD_FEELINGS, *BAD_FEELINGS):
            yield Pair("small talk", _key("small talk", name, feeling), _feeling(name, feeling))
        for thing in LIKED:
            yield Pair("small talk", _key("small talk", name, thing), _liking(name, thing))


def _feeling(name: str, feeling: str) -> tuple[Exchange, ...]:
    reply = "it is good" if feeling in GOOD_FEELINGS else "i am sorry"
    answer = f"hello {name} {reply} that you are {feeling}"
    questions = (f"hello i am {name} and i am {feeling}", f"my name is {name} and i am {feeling}")
    return tuple(Exchange(question, answer) for question in questions)


def _liking(name: str, thing: str) -> tuple[Exchange, ...]:
    answer = f"hello {name} i also like {thing}"
    questions = (f"hello i am {name} and i like {thing}", f"my name is {name} and i like {thing}")
    return tuple(Exchange(question, answer) for question in questions)


def _definitions() -> Iterator[Pair]:
    def a(noun: str) -> str:
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    for right, members in CLASSES.items():
        for member in members:
            name = a(member) if right in WITH_ARTICLE else member
            answer = f"{name} is {a(right)}"
            yield Pair(
                "definition", _key("definition", member), (Exchange(f"what is {name}", answer),), fact=True
            )
            for wrong in _shuffled(set(CLASSES) - {right}, member)[:4]:
                wordings = (f"is {name} {{a}} or {{b}}", f"what is {name} {{a}} or {{b}}")
                yield Pair(
                    "definition",
                    _key("definition", member, wrong),
                    _choices(wordings, a(right), a(wrong), answer),
                )


def _jobs() -> Iterator[Pair]:
    return _doings(
        "work",
        WORK,
        answer="the {who} works at the {what}",
        facts=("where does the {who} work", "who works at the {what}"),
        choices=("who works at the {what}", "does the {who} work at the {a} or the {b}"),
    )


_OPPOSITE = {**dict(OPPOSITES), **{b: a for a, b in OPPOSITES}}


def _opposite(word: str) -> Exchange:
    return Exchange(f"what is the opposite of {word}", f"the opposite of {word} is {_OPPOSITE[word]}")


def _opposites() -> Iterator[Pair]:
    for word, opposite in _OPPOSITE.items():
        yield Pair("opposite", _key("opposite", word), (_opposite(word),), fact=True)
        for wrong in _shuffled(set(_OPPOSITE) - {word, opposite}, "opposite", word)[:10]:
            wordings = (
                f"is the opposite of {word} {{a}} or {{b}}",
                f"what is the opposite of {word} {{a}} or {{b}}",
            )
            exchanges = _choices(wordings, opposite, wrong, _opposite(word).answer)
            yield Pair("opposite", _key("opposite", word, wrong, ordered=True), exchanges)


def _repeating() -> Iterator[Pair]:
    wordings = ("say {0}", "please say {0}", "repeat the words {0}")
    for adjective in ADJECTIVES:
        for noun in NOUNS:
            exchanges = tuple(
                Exchange(wording.format(f"{adjective} {noun}"), f"{adjective} {noun}") for wording in wordings
            )
            yield Pair("repeating", _key("repeating", adjective, noun), exchanges)
    others = [*NOUNS, *NAMES, *CAPITALS.values(), *MONTHS, *LIKED]
    for pair in _shuffled(combinations(dict.fromkeys(others), 2), "repeating")[:200]:
        exchanges = tuple(
            Exchange(wording.format(f"{a} and {b}"), f"{a} and {b}")
            for wording in wordings[:2]
            for a, b in permutations(pair)
        )
        yield Pair("repeating", _key("repeating", *pair), exchanges)


def _then_sums(most: int = 300) -> Iterator[Pair]:
    """A sum, then more or less of it."""
    steps = [(a, b, sign, k) for a, b in _sums() for sign in (1, -1) for k in range(1, 6)]
    for a, b, sign, k in _shuffled((step for step in steps if 0 <= _total(*step) < len(NUMBERS)), "then")[
        :most
    ]:
        word = "plus" if sign > 0 else "minus"
        second = Exchange(f"and {word} {NUMBERS[k]}", _result(a + b + sign * k))
        key = _key("two turns sum", *sorted((NUMBERS[a], NUMBERS[b])), word, NUMBERS[k], ordered=True)
        inner = _plus_key(a + b, k) if sign > 0 else _minus_key(a + b, k)
        exchanges = tuple(dict.fromkeys(_after(first, second) for first in (_sum(a, b), _sum(b, a))))
        yield Pair("two turns sum", key, exchanges, uses=(_plus_key(a, b), inner))


def _total(a: int, b: int, sign: int, k: int) -> int:
    return a + b + sign * k


def _then_memory() -> Iterator[Pair]:
    """What the user said of themselves, then a question about it."""
    kind = "two turns memory"
    for name in NAMES:
        ask_name = Exchange("what is my name", f"your name is {name}")
        for feeling in (*GOOD_FEELINGS, *BAD_FEELINGS):
            seconds = (ask_name, Exchange("how do i feel", f"you are {feeling}"))
            exchanges = tuple(
                _after(first, second) for first in _feeling(name, feeling) for second in seconds
            )
            yield Pair(kind, _key(kind, name, feeling), exchanges, uses=(_key("small talk", name, feeling),))
        for thing in LIKED:
            seconds = (ask_name, Exchange("what do i like", f"you like {thing}"))
            exchanges = tuple(_after(first, second) for first in _liking(name, thing) for second in seconds)
            yield Pair(kind, _key(kind, name, thing), exchanges, uses=(_key("small talk", name, thing),))


def _then_facts() -> Iterator[Pair]:
    """One fact, then another of its kind."""

    def capital(country: str) -> Exchange:
        return Exchange(
            f"what is the capital of {country}", f"the capital of {country} is {CAPITALS[country]}"
        )

    sources = (
        ("two turns capital", CAPITALS, capital, "and of {0}", len(CAPITALS) ** 2),
        ("two turns color", COLORS, _color, "and the {0}", len(COLORS) ** 2),
        ("two turns opposite", _OPPOSITE, _opposite, "and of {0}", 150),
    )
    for kind, table, fact, wording, most in sources:
        for pair in _shuffled(combinations(table, 2), kind)[:most]:
            exchanges = tuple(
                _after(fact(a), Exchange(wording.format(b), fact(b).answer)) for a, b in permutations(pair)
            )
            yield Pair(kind, _key(kind, *pair), exchanges)


_SOURCES = (
    _plus, _minus, _comparisons, _capitals, _colors, _sounds, _calendar, _spelling, _counting, _small_talk,
    _definitions, _jobs, _opposites, _repeating, _then_sums, _then_memory, _then_facts,
)  # fmt: skip

WORDINGS = 2
"""Wordings that are taken of each pair."""

KIND_POWER = 0.5
"""Of a kind of n texts, n to this power is how often it is drawn."""

HARDER: Mapping[str, float] = {
    "plus": 3.0, "minus": 3.0, "two turns sum": 3.0, "comparison": 1.5, "counting": 6.0, "long counting": 2.0,
    "day": 4.0, "month": 2.0, "spelling": 2.0,
}  # fmt: skip
"""Kinds that are drawn more often than that."""

ORDER_KINDS = frozenset(
    {"plus", "minus", "two turns sum", "counting", "long counting", "calendar counting", "comparison", "day",
     "month", "number order"}
)  # fmt: skip
"""Kinds about numbers and orders."""

MORE_WORDINGS: Mapping[str, int] = {"plus": 4, "minus": 3, "comparison": 4}
"""The same for kinds that take more to learn."""


@cache
def pairs() -> tuple[Pair, ...]:
    """Return every pair of the world."""
    return tuple(pair for source in _SOURCES for pair in source())


@cache
def held_out() -> frozenset[str]:
    """Return the keys of the pairs that training never meets."""
    chosen: set[str] = set()
    for kind in dict.fromkeys(pair.kind for pair in pairs()):
        keys = _shuffled((pair.key for pair in pairs() if pair.kind == kind and not pair.fact), "held out")
        chosen.update(keys[: round(HELD_OUT * len(keys))])
    chosen.update(pair.key for pair in pairs() if chosen & set(pair.uses))
    return frozenset(chosen)


@cache
def records(split: Split) -> tuple[Record, ...]:
    """Return the questions of a split with their answers, in a fixed mixed order."""
    made: list[Record] = []
    for pair in pairs():
        if (pair.key in held_out()) is (split == "heldout"):
            wanted = len(pair.exchanges) if pair.fact else MORE_WORDINGS.get(pair.kind, WORDINGS)
            for exchange in _shuffled(pair.exchanges, pair.key)[:wanted]:
                made.append(_record(pair, exchange))
    return tuple(_shuffled(made, "order"))


def _record(pair: Pair, exchange: Exchange) -> Record:
    digest = hashlib.blake2b(repr(exchange).encode(), digest_size=5).hexdigest()
    name = f"{pair.kind.replace(' ', '_')}_{digest}"
    return Record(name, pair.kind, pair.key, exchange.turns, exchange.question, exchange.answer)


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word of the world, sorted."""
    texts = (text for split in ("train", "heldout") for record in records(split) for text in _texts(record))
    return tuple(sorted({word for text in texts for word in text.split()}))


def _texts(record: Record) -> tuple[str, ...]:
    return (*(turn.content for turn in record.turns), record.question, record.answer)


@cache
def sentences() -> tuple[str, ...]:
    """Return every text of training once, in a mixed order: what a voice of this world has to say."""
    return tuple(_shuffled({text for record in records("train") for text in _texts(record)}, "sentences"))


@cache
def dictations(count: int = DICTATIONS) -> tuple[str, ...]:
    """Return lists of two to seven words that mean nothing: whoever writes them down has to hear each one."""
    return tuple(_word_list("dictation", number, least=2, most=7) for number in range(count))


@cache
def readings(count: int = READINGS) -> tuple[str, ...]:
    """Return lists of one to eight words that mean nothing: whoever reads them has to look at each one."""
    return tuple(_word_list("reading", number, least=1, most=8) for number in range(count))


def _word_list(name: str, number: int, *, least: int, most: int) -> str:
    words = vocabulary()
    length = least + int((most - least + 1) * draw(name, number))
    return " ".join(words[int(draw(name, number, place) * len(words))] for place in range(length))


def unspoken_wordings() -> list[dict[str, Any]]:
    """Every wording of the pairs that are not held out."""
    return [
        _lesson(pair.kind, exchange)
        for pair in pairs()
        if pair.key not in held_out()
        for exchange in pair.exchanges
    ]


def long_counts() -> list[dict[str, Any]]:
    """Counting further than the world's questions ask for: how numbers follow one another."""
    asked = {pair.key for pair in pairs()}
    ways = [
        way
        for low, high in combinations(range(len(NUMBERS)), 2)
        if _key("counting", NUMBERS[low], NUMBERS[high]) not in asked
        for way in (NUMBERS[low : high + 1], NUMBERS[low : high + 1][::-1])
    ]
    return [lesson for way in ways for lesson in _counting_lessons("long counting", way)]


def _counting_lessons(kind: str, way: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Both wordings of going from the first to the last."""
    for wording in ("count", "please count"):
        yield _lesson(kind, Exchange(f"{wording} from {way[0]} until {way[-1]}", " ".join(way)))


def calendar_counts() -> list[dict[str, Any]]:
    """Going through days and months as one counts, but for held-out pairs: how they follow one another."""
    ways = [
        way
        for unit, names in (("day", DAYS), ("month", MONTHS))
        for first, last in combinations(range(len(names)), 2)
        if _key(unit, names[first], names[last]) not in held_out()
        for way in (names[first : last + 1], names[first : last + 1][::-1])
    ]
    return [lesson for way in ways for lesson in _counting_lessons("calendar counting", way)]


def number_orders() -> list[dict[str, Any]]:
    """What the calendar's questions ask of days and months, asked of numbers whose pair is not held out."""
    asked = [
        (early, late)
        for early, late in combinations(NUMBERS, 2)
        if _key("comparison", early, late) not in held_out()
    ]
    following = [(name, late) for name, late in pairwise(NUMBERS) if (name, late) in asked]
    exchanges = (
        *(exchange for pair in asked for exchange in _which_first("number", *pair)),
        *(exchange for pair in following for exchange in _which_beside("number", *pair)),
    )
    return [_lesson("number order", exchange) for exchange in exchanges]


def lessons() -> list[dict[str, Any]]:
    """All that is read and not spoken. A held-out pair is asked for in none of them."""
    return [*unspoken_wordings(), *long_counts(), *calendar_counts(), *number_orders()]


def chances(kinds: Sequence[str]) -> list[float]:
    """How often to draw each of some texts, given their kinds: rare kinds and hard ones more often."""
    counts = Counter(kinds)
    return [counts[kind] ** (KIND_POWER - 1) * HARDER.get(kind, 1) for kind in kinds]


def _lesson(kind: str, exchange: Exchange) -> dict[str, Any]:
    """An exchange as something to read."""
    return {
        "kind": kind,
        "turns": [turn._asdict() for turn in exchange.turns],
        "question": exchange.question,
        "answer": exchange.answer,
    }


def main() -> None:
    """Print what the world holds."""
    train, heldout = records("train"), records("heldout")
    print(f"{'kind':<20}{'pairs':>8}{'held out':>10}{'train records':>15}{'held-out records':>18}")
    for kind in dict.fromkeys(pair.kind for pair in pairs()):
        keys = {pair.key for pair in pairs() if pair.kind == kind}
        counts = [sum(record.kind == kind for record in split) for split in (train, heldout)]
        print(f"{kind:<20}{len(keys):>8}{len(keys & held_out()):>10}{counts[0]:>15}{counts[1]:>18}")
    total = len({pair.key for pair in pairs()})
    print(f"{'all':<20}{total:>8}{len(held_out()):>10}{len(train):>15}{len(heldout):>18}")
    answers = {record.answer for split in (train, heldout) for record in split}
    lengths = Counter(len(record.answer.split()) for record in train)
    print(f"\n{len(vocabulary())} words, {len(sentences())} sentences, {len(answers)} answers")
    print("words an answer:", ", ".join(f"{words}: {count}" for words, count in sorted(lengths.items())))


if __name__ == "__main__":
    main()
