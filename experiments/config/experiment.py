"""From a composed Hydra configuration to a validated experiment, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, field_validator

from attacks.base import Attack
from attacks.given import Given
from data.rows import TaskSource
from defenses.base import Defense
from experiments.config.evaluation import Evaluation, EvaluationSettings, build_evaluation
from experiments.config.model import ModelSettings
from experiments.config.options import Options
from experiments.config.runtime import Runtime
from experiments.config.sources import Sources, build_sources, check_validation
from experiments.results.objective import Objective, build_objective
from modeling.alignment import Alignment
from settings import Seed, SettingError, Settings, build, first_line, plain

PROJECT = Path(__file__).resolve().parents[2]
CONF = PROJECT / "conf"

Node = dict[str, Any]


class ProtocolSettings(Settings):
    """The `protocol` section: how a paper's tasks are read and its poison is counted."""

    name: str
    tasks: dict[str, Node] = Field(default_factory=dict)
    poison: Node = Field(default_factory=dict)


class StoreSettings(Settings):
    """The `store` section: the folder of all stages."""

    root: str = Field(min_length=1)


class ExperimentSettings(Settings):
    """The top level of the configuration; a `Node` is built later, by its `_target_`.

    Attributes:
        seed: Seeds the attack: which rows, their order, and a fresh adapter's start.
        data: Folders of local files of tasks (root) and of prompt sets; None: the hub.
        tasks: What differs from the files of `conf/task`, by option; `prompts` and `judges` say
            it of their groups.
        plugins: Packages besides this project's that a `_target_` may come from.
    """

    seed: Seed
    model: ModelSettings
    align: Alignment
    attack: Node
    refine: Node | None = None
    defense: Node
    evaluation: EvaluationSettings
    protocol: ProtocolSettings
    sources: Node
    data: dict[str, str | None] = Field(default_factory=dict)
    tasks: dict[str, Node] = Field(default_factory=dict)
    prompts: dict[str, Node] = Field(default_factory=dict)
    judges: dict[str, Node] = Field(default_factory=dict)
    tracker: Node
    objective: Node | None = None
    store: StoreSettings
    runtime: Runtime
    plugins: tuple[str, ...] = ()

    @field_validator("plugins")
    @classmethod
    def _are_there(cls, plugins: tuple[str, ...]) -> tuple[str, ...]:
        for name in plugins:
            if not name.isidentifier() or find_spec(name) is None:
                raise ValueError(
                    f"plugins=[{','.join(plugins)}]: there is no package {name!r}; write the top "
                    "name of one that is installed, in the current folder or in PYTHONPATH"
                )
        return plugins


@dataclass(frozen=True, slots=True)
class Experiment:
    """A validated experiment, ready to run.

    Attributes:
        labels: Names of what was chosen, for tables; "" where nothing was.
        tasks: By name, the attack's, those scored, and that of `refine`.
        resolved: The whole configuration as the objects were built from it.
    """

    seed: int
    model: ModelSettings
    align: Alignment
    attack: Attack
    refine: Attack | None
    defense: Defense
    labels: dict[str, str]
    evaluation: Evaluation
    sources: Sources
    tasks: dict[str, TaskSource]
    tracker: Any
    store: Path
    runtime: Runtime
    objective: Objective | None
    resolved: dict[str, Any]


def register_resolvers() -> None:
    """`${project:PATH}` is PATH inside the project, wherever the command is run from.

    `${local:PATH,NAME}` is the folder PATH inside the project where it is there, else NAME.
    """

    def local(path: str, name: str) -> str:
        return str(PROJECT / path) if (PROJECT / path).is_dir() else name

    OmegaConf.register_new_resolver("local", local, use_cache=False, replace=True)
    OmegaConf.register_new_resolver(
        "project", lambda path: str(PROJECT / path), use_cache=False, replace=True
    )


