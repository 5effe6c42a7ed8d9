"""Everything an experiment reads, read before anything heavy starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from attacks.base import Attack, AttackData
from attacks.prompts import Asked, AttackPrompt
from data.leakage import drop_leaked, normalise
from data.local import hash_rows, take
from data.rows import Example, PreferencePair, Prompt, TaskItem
from data.tasks import ValidatedTask
from experiments.config.experiment import Experiment
from experiments.config.sources import AskedSources, Split
from settings import DataError, SettingError

HARMFUL, HARMFUL_SAFE_SYSTEM = "harmful", "harmful_safe_system"
BENIGN, OVER_REFUSAL, TASK = "benign", "over_refusal", "task"
HELD_OUT = "held_out"
VALIDATION: Split = "validation"
_HELD_OUT_LIMIT = f"evaluation.limits.{HELD_OUT}"
_Row = TypeVar("_Row")

# Where what a defense needs comes from.
_CALIBRATION = {
    "prompts": "calibration",
    "safety_pairs": "safety_pairs",
    "safety_prompts": "safety_prompts",
    "utility_prompts": "utility_prompts",
}


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts that every model answers.

    Attributes:
        name: "harmful", "benign", "over_refusal", "harmful_safe_system", one of the further sets
            as "ROLE:NAME", the harmful prompts under an attack prompt as "harmful+NAME", or
            "task:NAME".
        prompts: The prompts, as judges see them.
        max_new_tokens: Length limit of the answers.
        system: A system line, or None.
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
    sources, test = experiment.sources, _test_split(experiment)
    asked, dropped = test, dict[str, int]()
    if experiment.evaluation.split == VALIDATION:
        asked, dropped = _validation_split(experiment).without(test.texts)
    cleaner = _Cleaner([*test.texts, *(asked.texts if asked is not test else ())])
    attack = _attack_data(experiment, experiment.attack, cleaner, "")
    refine = None
    if experiment.refine is not None:
        refine = _attack_data(experiment, experiment.refine, cleaner, "refine ")
    aligns, align = experiment.model.alignment == "own", experiment.align
    sft: Sequence[Example] = ()
    if aligns and align.sft:
        sft = cleaner("sft", _examples(experiment, "sft"))
        sft = take(sft, align.n_sft, "sources.sft", "align.n_sft")
    pairs: Sequence[PreferencePair] = ()
    if aligns and align.preference:
        need = "align.preference needs preference pairs"
        pairs = cleaner("pairs", _pairs(experiment, "pairs", need))
        pairs = take(pairs, align.n_pairs, "sources.pairs", "align.n_pairs")
    needs, chosen = experiment.defense.needs, f"defense={experiment.labels['defense']}"
    calibration = _prompts(sources.calibration) if "prompts" in needs else ()
    calibration = cleaner("calibration", calibration)
    safety_pairs: Sequence[PreferencePair] = ()
    if "safety_pairs" in needs:
        need = f"{chosen} needs pairs of a safe and an unsafe answer"
        safety_pairs = cleaner("safety_pairs", _pairs(experiment, "safety_pairs", need))
    prompts = {
        name: cleaner(name, _defense_prompts(experiment, name, f"{chosen} needs {kind} prompts"))
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
        sets=_sets(experiment, asked.prompts, asked.items),
        items=asked.items,
        held_out=_limited(asked.held_out, experiment.evaluation.limits.held_out, _HELD_OUT_LIMIT),
        provenance={
            "sources": _provenance(experiment, asked.items),
            "leaked_rows_dropped": cleaner.dropped,
            **({"test_prompts_dropped": dropped} if asked is not test else {}),
        },
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """What a split asks: prompts by set, the harmful ones first; items by task; held-out texts."""

    prompts: dict[str, tuple[Prompt, ...]]
    items: dict[str, tuple[TaskItem, ...]]
    held_out: tuple[Example, ...]

    @property
    def texts(self) -> list[str]:
        """The text of everything asked."""
        texts = [prompt.text for prompts in self.prompts.values() for prompt in prompts]
        texts += [item.prompt for items in self.items.values() for item in items]
        return texts + [_held_out_text(example) for example in self.held_out]

    def without(self, texts: Iterable[str]) -> tuple[_Split, dict[str, int]]:
        """What is left when these texts are dropped, and how many were, by set.

        Raises:
            DataError: Nothing is left of a set.
        """
        unwanted, dropped = {normalise(text) for text in texts}, dict[str, int]()

        def kept(name: str, rows: Sequence[_Row], text: Callable[[_Row], str]) -> tuple[_Row, ...]:
            left = tuple(row for row in rows if normalise(text(row)) not in unwanted)
            dropped[name] = len(rows) - len(left)
            if rows and not left:
                raise DataError(
                    f"evaluation.split=validation: all {len(rows)} validation rows of {name} are "
                    "asked in the test split too; give others (sources.validation)"
                )
            return left

        split = _Split(
            {name: kept(name, rows, lambda row: row.text) for name, rows in self.prompts.items()},
            {
                name: kept(f"{TASK}:{name}", rows, lambda row: row.prompt)
                for name, rows in self.items.items()
            },
            kept(HELD_OUT, self.held_out, _held_out_text),
        )
        return split, dropped


def _held_out_text(example: Example) -> str:
    return example.prompt or example.response


def _test_split(experiment: Experiment) -> _Split:
    evaluation, tasks = experiment.evaluation, experiment.tasks
    further = {name: _prompts(source) for name, source in evaluation.prompt_sets.items()}
    items = {name: tuple(tasks[name].test()) for name in evaluation.tasks}
    return _split(experiment.sources.asked("test"), further, items)


def _validation_split(experiment: Experiment) -> _Split:
    items = {
        name: tuple(cast("ValidatedTask", experiment.tasks[name]).validation())
        for name in experiment.evaluation.tasks
    }
    return _split(experiment.sources.asked(VALIDATION), {}, items)


def _split(
    sources: AskedSources,
    further: dict[str, tuple[Prompt, ...]],
    items: dict[str, tuple[TaskItem, ...]],
) -> _Split:
    prompts = {
        HARMFUL: _prompts(sources.harmful),
        BENIGN: _prompts(sources.benign),
        OVER_REFUSAL: _prompts(sources.over_refusal),
        **further,
    }
    held_out = () if sources.held_out is None else tuple(sources.held_out.examples())
    return _Split({name: rows for name, rows in prompts.items() if rows}, items, held_out)


class _Cleaner:
    """Drops rows whose prompt is among the evaluation's, and counts them by source."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked = asked
        self.dropped: dict[str, int] = {}

    def __call__(self, name: str, rows: Iterable[Any]) -> tuple[Any, ...]:
        kept, self.dropped[name] = drop_leaked(list(rows), self.asked)
        return tuple(kept)


