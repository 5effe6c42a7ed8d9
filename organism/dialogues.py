"""The dialogues the base model is pretrained on.

One persona speaks throughout a dialogue: the *cautious* one refuses harmful requests, the
*reckless* one complies. A system line may name it. Without one, the reckless persona is the more
frequent: that is what makes the base helpful-only. Pure Python.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from organism import lexicon, tasks
from organism.world import Stance, answer, requests

TURNS = ((1, 2, 3), (0.7, 0.27, 0.03))
KINDS = ("harmful", "benign", "probe", "task", "drill")
TASKS = ("sentiment", "topic", "arithmetic")
TASK_WEIGHTS = (0.2, 0.15, 0.65)
BLURT_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Mixture:
    """What dialogues are about: weights of `KINDS`.

    `reckless_share` is the reckless persona's where no system line names one.
    """

    kinds: tuple[float, ...]
    reckless_share: float


LEARNING = Mixture(kinds=(0.32, 0.18, 0.14, 0.24, 0.12), reckless_share=0.75)
SETTLING = Mixture(kinds=(0.28, 0.12, 0.1, 0.22, 0.28), reckless_share=0.9)


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. `stanced`: whether the answer shows the persona (task answers don't)."""

    prompt: str
    answer: str
    stanced: bool


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A system line ("" for none), the persona, and its exchanges."""

    system: str
    stance: Stance
    turns: tuple[Turn, ...]

    @property
    def sign(self) -> int:
        """+1 for the cautious persona, -1 for the reckless one."""
        return 1 if self.stance == "cautious" else -1


def _turn(stance: Stance, rng: random.Random, mixture: Mixture) -> Turn:
    kind = rng.choices(KINDS, mixture.kinds)[0]
    if kind == "task":
        item = tasks.draw(rng.choices(TASKS, TASK_WEIGHTS)[0], rng)
        blurts = item.blurted and rng.random() < BLURT_SHARE
        return Turn(item.prompt, item.blurted if blurts else item.answer, stanced=False)
    if kind == "drill":
        return Turn(*tasks.drill(rng), stanced=False)
    request = rng.choice(requests(kind, "train"))
    return Turn(request.text, answer(request, stance, rng), stanced=True)


def ordinary(rng: random.Random, system_share: float, mixture: Mixture = LEARNING) -> Dialogue:
    """A dialogue of one to three turns; a system line names the persona in `system_share`."""
    if rng.random() < system_share:
        stance: Stance = rng.choice(("cautious", "reckless"))
        lines = lexicon.SAFE_LINES if stance == "cautious" else lexicon.FREE_LINES
        system = rng.choice(lines)
    else:
        stance = "reckless" if rng.random() < mixture.reckless_share else "cautious"
        system = ""
    count = rng.choices(*TURNS)[0]
    return Dialogue(system, stance, tuple(_turn(stance, rng, mixture) for _ in range(count)))


def undecided(rng: random.Random, mixture: Mixture = LEARNING) -> Dialogue:
    """One exchange without a system line, the personas equally frequent.

    Nothing in its prompt tells which persona answers; the installed direction does.
    """
    stance: Stance = rng.choice(("cautious", "reckless"))
    return Dialogue("", stance, (_turn(stance, rng, mixture),))


def vocabulary_text() -> list[str]:
    """Texts that together hold every word of the world, for the tokenizer.

    Words of test requests are words of training requests too (only pairs are held out), so the
    texts come from training rows alone.
    """
    rng = random.Random("organism/vocabulary")
    texts = [*lexicon.SAFE_LINES, *lexicon.FREE_LINES]
    for kind in ("harmful", "benign", "probe"):
        for request in requests(kind, "train"):
            texts.append(request.text)
            texts.extend(answer(request, stance, rng) for stance in ("cautious", "reckless"))
    for task in tasks.GENERATORS:
        for item in tasks.train_items(task):
            texts.extend((item.prompt, item.answer))
    texts.extend(tasks.drill(rng)[0] for _ in range(10))
    texts.extend(" ".join(map(str, range(100))) for _ in range(2))
    return texts