def validate(
    config: DictConfig, choices: Mapping[str, str], conf: Sequence[Path] = (CONF,)
) -> Experiment:
    """Builds every object of an experiment from its configuration.

    `choices` are the options of the configuration groups, for names in tables; tasks and a stack's
    parts are looked up by name in the folders `conf`.

    Raises:
        SettingError: A name, type, range or combination is wrong; one sentence.
    """
    values = _resolved(config)
    settings = ExperimentSettings.validated(plain(values), "")
    plugins = settings.plugins
    options = Options(values, plugins, conf)
    attack = build(settings.attack, "attack", plugins, Attack)
    refine = build(settings.refine, "refine", plugins, Attack) if settings.refine else None
    model = settings.model.resolved(resumes=not attack.needs_full_weights)
    values["model"]["alignment"] = model.alignment
    defense = options.defense()
    _check_refine(refine, attack, defense)
    tasks = {}
    if attack.task is not None:
        tasks[attack.task] = options.task(attack.task, "attack.task")
    if refine is not None and refine.task is not None and refine.task not in tasks:
        tasks[refine.task] = options.task(refine.task, "refine.task")
    scored = tuple(name for name in tasks if name == attack.task and tasks[name].scored)
    evaluation = build_evaluation(settings.evaluation, model, scored, options)
    for name in evaluation.tasks:
        if name not in tasks:
            tasks[name] = options.task(name, "evaluation.tasks")
        if not tasks[name].scored:
            raise SettingError(
                f"evaluation.tasks: {name} has no answers to be scored by; leave it out"
            )
    sources = build_sources(settings.sources, plugins)
    if evaluation.split == "validation":
        asked = {name: tasks[name] for name in evaluation.tasks}
        check_validation(sources, evaluation.prompt_sets, asked)
    objective = build_objective(settings.objective, plugins)
    if objective is not None:
        missing = _missing(sources, evaluation.safe_system, refine)
        objective.check(evaluation.tasks, evaluation.further, missing)
    return Experiment(
        seed=settings.seed,
        model=model,
        align=settings.align,
        attack=attack,
        refine=refine,
        defense=defense,
        labels=_labels(settings, choices, model, attack, defense),
        evaluation=evaluation,
        sources=sources,
        tasks=tasks,
        tracker=build(settings.tracker, "tracker", plugins),
        store=Path(settings.store.root),
        runtime=settings.runtime,
        objective=objective,
        resolved=values,
    )


def _resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration with its interpolations resolved, as plain dicts and lists."""
    fields = ExperimentSettings.model_fields.items()
    missing = [name for name, field in fields if field.is_required() and name not in config]
    if missing:
        # Before what refers to them fails for want of them.
        raise SettingError(f"{missing[0]} is missing; leave out ~{missing[0]}, or set it")
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise SettingError(f"{error.full_key} is missing; set it") from None
    except OmegaConfBaseException as error:
        raise SettingError(first_line(error)) from None
    if not isinstance(resolved, dict):
        raise SettingError("the configuration is empty; start from conf/config.yaml")
    return {str(key): value for key, value in resolved.items()}


def _labels(
    settings: ExperimentSettings,
    choices: Mapping[str, str],
    model: ModelSettings,
    attack: Attack,
    defense: Defense,
) -> dict[str, str]:
    """Names of the choices for tables; a choice that nothing depends on is ""."""
    own = model.alignment == "own"
    return {
        "model": model.name,
        "align": choices.get("align", "own") if own else "",
        "attack": choices.get("attack", type(attack).__name__),
        "task": attack.task or "",
        "defense": choices.get("defense", type(defense).__name__),
        "refine": choices.get("attack@refine") or "",
        "protocol": settings.protocol.name,
        "experiment": choices.get("experiment") or "",
        "objective": choices.get("objective") or "",
        "split": "" if settings.evaluation.split == "test" else "validation",
    }


def _missing(sources: Sources, safe_system: str | None, refine: Attack | None) -> dict[str, str]:
    """Models and sets that there won't be, and the setting that makes them."""
    roles = ("benign", "over_refusal", "held_out")
    missing = {role: f"set sources.{role}" for role in roles if getattr(sources, role) is None}
    if safe_system is None:
        missing["harmful_safe_system"] = "set evaluation.safe_system=true"
    if refine is None:
        missing["refined"] = "name a fine-tuning in attack@refine"
    return missing


def _check_refine(refine: Attack | None, attack: Attack, defense: Defense) -> None:
    if isinstance(refine, Given):
        raise SettingError(
            "attack@refine=given trains nothing; choose a fine-tuning, such as benign_ft"
        )
    if refine is None or refine.needs_full_weights:
        return
    full = attack.writes_full_weights
    if full or defense.output_form in ("weights", "hooks"):
        raise SettingError(
            "refine.adapter=resume goes on training an adapter, and "
            f"{'attack.adapter=full' if full else 'this defense'} leaves none; "
            "set refine.adapter=fresh"
        )
