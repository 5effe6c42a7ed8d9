"""Everything an experiment reads, read before anything heavy starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attacks.base import Attack, AttackData
from data.local import hash_rows, take
from data.rows import Example, PreferencePair, Prompt, TaskItem
from experiments.config.experiment import Experiment
from experiments.pipeline.prompt_sets import PromptSet, first_rows, prompt_sets
from experiments.pipeline.splits import (
    HELD_OUT,
    TASK,
    VALIDATION,
    LeakFilter,
    prompts_of,
    read_test_split,
    read_validation_split,
)
from settings import SettingError

_HELD_OUT_LIMIT = f"evaluation.limits.{HELD_OUT}"

# Where what a defense needs comes from.
_CALIBRATION = {
    "prompts": "calibration",
    "safety_pairs": "safety_pairs",
    "safety_prompts": "safety_prompts",
    "utility_prompts": "utility_prompts",
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read for one experiment, leaked rows already dropped.

    Attributes:
        attack: Rows the attack may draw on.
        refine: Rows that the fine-tuning of the defended model may draw on; None without one.
        sft: Alignment's supervised rows; empty if the aligned model is given.
        pairs: Alignment's preference pairs; likewise.
        calibration: Prompts for the defense; empty if it needs none.
        safety_pairs: Pairs of a safe and an unsafe answer for the defense; likewise.
        safety_prompts: Harmful prompts by category for the defense; likewise.
        utility_prompts: Benign prompts for the defense; likewise.
        sets: What every model is asked.
        items: Test items by task name.
        held_out: Benign texts whose likelihood is measured; empty where none are set.
        provenance: Name, row count and fingerprint of every source, and the leakage counts.
    """

    attack: AttackData
    refine: AttackData | None
    sft: tuple[Example, ...]
    pairs: tuple[PreferencePair, ...]
    calibration: tuple[Prompt, ...]
    safety_pairs: tuple[PreferencePair, ...]
    safety_prompts: tuple[Prompt, ...]
    utility_prompts: tuple[Prompt, ...]
    sets: tuple[PromptSet, ...]
    items: dict[str, tuple[TaskItem, ...]]
    held_out: tuple[Example, ...]
    provenance: dict[str, Any]


def read_inputs(experiment: Experiment) -> Inputs:
    """Reads every source that the experiment's stages will use.

    Rows that train or calibrate and whose prompt the evaluation asks are dropped, whatever the
    evaluation's limits are, so that a model doesn't depend on how it is measured. Where the
    validation split is asked, the test split's prompts are dropped from it, and the rows that
    train or calibrate have neither split's.

    Raises:
        DataError: A source is missing or too small.
        SettingError: A source that is needed isn't set.
    """
    sources, test = experiment.sources, read_test_split(experiment)
    asked, dropped = test, dict[str, int]()
    if experiment.evaluation.split == VALIDATION:
        asked, dropped = read_validation_split(experiment).without(test.texts)
    leaks = LeakFilter([*test.texts, *(asked.texts if asked is not test else ())])
    attack = _attack_data(experiment, experiment.attack, leaks, "")
    refine = None
    if experiment.refine is not None:
        refine = _attack_data(experiment, experiment.refine, leaks, "refine ")
    aligns, align = experiment.model.alignment == "own", experiment.align
    sft: Sequence[Example] = ()
    if aligns and align.sft:
        sft = leaks("sft", _examples(experiment, "sft"))
        sft = take(sft, align.n_sft, "sources.sft", "align.n_sft")
    pairs: Sequence[PreferencePair] = ()
    if aligns and align.preference:
        need = "align.preference needs preference pairs"
        pairs = leaks("pairs", _pairs(experiment, "pairs", need))
        pairs = take(pairs, align.n_pairs, "sources.pairs", "align.n_pairs")
    needs, chosen = experiment.defense.needs, f"defense={experiment.labels['defense']}"
    calibration = prompts_of(sources.calibration) if "prompts" in needs else ()
    calibration = leaks("calibration", calibration)
    safety_pairs: Sequence[PreferencePair] = ()
    if "safety_pairs" in needs:
        need = f"{chosen} needs pairs of a safe and an unsafe answer"
        safety_pairs = leaks("safety_pairs", _pairs(experiment, "safety_pairs", need))
    prompts = {
        name: leaks(name, _defense_prompts(experiment, name, f"{chosen} needs {kind} prompts"))
        for name, kind in (("safety_prompts", "harmful"), ("utility_prompts", "benign"))
        if name in needs
    }
    return Inputs(
        attack=attack,
        refine=refine,
        sft=tuple(sft),
        pairs=tuple(pairs),
        calibration=calibration,
        safety_pairs=tuple(safety_pairs),
        safety_prompts=prompts.get("safety_prompts", ()),
        utility_prompts=prompts.get("utility_prompts", ()),
        sets=prompt_sets(experiment, asked),
        items=asked.items,
        held_out=first_rows(asked.held_out, experiment.evaluation.limits.held_out, _HELD_OUT_LIMIT),
        provenance={
            "sources": _provenance(experiment, asked.items),
            "leaked_rows_dropped": leaks.dropped,
            **({"test_prompts_dropped": dropped} if asked is not test else {}),
        },
    )