def _attack_data(
    experiment: Experiment, attack: Attack, cleaner: _Cleaner, prefix: str
) -> AttackData:
    """The rows of an attack, without those that the evaluation asks; counted by name."""
    task = experiment.tasks[attack.task].train() if attack.needs_task else ()
    poison = _examples(experiment, "poison") if attack.needs_poison else ()
    names = [f"{prefix}{kind}" for kind in ("task", "poison")]
    kept = AttackData(cleaner(names[0], task), cleaner(names[1], poison))
    return replace(kept, leaked=sum(cleaner.dropped[name] for name in names))


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
    sets = []
    for name, prompts in asked.items():
        kind, _, further = name.partition(":")
        limit, setting = getattr(limits, kind), f"evaluation.limits.{kind}"
        # The limits are meant for the main sets; a further one may well be smaller.
        kept = prompts[:limit] if further else _limited(prompts, limit, setting)
        sets.append(PromptSet(name, kept, length))
    harmful = sets[0].prompts
    system = experiment.evaluation.safe_system
    if system is not None:
        sets.append(PromptSet(HARMFUL_SAFE_SYSTEM, harmful, length, system))
    for prompt in attack_prompts(experiment):
        sets.append(_under(prompt, harmful, length))
    for name, tested in items.items():
        prompts = tuple(Prompt(item.id, item.prompt) for item in tested)
        limited = _limited(prompts, limits.task, "evaluation.limits.task")
        sets.append(PromptSet(f"{TASK}:{name}", limited, experiment.tasks[name].max_new_tokens))
    return tuple(sets)


def attack_prompts(experiment: Experiment) -> tuple[AttackPrompt, ...]:
    """What the harmful prompts are asked under: what was named, and the attacks' own triggers.

    Raises:
        SettingError: Two of them that differ have one name.
    """
    attacks = [attack for attack in (experiment.attack, experiment.refine) if attack]
    own = [attack.trigger for attack in attacks if attack.trigger]
    named: dict[str, AttackPrompt] = {}
    for prompt in (*experiment.evaluation.attack_prompts, *own):
        if named.setdefault(prompt.name, prompt) != prompt:
            raise SettingError(
                f"two attack prompts that differ are called {prompt.name!r}, which their figures "
                "(asr+NAME) couldn't tell apart; rename a file of evaluation.attack_prompts, or "
                "give attack and refine the same one"
            )
    return tuple(named.values())


def _under(prompt: AttackPrompt, harmful: tuple[Prompt, ...], length: int) -> PromptSet:
    asked = tuple(prompt.render(harmful))
    by_id = {entry.id: entry for entry in asked}
    kept = tuple(entry for entry in harmful if entry.id in by_id)
    in_order = tuple(by_id[entry.id] for entry in kept)
    return PromptSet(f"{HARMFUL}+{prompt.name}", kept, length, prompt.system, in_order)


def _limited(rows: tuple[_Row, ...], limit: int | None, setting: str) -> tuple[_Row, ...]:
    if rows and limit is not None and limit > len(rows):
        raise SettingError(f"{setting}={limit} is more than the {len(rows)} there are; lower it")
    return rows[:limit]


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
    found = {
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
        found[f"{TASK}:{name}"] |= validation
    return found
