"""Everything an experiment reads, read before anything heavy starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attacks.base import Attack, AttackData
from data.local import hash_rows, take
from data.own_answers import OwnRows, open_prompts, with_answers
from data.rows import Example, PreferencePair, Prompt, TaskItem
from experiments.config.experiment import Experiment
from experiments.pipeline.prompt_sets import (
    HELD_OUT,
    TASK,
    VALIDATION,
    LeakFilter,
    PromptSet,
    first_rows,
    prompt_sets,
    prompts_of,
    read_test_split,
    read_validation_split,
    telling_leaks,
)
from settings import SettingError

_HELD_OUT_LIMIT = f"evaluation.limits.{HELD_OUT}"

# The rows of both attacks that are harmful; other groups are attributes of `Inputs`.
POISON = "poison"

# Of what a defense needs: how it is read from the source of its name, and what it is.
_NEEDS = {
    "safety_pairs": ("pairs", "pairs of a safe and an unsafe answer"),
    "safety_prompts": ("prompts", "harmful prompts"),
    "utility_prompts": ("prompts", "benign prompts"),
}
# What a source that is read so holds, and in which columns.
_COLUMNS = {
    "examples": ("rows", "prompt and response"),
    "pairs": ("pairs", "prompt, chosen and rejected"),
    "prompts": ("prompts", "prompt and category"),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read for one experiment, leaked rows already dropped.

    Rows that nothing needs aren't read: alignment's where the aligned model is given, those of the
    defense that it doesn't name. `provenance` has name, row count and fingerprint of every source,
    and the leakage counts. `own` are the sources with answers of the base's own, by name.
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
    own: dict[str, OwnRows] = field(default_factory=dict)

    def open_prompts(self, name: str) -> tuple[str, ...]:
        """The prompts of a source's rows that the base is to answer."""
        attacks = [attack for attack in (self.attack, self.refine) if attack is not None]
        poison = [row for attack in attacks for row in attack.poison]
        return open_prompts(poison if name == POISON else getattr(self, name))

    def with_answers(self, name: str, answers: Mapping[str, str]) -> Inputs:
        """These inputs with the base's answers in a source's rows; see `data.own_answers`."""

        def answered(data: AttackData) -> AttackData:
            return replace(data, poison=with_answers(data.poison, answers))

        if name == POISON:
            refine = self.refine and answered(self.refine)
            return replace(self, attack=answered(self.attack), refine=refine)
        rows: Any = {name: with_answers(getattr(self, name), answers)}
        return replace(self, **rows)


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
    test = read_test_split(experiment)
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
        sft = leaks("sft", _rows(experiment, "sft", "examples"))
        with telling_leaks({"sources.sft": leaks.dropped["sft"]}):
            sft = take(sft, align.n_sft, "sources.sft", "align.n_sft")
    pairs: Sequence[PreferencePair] = ()
    if aligns and align.preference:
        need = "align.preference needs preference pairs"
        pairs = leaks("pairs", _rows(experiment, "pairs", "pairs", need))
        with telling_leaks({"sources.pairs": leaks.dropped["pairs"]}):
            pairs = take(pairs, align.n_pairs, "sources.pairs", "align.n_pairs")
    rows = read_calibration(experiment, leaks)
    poison = (*attack.poison, *(refine.poison if refine else ()))
    trained = {POISON: poison, "sft": sft, "pairs": pairs, "safety_pairs": rows["safety_pairs"]}
    sources = {name: getattr(experiment.sources, name) for name, some in trained.items() if some}
    return Inputs(
        attack=attack,
        refine=refine,
        sft=tuple(sft),
        pairs=tuple(pairs),
        calibration=rows["prompts"],
        safety_pairs=rows["safety_pairs"],
        safety_prompts=rows["safety_prompts"],
        utility_prompts=rows["utility_prompts"],
        sets=prompt_sets(experiment, asked),
        items=asked.items,
        held_out=first_rows(asked.held_out, experiment.evaluation.limits.held_out, _HELD_OUT_LIMIT),
        provenance={
            "sources": _provenance(experiment, asked.items),
            "leaked_rows_dropped": leaks.dropped,
            **({"test_prompts_dropped": dropped} if asked is not test else {}),
        },
        own={name: source for name, source in sources.items() if isinstance(source, OwnRows)},
    )


def read_calibration(experiment: Experiment, leaks: LeakFilter) -> dict[str, tuple[Any, ...]]:
    """What the defense `needs`, by its names; () of what it doesn't.

    Raises:
        DataError: A source is missing.
        SettingError: A source that is needed isn't set.
    """
    needs, chosen = experiment.defense.needs, f"defense={experiment.labels['defense']}"
    prompts = prompts_of(experiment.sources.calibration) if "prompts" in needs else ()
    rows = {"prompts": leaks("calibration", prompts), **dict.fromkeys(_NEEDS, ())}
    for name, (method, what) in _NEEDS.items():
        if name in needs:
            rows[name] = leaks(name, _rows(experiment, name, method, f"{chosen} needs {what}"))
    return rows


def _attack_data(
    experiment: Experiment, attack: Attack, leaks: LeakFilter, prefix: str
) -> AttackData:
    """The rows of an attack, without those that the evaluation asks; counted by name."""
    task = experiment.tasks[attack.task].train() if attack.task and attack.needs_task else ()
    poison = _rows(experiment, "poison", "examples") if attack.needs_poison else ()
    names = [f"{prefix}{kind}" for kind in ("task", "poison")]
    rows = AttackData(leaks(names[0], task), leaks(names[1], poison))
    return replace(rows, leaked=sum(leaks.dropped[name] for name in names))


def _rows(
    experiment: Experiment, name: str, method: str, need: str = "the experiment needs it"
) -> Sequence[Any]:
    """The rows of a source that must be set.

    Raises:
        SettingError: It isn't.
    """
    source = getattr(experiment.sources, name)
    if source is None:
        kind, columns = _COLUMNS[method]
        raise SettingError(
            f"sources.{name} is null, but {need}; set it to a source of {kind}, e.g. a JSONL file "
            f"of {columns}"
        )
    rows: Sequence[Any] = getattr(source, method)()
    return rows


def _provenance(experiment: Experiment, items: dict[str, tuple[TaskItem, ...]]) -> dict[str, Any]:
    split = experiment.evaluation.split
    asked = experiment.sources.asked(split)
    attacks = [attack for attack in (experiment.attack, experiment.refine) if attack is not None]
    poisons = any(attack.needs_poison for attack in attacks)
    sources: dict[str, Any] = {
        "harmful": asked.harmful,
        "benign": asked.benign,
        "over_refusal": asked.over_refusal,
        HELD_OUT: asked.held_out,
        **{
            role: getattr(experiment.sources, role)
            for need, role in {"prompts": "calibration", **{n: n for n in _NEEDS}}.items()
            if need in experiment.defense.needs
        },
        "poison": experiment.sources.poison if poisons else None,
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