def _attack_data(
    experiment: Experiment, attack: Attack, leaks: LeakFilter, prefix: str
) -> AttackData:
    """The rows of an attack, without those that the evaluation asks; counted by name."""
    task = experiment.tasks[attack.task].train() if attack.needs_task else ()
    poison = _examples(experiment, "poison") if attack.needs_poison else ()
    names = [f"{prefix}{kind}" for kind in ("task", "poison")]
    rows = AttackData(leaks(names[0], task), leaks(names[1], poison))
    return replace(rows, leaked=sum(leaks.dropped[name] for name in names))


def _source(
    experiment: Experiment,
    name: str,
    kind: str,
    columns: str,
    need: str = "the experiment needs it",
) -> Any:
    """A source of rows that must be set.

    Raises:
        SettingError: It isn't.
    """
    source = getattr(experiment.sources, name)
    if source is None:
        raise SettingError(
            f"sources.{name} is null, but {need}; set it to a source of {kind}, e.g. a JSONL file "
            f"of {columns}"
        )
    return source


def _examples(experiment: Experiment, name: str) -> Sequence[Example]:
    rows: Sequence[Example] = _source(experiment, name, "rows", "prompt and response").examples()
    return rows


def _pairs(experiment: Experiment, name: str, need: str) -> Sequence[PreferencePair]:
    source = _source(experiment, name, "pairs", "prompt, chosen and rejected", need)
    pairs: Sequence[PreferencePair] = source.pairs()
    return pairs


def _defense_prompts(experiment: Experiment, name: str, need: str) -> tuple[Prompt, ...]:
    return prompts_of(_source(experiment, name, "prompts", "prompt and category", need))


def _needs_poison(experiment: Experiment) -> bool:
    attacks = (experiment.attack, experiment.refine)
    return any(attack is not None and attack.needs_poison for attack in attacks)


def _provenance(experiment: Experiment, items: dict[str, tuple[TaskItem, ...]]) -> dict[str, Any]:
    split = experiment.evaluation.split
    asked = experiment.sources.asked(split)
    sources: dict[str, Any] = {
        "harmful": asked.harmful,
        "benign": asked.benign,
        "over_refusal": asked.over_refusal,
        HELD_OUT: asked.held_out,
        **{
            role: getattr(experiment.sources, role)
            for need, role in _CALIBRATION.items()
            if need in experiment.defense.needs
        },
        "poison": experiment.sources.poison if _needs_poison(experiment) else None,
        **experiment.evaluation.prompt_sets,
        **{f"{TASK}:{name}": task for name, task in experiment.tasks.items()},
    }
    provenance = {
        role: {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            **(source.provenance() if hasattr(source, "provenance") else {}),
        }
        for role, source in sources.items()
        if source is not None
    }
    for name, asked_items in items.items() if split == VALIDATION else ():
        validation = {"n_validation": len(asked_items), "validation": hash_rows(asked_items)}
        provenance[f"{TASK}:{name}"] |= validation
    return provenance
