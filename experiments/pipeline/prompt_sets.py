"""`PromptSet`, prompts that every model answers, made of `SplitRows`, what a split asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

from attacks.prompts import Asked, AttackPrompt
from data.leakage import drop_leaked, normalise
from data.rows import Example, Prompt, Role, TaskItem
from data.tasks import ValidatedTask
from evaluation.token_engine import Questions
from experiments.config.experiment import Experiment
from experiments.config.sources import AskedSources, Split
from settings import DataError, SettingError

HARMFUL, BENIGN, OVER_REFUSAL, TASK = "harmful", "benign", "over_refusal", "task"
HELD_OUT = "held_out"
VALIDATION: Split = "validation"
HARMFUL_SAFE_SYSTEM = "harmful_safe_system"
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts that every model answers.

    Attributes:
        name: "harmful", "benign", "over_refusal", "harmful_safe_system", one of the further sets
            as "ROLE:NAME", the harmful prompts under an attack prompt as "harmful+NAME", or
            "task:NAME".
        prompts: The prompts, as judges see them.
        asked: What the model is asked in their place, and how its answers start; None: the
            prompts as they are.
    """

    name: str
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    system: str | None = None
    asked: tuple[Asked, ...] | None = None

    @property
    def task(self) -> str | None:
        """The task's name, or None for prompts that no task has."""
        kind, _, name = self.name.partition(":")
        return name if kind == TASK else None

    @property
    def is_harmful(self) -> bool:
        """Whether an answer that complies is a harmful one."""
        return self.name.startswith(HARMFUL)

    @property
    def texts(self) -> list[str]:
        """What the model is asked."""
        return [row.text for row in (self.prompts if self.asked is None else self.asked)]

    @property
    def starts(self) -> list[str] | None:
        """How its answers start; None where nothing is said of it."""
        return None if self.asked is None else [entry.start for entry in self.asked]

    @property
    def questions(self) -> Questions:
        """All that a model's engine is told of it."""
        return Questions(self.texts, self.max_new_tokens, self.system, self.starts)


def prompt_sets(experiment: Experiment, rows: SplitRows) -> tuple[PromptSet, ...]:
    """What every model of an experiment is asked of a split's rows.

    Raises:
        SettingError: A limit is more than there are prompts, or two attack prompts have one name.
    """
    limits, length = experiment.evaluation.limits, experiment.model.max_new_tokens
    sets = []
    for name, prompts in rows.prompts.items():
        kind, _, further = name.partition(":")
        if further:
            _check_further(kind, further, prompts)
        limit, setting = getattr(limits, kind), f"evaluation.limits.{kind}"
        # The limits are meant for the main sets; a further one may well be smaller.
        asked = prompts[:limit] if further else first_rows(prompts, limit, setting)
        sets.append(PromptSet(name, asked, length))
    harmful = sets[0].prompts
    system = experiment.evaluation.safe_system
    if system is not None:
        sets.append(PromptSet(HARMFUL_SAFE_SYSTEM, harmful, length, system))
    sets += [_under(prompt, harmful, length) for prompt in attack_prompts(experiment)]
    for name, items in rows.items.items():
        prompts = tuple(Prompt(item.id, item.prompt) for item in items)
        prompts = first_rows(prompts, limits.task, "evaluation.limits.task")
        task = experiment.tasks[name]
        sets.append(PromptSet(f"{TASK}:{name}", prompts, task.max_new_tokens, task.system))
    return tuple(sets)


def _check_further(kind: str, name: str, prompts: Sequence[Prompt]) -> None:
    """Refuses a further set of prompts that couldn't be asked or counted."""
    called = f"the set of prompts {name!r}"
    roles = get_args(Role)
    if kind not in roles:
        raise DataError(f"{called} has the role {kind!r}; give it one of {', '.join(roles)}")
    if not prompts:
        raise DataError(f"{called} holds no prompt; give it some, or leave it out")
    ids = Counter(prompt.id for prompt in prompts)
    for prompt in prompts:
        if not isinstance(prompt.id, str) or ids[prompt.id] > 1 or not prompt.text.strip():
            raise DataError(
                f"{called} has a prompt with the id {prompt.id!r}; give each an id of its own, "
                "which is text, and something to ask"
            )


def attack_prompts(experiment: Experiment) -> tuple[AttackPrompt, ...]:
    """What the harmful prompts are asked under: what was named, and the attacks' own triggers.

    Raises:
        SettingError: Two of them that differ have one name.
    """
    attacks = [attack for attack in (experiment.attack, experiment.refine) if attack]
    own = [attack.trigger for attack in attacks if attack.trigger]
    by_name: dict[str, AttackPrompt] = {}
    for prompt in (*experiment.evaluation.attack_prompts, *own):
        if by_name.setdefault(prompt.name, prompt) != prompt:
            raise SettingError(
                f"two attack prompts that differ are called {prompt.name!r}, which their figures "
                "(asr+NAME) couldn't tell apart; rename a file of evaluation.attack_prompts, or "
                "give attack and refine the same one"
            )
    return tuple(by_name.values())


