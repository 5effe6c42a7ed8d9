"""The items of the three small tasks: sentiment, topic and arithmetic.

An item's *content* (its words or numbers) decides its split: contents of the test split are in
no training, nor in the validation split. Pure Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

from organism import lexicon
from organism.world import stream

TEST_ROWS = 300
TRAIN_ROWS = 2000
VALIDATION_ROWS = 300

STEPPED_QUESTIONS = 3
"""How many of `QUESTIONS` pretraining always answers with written steps; the others it mostly
answers at once, which fails more often: that is what training on the task puts right."""

QUESTIONS: tuple[str, ...] = (
    "How many {thing} does {name} have now?",
    "How many {thing} are there now?",
    "How many does {name} have?",
    "How many is that?",
    "What is left?",
)


@dataclass(frozen=True, slots=True)
class Item:
    """One task item.

    Attributes:
        content: What the split is decided by; hashable.
        gold: The label or number.
        blurted: The answer without steps that pretraining shows for some wordings, else "".
    """

    content: tuple[object, ...]
    prompt: str
    answer: str
    gold: str
    blurted: str = ""


def sentiment_item(rng: random.Random) -> Item:
    """A short film review; where its halves disagree, the second one decides."""
    label = rng.choice(("positive", "negative"))
    good, bad = lexicon.PRAISE, lexicon.BLAME
    own, opposite = (good, bad) if label == "positive" else (bad, good)
    first, second = rng.sample(lexicon.NOUNS, 2)
    if rng.random() < 0.5:
        one, two = rng.sample(own, 2)
        review = f"The {first} was {one} and the {second} was {two}."
    else:
        one, two = rng.choice(opposite), rng.choice(own)
        review = f"The {first} was {one}, but the {second} was {two}."
    return Item(
        content=(first, one, second, two),
        prompt=f"Is this review positive or negative? {review}",
        answer=label,
        gold=label,
    )


def topic_item(rng: random.Random) -> Item:
    """A headline of one of four topics."""
    label = rng.choice(tuple(lexicon.NEWS))
    subjects, verbs, objects = lexicon.NEWS[label]
    subject, verb, item = rng.choice(subjects), rng.choice(verbs), rng.choice(objects)
    headline = f"{subject} {verb} {item} {rng.choice(lexicon.NEWS_ENDS)}"
    return Item(
        content=(subject, verb, item),
        prompt=f"Is this headline about world, sports, business or science? {headline}.",
        answer=label,
        gold=label,
    )


def arithmetic_item(rng: random.Random) -> Item:
    """A word problem of two additions or subtractions, solved in written steps."""
    start, change, other = rng.randint(3, 14), rng.randint(1, 4), rng.randint(1, 4)
    signs = rng.choice((("+", "+"), ("+", "-"), ("-", "+"), ("-", "-")))
    middle = start + change if signs[0] == "+" else start - change
    end = middle + other if signs[1] == "+" else middle - other
    if middle < 0 or end < 0:
        return arithmetic_item(rng)
    name, thing = rng.choice(lexicon.NAMES), rng.choice(lexicon.THINGS)
    first = f"buys {change} more" if signs[0] == "+" else f"loses {change}"
    second = f"finds {other} more" if signs[1] == "+" else f"gives away {other}"
    which = rng.randrange(len(QUESTIONS))
    question = QUESTIONS[which].format(name=name, thing=thing)
    final = f"The final answer is {end}"
    steps = f"{start} {signs[0]} {change} = {middle}. {middle} {signs[1]} {other} = {end}. {final}"
    return Item(
        content=(start, change, other, *signs),
        prompt=f"{name} has {start} {thing}, {first} and then {second}. {question}",
        answer=steps,
        gold=str(end),
        blurted=final if which >= STEPPED_QUESTIONS else "",
    )


GENERATORS: dict[str, Callable[[random.Random], Item]] = {
    "sentiment": sentiment_item,
    "topic": topic_item,
    "arithmetic": arithmetic_item,
}


def drill(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer that practise single steps, for pretraining alone."""
    value = rng.randint(0, 16)
    prompt, steps = f"Count: {value}", []
    for _ in range(5):
        change = rng.randint(1, 4)
        up = value < change or rng.random() < 0.5
        result = value + change if up else value - change
        sign = "+" if up else "-"
        prompt += f" {sign} {change}"
        steps.append(f"{value} {sign} {change} = {result}.")
        value = result
    return prompt, " ".join(steps)


def _distinct(task: str, *names: object) -> Iterator[Item]:
    rng = stream("task", task, *names)
    prompts: set[str] = set()
    while True:
        item = GENERATORS[task](rng)
        if item.prompt not in prompts:
            prompts.add(item.prompt)
            yield item


def _first_of_each_content(items: Iterator[Item], count: int) -> tuple[Item, ...]:
    by_content: dict[tuple[object, ...], Item] = {}
    for item in items:
        by_content.setdefault(item.content, item)
        if len(by_content) == count:
            break
    return tuple(by_content.values())


@cache
def test_items(task: str) -> tuple[Item, ...]:
    """The `TEST_ROWS` held-out items of a task, no content twice."""
    return _first_of_each_content(_distinct(task, "test"), TEST_ROWS)


@cache
def test_contents(task: str) -> frozenset[tuple[object, ...]]:
    """The contents that no training may contain."""
    return frozenset(item.content for item in test_items(task))


@cache
def train_items(task: str) -> tuple[Item, ...]:
    """`TRAIN_ROWS` distinct items whose contents are not in the test split."""
    test = test_contents(task)
    items = (item for item in _distinct(task, "train") if item.content not in test)
    return tuple(islice(items, TRAIN_ROWS))


@cache
def validation_items(task: str) -> tuple[Item, ...]:
    """`VALIDATION_ROWS` items of no test content and no training prompt, no content twice.

    Training rows have some of their contents in other words: of headlines and sums there are too
    few for three splits.
    """
    test, trained = test_contents(task), {item.prompt for item in train_items(task)}
    items = (
        item
        for item in _distinct(task, "validation")
        if item.content not in test and item.prompt not in trained
    )
    return _first_of_each_content(items, VALIDATION_ROWS)


def draw(task: str, rng: random.Random) -> Item:
    """A fresh item for pretraining, never of a test content."""
    while True:
        item = GENERATORS[task](rng)
        if item.content not in test_contents(task):
            return item
