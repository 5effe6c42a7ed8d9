"""Everything an experiment reads, read before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attacks.base import AttackData
from data.leakage import drop_leaked
from data.local import take
from data.rows import Example, PreferencePair, Prompt, TaskItem
from experiments.configuration import Experiment
from settings import SettingError

HARMFUL, HARMFUL_SAFE_SYSTEM = "harmful", "harmful_safe_system"
BENIGN, OVER_REFUSAL, TASK = "benign", "over_refusal", "task"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts that every model answers.

    Attributes:
        name: "harmful", "benign", "over_refusal", "harmful_safe_system", or "task:NAME".
        prompts: The prompts.
        max_new_tokens: Length limit of the answers.
        system: A system line, or None.
    """

    name: str
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read for one experiment, leaked rows already dropped.

    Attributes:
        attack: Rows the attack may draw on.
        sft: Alignment's supervised rows; empty if the aligned model is given.
        pairs: Alignment's preference pairs; likewise.
        calibration: Prompts for the defense.
        safety_pairs: Pairs of a safe and an unsafe answer for the defense; empty if it needs none.
        safety_prompts: Harmful prompts by category for the defense; likewise.
        utility_prompts: Benign prompts for the defense; likewise.
        sets: What every model is asked.
        items: Test items by task name.
        provenance: Name, row count and fingerprint of every source, and the leakage counts.
    """

    attack: AttackData
    sft: tuple[Example, ...]
    pairs: tuple[PreferencePair, ...]
    calibration: tuple[Prompt, ...]
    safety_pairs: tuple[PreferencePair, ...]
    safety_prompts: tuple[Prompt, ...]
    utility_prompts: tuple[Prompt, ...]
    sets: tuple[PromptSet, ...]
    items: dict[str, tuple[TaskItem, ...]]
    provenance: dict[str, Any]


def read_inputs(experiment: Experiment) -> Inputs:
    """Reads every source that the experiment's stages will use.

    Rows that train or calibrate and whose prompt the evaluation asks are dropped, whatever the
    evaluation's limits are, so that a model doesn't depend on how it is measured.

    Raises:
        DataError: A source is missing or too small.
        SettingError: A source that is needed isn't set.
    """
    sources, tasks = experiment.sources, experiment.tasks
    asked = {
        HARMFUL: _prompts(sources.harmful),
        BENIGN: _prompts(sources.benign),
        OVER_REFUSAL: _prompts(sources.over_refusal),
    }
    items = {name: tuple(tasks[name].test()) for name in experiment.evaluation.tasks}
    texts = [prompt.text for prompts in asked.values() for prompt in prompts]
    texts += [item.prompt for tested in items.values() for item in tested]
    cleaner = _Cleaner(texts)
    poison = _examples(experiment, "poison") if experiment.attack.needs_poison else ()
    task = cleaner("task", tasks[experiment.attack.task].train())
    poison = cleaner("poison", poison)
    aligns, align = experiment.model.aligned is None, experiment.align
    sft: Sequence[Example] = ()
    if aligns and align.sft:
        sft = cleaner("sft", _examples(experiment, "sft"))
        sft = take(sft, align.n_sft, "sources.sft", "align.n_sft")
    pairs: Sequence[PreferencePair] = ()
    if aligns and align.dpo:
        pairs = cleaner("pairs", _pairs(experiment, "pairs", "align.dpo needs preference pairs"))
        pairs = take(pairs, align.n_pairs, "sources.pairs", "align.n_pairs")
    calibration = cleaner("calibration", _prompts(sources.calibration))
    safety_pairs: Sequence[PreferencePair] = ()
    needs, chosen = experiment.defense.needs, f"defense={experiment.labels['defense']}"
    if "safety_pairs" in needs:
        need = f"{chosen} needs pairs of a safe and an unsafe answer"
        safety_pairs = cleaner("safety_pairs", _pairs(experiment, "safety_pairs", need))
    prompts = {
        name: cleaner(name, _defense_prompts(experiment, name, f"{chosen} needs {kind} prompts"))
        for name, kind in (("safety_prompts", "harmful"), ("utility_prompts", "benign"))
        if name in needs
    }
    leaked = cleaner.dropped
    return Inputs(
        attack=AttackData(task, poison, leaked["task"] + leaked["poison"]),
        sft=tuple(sft),
        pairs=tuple(pairs),
        calibration=calibration,
        safety_pairs=tuple(safety_pairs),
        safety_prompts=prompts.get("safety_prompts", ()),
        utility_prompts=prompts.get("utility_prompts", ()),
        sets=_sets(experiment, asked, items),
        items=items,
        provenance={"sources": _provenance(experiment), "leaked_rows_dropped": leaked},
    )


class _Cleaner:
    """Drops rows whose prompt is among the evaluation's, and counts them by source."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked = asked
        self.dropped: dict[str, int] = {}

    def __call__(self, name: str, rows: Iterable[Any]) -> tuple[Any, ...]:
        kept, self.dropped[name] = drop_leaked(list(rows), self.asked)
        return tuple(kept)


