"""Retrieval tasks: facts hidden in a long text, and questions about them. Generated, deterministic, the same everywhere.

The two are the simplest of RULER's (Hsieh et al., arXiv 2404.06654):

- *needle*: one fact at a given depth of the text, and a question about it;
- *multi-key*: many facts of the same form spread over the text, and one question about each. Here the cache must not blur which
  number belongs to which key.

A fact is a five-digit number under a key of two words. The text around them is made of sentences from small lists of words. An
answer counts when greedy decoding would give exactly its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...demo.model import Tokenizer
from ..errors import EvaluationError

NEEDLE, MULTI_KEY = "needle", "multi-key"
KEYS = 12
"""Facts, and so questions, of the multi-key task; no two keys share a word."""
SEED = 20240917

_COLOURS = ("amber", "black", "blue", "brown", "golden", "green", "grey", "orange", "pink", "purple", "red", "silver", "white")
_ANIMALS = (
    "badger",
    "crane",
    "dolphin",
    "eagle",
    "falcon",
    "horse",
    "lion",
    "otter",
    "panda",
    "rabbit",
    "tiger",
    "whale",
    "wolf",
)
_PEOPLE = (
    "baker",
    "clerk",
    "doctor",
    "farmer",
    "gardener",
    "painter",
    "pilot",
    "sailor",
    "singer",
    "teacher",
    "tailor",
    "writer",
)
_VERBS = ("cleaned", "found", "kept", "moved", "noticed", "opened", "painted", "repaired", "sold", "took", "wanted", "watched")
_THINGS = ("basket", "blanket", "boat", "chair", "clock", "door", "ladder", "lamp", "map", "mirror", "table", "wagon", "window")
_PLACES = (
    "bridge",
    "church",
    "field",
    "forest",
    "garden",
    "harbour",
    "market",
    "mill",
    "river",
    "school",
    "station",
    "village",
)
_TIMES = ("before dawn", "in the morning", "at noon", "in the afternoon", "in the evening", "late at night", "after the rain")

INTRODUCTION = "Some secret codes are hidden in the following text. Remember them.\n\n"


@dataclass(frozen=True)
class Question:
    """What is asked after the text.

    Attributes:
        prompt: token ids that follow the text.
        answer: token ids that count as right.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it.

    Attributes:
        task: :data:`NEEDLE` or :data:`MULTI_KEY`.
        tokens: token ids of the text.
        questions: about its facts; the text with any one of them and its answer has at most the context's length.
    """

    task: str
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


def haystacks(tokenizer: Tokenizer, context: int, depths: Sequence[float]) -> tuple[Haystack, ...]:
    """A text with one needle for every depth, then one for the multi-key task.

    Args:
        tokenizer: the model's.
        context: rows of the cache when an answer is complete.
        depths: first token of a needle over the length of the text, each in [0, 1).

    Raises:
        EvaluationError: the context is too short for the facts.
    """
    found = [_haystack(NEEDLE, tokenizer, context, 1, (depth,), random.Random(f"{SEED} {context} {depth}")) for depth in depths]
    spread = tuple((index + 0.5) / KEYS for index in range(KEYS))
    found.append(_haystack(MULTI_KEY, tokenizer, context, KEYS, spread, random.Random(f"{SEED} {context}")))
    return tuple(found)


def _haystack(
    task: str, tokenizer: Tokenizer, context: int, number: int, depths: Sequence[float], rng: random.Random
) -> Haystack:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    keys = [" ".join(words) for words in zip(rng.sample(_COLOURS, number), rng.sample(_ANIMALS, number), strict=True)]
    facts = [(key, str(code)) for key, code in zip(keys, rng.sample(range(10_000, 100_000), number), strict=True)]
    questions = tuple(_question(encode, key, code) for key, code in facts)
    needles = [encode(f" The secret code of the {key} is {code}.") for key, code in facts]
    room = context - max(len(question.prompt) + len(question.answer) for question in questions)
    tokens = encode(INTRODUCTION)
    if room < len(tokens) + 3 * sum(map(len, needles)):
        raise EvaluationError(f"{context} tokens are too few for {number} facts; choose longer retrieval contexts")
    waiting = [(round(depth * room), needle) for depth, needle in zip(depths, needles, strict=True)]
    for sentence in _sentences(rng):
        if waiting and len(tokens) >= waiting[0][0]:
            tokens += waiting.pop(0)[1]
        tokens += encode(sentence)
        if len(tokens) >= room:
            break
    return Haystack(task, tuple(tokens[:room]), questions)


def _question(encode: Callable[[str], list[int]], key: str, code: str) -> Question:
    asked = f"\n\nQuestion: What is the secret code of the {key}?\nAnswer: The secret code of the {key} is"
    prompt, whole = encode(asked), encode(f"{asked} {code}")
    return Question(tuple(prompt), tuple(whole[len(prompt) :]))


def _sentences(rng: random.Random) -> Iterator[str]:
    while True:
        person, verb, thing, place, time = (rng.choice(words) for words in (_PEOPLE, _VERBS, _THINGS, _PLACES, _TIMES))
        yield f" The {person} {verb} the {thing} near the {place} {time}."