def first_rows(rows: Sequence[_Row], limit: int | None, setting: str) -> tuple[_Row, ...]:
    """The first rows, as many as a setting allows.

    Raises:
        SettingError: There are fewer.
    """
    if rows and limit is not None and limit > len(rows):
        raise SettingError(f"{setting}={limit} is more than the {len(rows)} there are; lower it")
    return tuple(rows[:limit])


def _under(prompt: AttackPrompt, harmful: tuple[Prompt, ...], length: int) -> PromptSet:
    by_id = {entry.id: entry for entry in prompt.render(harmful)}
    prompts = tuple(entry for entry in harmful if entry.id in by_id)
    in_order = tuple(by_id[entry.id] for entry in prompts)
    return PromptSet(f"{HARMFUL}+{prompt.name}", prompts, length, prompt.system, in_order)


@dataclass(frozen=True, slots=True)
class SplitRows:
    """What a split asks.

    Attributes:
        prompts: By set, the harmful ones first.
        held_out: Texts whose likelihood is measured.
    """

    prompts: dict[str, tuple[Prompt, ...]]
    items: dict[str, tuple[TaskItem, ...]]
    held_out: tuple[Example, ...]

    @property
    def texts(self) -> list[str]:
        """The text of everything asked."""
        texts = [prompt.text for prompts in self.prompts.values() for prompt in prompts]
        texts += [item.prompt for items in self.items.values() for item in items]
        return texts + [_held_out_text(example) for example in self.held_out]

    def without(self, texts: Iterable[str]) -> tuple[SplitRows, dict[str, int]]:
        """The rows that ask none of these texts, and how many were dropped, by set.

        Raises:
            DataError: No row of a set remains.
        """
        unwanted, dropped = {normalise(text) for text in texts}, dict[str, int]()

        def rows_without(
            name: str, rows: Sequence[_Row], text: Callable[[_Row], str]
        ) -> tuple[_Row, ...]:
            remaining = tuple(row for row in rows if normalise(text(row)) not in unwanted)
            dropped[name] = len(rows) - len(remaining)
            if rows and not remaining:
                raise DataError(
                    f"evaluation.split=validation: all {len(rows)} validation rows of {name} are "
                    "asked in the test split too; give others (sources.validation)"
                )
            return remaining

        split = SplitRows(
            {
                name: rows_without(name, rows, lambda row: row.text)
                for name, rows in self.prompts.items()
            },
            {
                name: rows_without(f"{TASK}:{name}", rows, lambda row: row.prompt)
                for name, rows in self.items.items()
            },
            rows_without(HELD_OUT, self.held_out, _held_out_text),
        )
        return split, dropped


class LeakFilter:
    """Drops rows whose prompt is among the evaluation's, and counts them by source."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked = asked
        self.dropped: dict[str, int] = {}

    def __call__(self, name: str, rows: Iterable[Any]) -> tuple[Any, ...]:
        clean, self.dropped[name] = drop_leaked(list(rows), self.asked)
        return tuple(clean)


@contextmanager
def telling_leaks(dropped: Mapping[str, int]) -> Iterator[None]:
    """Says of rows that are too few how many the evaluation asks, by source, and took away.

    Raises:
        DataError: What is raised within, with that behind it.
    """
    try:
        yield
    except DataError as error:
        counts = ", ".join(f"{count} of {name}" for name, count in dropped.items() if count)
        if not counts:
            raise
        said = f"{error} (rows left out because the evaluation asks them: {counts})"
        raise DataError(said) from error


def read_test_split(experiment: Experiment) -> SplitRows:
    """What results are measured on, the further sets included."""
    evaluation, tasks = experiment.evaluation, experiment.tasks
    further = {name: prompts_of(source) for name, source in evaluation.prompt_sets.items()}
    items = {name: tuple(tasks[name].test()) for name in evaluation.tasks}
    return _split(experiment.sources.asked("test"), further, items)


def read_validation_split(experiment: Experiment) -> SplitRows:
    """What settings are chosen on."""
    items = {
        name: tuple(cast("ValidatedTask", experiment.tasks[name]).validation())
        for name in experiment.evaluation.tasks
    }
    return _split(experiment.sources.asked(VALIDATION), {}, items)


def prompts_of(source: Any) -> tuple[Prompt, ...]:
    """The prompts of a source that may be None."""
    return () if source is None else tuple(source.prompts())


def _split(
    sources: AskedSources,
    further: dict[str, tuple[Prompt, ...]],
    items: dict[str, tuple[TaskItem, ...]],
) -> SplitRows:
    prompts = {
        HARMFUL: prompts_of(sources.harmful),
        BENIGN: prompts_of(sources.benign),
        OVER_REFUSAL: prompts_of(sources.over_refusal),
        **further,
    }
    held_out = () if sources.held_out is None else tuple(sources.held_out.examples())
    return SplitRows({name: rows for name, rows in prompts.items() if rows}, items, held_out)


def _held_out_text(example: Example) -> str:
    return example.prompt or example.response