def _prompts(source: Any) -> tuple[Prompt, ...]:
    return () if source is None else tuple(source.prompts())


def _examples(experiment: Experiment, name: str) -> Sequence[Example]:
    source = getattr(experiment.sources, name)
    if source is None:
        raise SettingError(
            f"sources.{name} is null, but the experiment needs it; "
            f"set it to a source of rows, e.g. a JSONL file of prompt and response"
        )
    return source.examples()


def _pairs(experiment: Experiment, name: str, need: str) -> Sequence[PreferencePair]:
    source = getattr(experiment.sources, name)
    if source is None:
        raise SettingError(
            f"sources.{name} is null, but {need}; set it to a source of pairs, e.g. a JSONL file "
            "of prompt, chosen and rejected"
        )
    return source.pairs()


def _defense_prompts(experiment: Experiment, name: str, need: str) -> tuple[Prompt, ...]:
    source = getattr(experiment.sources, name)
    if source is None:
        raise SettingError(
            f"sources.{name} is null, but {need}; set it to a source of prompts, e.g. a JSONL file "
            "of prompt and category"
        )
    return _prompts(source)


def _sets(
    experiment: Experiment,
    asked: dict[str, tuple[Prompt, ...]],
    items: dict[str, tuple[TaskItem, ...]],
) -> tuple[PromptSet, ...]:
    limits, length = experiment.evaluation.limits, experiment.model.max_new_tokens
    sets = [
        PromptSet(
            name, _limited(prompts, getattr(limits, name), f"evaluation.limits.{name}"), length
        )
        for name, prompts in asked.items()
        if prompts
    ]
    if experiment.evaluation.safe_system is not None:
        sets.append(
            PromptSet(
                HARMFUL_SAFE_SYSTEM, sets[0].prompts, length, experiment.evaluation.safe_system
            )
        )
    for name, tested in items.items():
        prompts = tuple(Prompt(item.id, item.prompt) for item in tested)
        limited = _limited(prompts, limits.task, "evaluation.limits.task")
        sets.append(PromptSet(f"{TASK}:{name}", limited, experiment.tasks[name].max_new_tokens))
    return tuple(sets)


def _limited(prompts: tuple[Prompt, ...], limit: int | None, setting: str) -> tuple[Prompt, ...]:
    if limit is not None and limit > len(prompts):
        raise SettingError(
            f"{setting}={limit} is more than the {len(prompts)} prompts there are; lower it"
        )
    return prompts[:limit]


def _provenance(experiment: Experiment) -> dict[str, Any]:
    sources: dict[str, Any] = {
        "harmful": experiment.sources.harmful,
        "benign": experiment.sources.benign,
        "over_refusal": experiment.sources.over_refusal,
        "calibration": experiment.sources.calibration,
        **{
            name: getattr(experiment.sources, name)
            for name in ("safety_pairs", "safety_prompts", "utility_prompts")
            if name in experiment.defense.needs
        },
        "poison": experiment.sources.poison if experiment.attack.needs_poison else None,
        **{f"{TASK}:{name}": task for name, task in experiment.tasks.items()},
    }
    return {
        role: {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            **(source.provenance() if hasattr(source, "provenance") else {}),
        }
        for role, source in sources.items()
        if source is not None
    }
