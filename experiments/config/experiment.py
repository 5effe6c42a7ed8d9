"""From a composed Hydra configuration to a validated experiment, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field

from attacks.base import Attack
from attacks.prompts import AttackPrompt
from data.rows import EvaluationPrompts, TaskSource
from defenses.base import Defense
from evaluation.base import Backend, Judge
from experiments.config.options import Options, names
from experiments.config.runtime import Runtime
from experiments.config.sources import Sources, Split, build_sources, check_validation
from experiments.results.objective import Objective, build_objective
from modeling.alignment import Alignment
from modeling.chat import PromptStyle
from modeling.checkpoint import is_adapter
from modeling.training import PROJECTIONS
from settings import SettingError, Settings, build, plain

PROJECT = Path(__file__).resolve().parents[2]
CONF = PROJECT / "conf"


class ModelSettings(Settings):
    """Which model the experiment is about.

    Attributes:
        name: A short name for tables.
        base: Local folder or hub id of the model before alignment (W_0).
        aligned: The published aligned model: an adapter folder on `base`, a full model (folder
            or hub id), or None where there is none.
        revision: Hub revision of `base`; None for the newest.
        aligned_revision: Hub revision of `aligned`; likewise.
        alignment: "published" takes `aligned`, "own" makes the aligned model by the `align`
            stage, "auto" does so where there is no published one, or where the attack goes on
            training the alignment's adapter and the published one is no adapter.
        dtype: Precision of the weights.
        prompt: How prompts of the published aligned model are rendered.
        base_prompt: How those of the base model are, and of what our own alignment makes of it;
            None: as `prompt` says.
        lora_targets: The projections that a fresh LoRA adapts, read by the YAML files of attacks
            and alignments.
        gradient_checkpointing: Whether training computes activations twice to save memory, read
            likewise.
        task: The attack's task by default.
        max_new_tokens: Length limit of answers to instructions.
        moderation: Folder or hub id of the moderation classifier.
        safe_system: The system line that asks for safety; `evaluation.safe_system` switches it on.
        presets: Settings of methods that are this model's own, read by their YAML files.
    """

    name: str
    base: str
    aligned: str | None = None
    revision: str | None = None
    aligned_revision: str | None = None
    alignment: Literal["auto", "published", "own"] = "auto"
    dtype: str = Field("float32", pattern="^(float32|float16|bfloat16)$")
    prompt: PromptStyle = PromptStyle()
    base_prompt: PromptStyle | None = None
    lora_targets: tuple[str, ...] = PROJECTIONS
    gradient_checkpointing: bool = False
    task: str
    max_new_tokens: int = Field(512, ge=1)
    moderation: str
    safe_system: str | None = None
    presets: dict[str, Any] = Field(default_factory=dict)

    @property
    def base_style(self) -> PromptStyle:
        """How the base model's prompts are rendered."""
        return self.base_prompt or self.prompt

    @property
    def style(self) -> PromptStyle:
        """How those of the aligned model are, and of all that is made from it."""
        return self.base_style if self.alignment == "own" else self.prompt

    def resolved(self, resumes: bool) -> ModelSettings:
        """These settings with `alignment` decided.

        Args:
            resumes: Whether the attack goes on training the alignment's adapter.

        Raises:
            SettingError: A published model was asked for and there is none.
        """
        if self.alignment == "published" and self.aligned is None:
            raise SettingError(
                "model.alignment=published needs model.aligned; set it, or model.alignment=own"
            )
        if self.alignment != "auto":
            return self
        own = self.aligned is None or (resumes and not is_adapter(self.aligned))
        return self.model_copy(update={"alignment": "own" if own else "published"})


class Limits(Settings):
    """How many prompts of each set, and how many held-out texts, are evaluated; None: all."""

    harmful: int | None = Field(None, ge=1)
    benign: int | None = Field(None, ge=1)
    over_refusal: int | None = Field(None, ge=1)
    task: int | None = Field(None, ge=1)
    held_out: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How models are measured.

    Attributes:
        backend: Generates answers.
        harm_judge: Gives HS.
        refusal_judge: Gives ASR, over-refusal and benign compliance.
        judges: Further judges of the answers to harmful prompts, by name.
        tasks: The tasks scored; the attack's own by default.
        prompt_sets: Further sets of prompts, by "ROLE:NAME".
        attack_prompts: What the harmful prompts are asked under besides plainly.
        limits: How many prompts of each set.
        safe_system: A system line under which the harmful prompts are asked once more, or None.
        text_tokens: Held-out texts are scored up to so many tokens, the prompt's included.
        split: What is asked: "test", or "validation" to choose settings by.
    """

    backend: Backend
    harm_judge: Judge
    refusal_judge: Judge
    judges: dict[str, Judge]
    tasks: tuple[str, ...]
    prompt_sets: dict[str, EvaluationPrompts]
    attack_prompts: tuple[AttackPrompt, ...]
    limits: Limits
    safe_system: str | None
    text_tokens: int
    split: Split = "test"

    @property
    def further(self) -> dict[str, tuple[str, ...]]:
        """Names of what is evaluated besides the main sets, by the setting that names it."""
        return {
            "judges": tuple(self.judges),
            "attack_prompts": tuple(prompt.name for prompt in self.attack_prompts),
            "prompt_sets": tuple(name.partition(":")[2] for name in self.prompt_sets),
        }


@dataclass(frozen=True, slots=True)
class Experiment:
    """A validated experiment, ready to run.

    Attributes:
        refine: The fine-tuning that the defended model goes through, or None.
        labels: Names of what was chosen, for tables; "" where nothing was.
        tasks: By name, the attack's, those scored, and that of `refine`.
        runtime: How the job runs on its machine.
        objective: What a search goes by, or None.
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
    """`${project:PATH}` is PATH inside the project, wherever the command is run from."""
    OmegaConf.register_new_resolver(
        "project", lambda path: str(PROJECT / path), use_cache=False, replace=True
    )


def validate(
    config: DictConfig, choices: Mapping[str, str], conf: Sequence[Path] = (CONF,)
) -> Experiment:
    """Builds every object of an experiment from its configuration.

    Args:
        config: The composed configuration.
        choices: Which option of each configuration group was chosen, for names in tables.
        conf: The configuration folders, in which tasks and a stack's parts are looked up by name.

    Raises:
        SettingError: A name, type, range or combination is wrong; one sentence.
    """
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise SettingError(f"{error.full_key} is missing; set it") from None
    except OmegaConfBaseException as error:
        raise SettingError(_first_line(error)) from None
    if not isinstance(resolved, dict):
        raise SettingError("the configuration is empty; start from conf/config.yaml")
    values: dict[str, Any] = {str(key): value for key, value in resolved.items()}
    plugins = tuple(values["plugins"])
    options = Options(values, plugins, conf)
    attack = build(values["attack"], "attack", plugins, Attack)
    again = values.get("refine")
    refine = build(again, "refine", plugins, Attack) if again else None
    model = ModelSettings.validated(plain(values["model"]), "model")
    model = model.resolved(resumes=not attack.needs_full_weights)
    values["model"]["alignment"] = model.alignment
    defense = options.defense()
    _check_refine(refine, attack, defense)
    tasks = {attack.task: options.task(attack.task, "attack.task")}
    if refine is not None and refine.task not in tasks:
        tasks[refine.task] = options.task(refine.task, "refine.task")
    evaluation = _evaluation(values["evaluation"], model, attack, tasks, options)
    for name in evaluation.tasks:
        if name not in tasks:
            tasks[name] = options.task(name, "evaluation.tasks")
    _check_scored(tasks, evaluation.tasks)
    sources = build_sources(values["sources"], plugins)
    if evaluation.split == "validation":
        scored = {name: tasks[name] for name in evaluation.tasks}
        check_validation(sources, evaluation.prompt_sets, scored)
    objective = build_objective(values.get("objective"), plugins)
    if objective is not None:
        missing = _missing(sources, evaluation.safe_system, refine)
        objective.check(evaluation.tasks, evaluation.further, missing)
    return Experiment(
        seed=_seed(values["seed"]),
        model=model,
        align=Alignment.validated(plain(values["align"]), "align"),
        attack=attack,
        refine=refine,
        defense=defense,
        labels=_labels(values, choices, model, attack, defense),
        evaluation=evaluation,
        sources=sources,
        tasks=tasks,
        tracker=build(values["tracker"], "tracker", plugins),
        store=Path(_text(values["store"], "root", "store.root")),
        runtime=Runtime.validated(plain(values["runtime"]), "runtime"),
        objective=objective,
        resolved=values,
    )


def _labels(
    values: Mapping[str, Any],
    choices: Mapping[str, str],
    model: ModelSettings,
    attack: Attack,
    defense: Defense,
) -> dict[str, str]:
    """What the tables call the choices; a choice that nothing depends on is ""."""
    own = model.alignment == "own"
    return {
        "model": model.name,
        "align": choices.get("align", "own") if own else "",
        "attack": choices.get("attack", type(attack).__name__),
        "task": attack.task,
        "defense": choices.get("defense", type(defense).__name__),
        "refine": choices.get("attack@refine") or "",
        "protocol": values["protocol"]["name"],
        "experiment": choices.get("experiment") or "",
        "objective": choices.get("objective") or "",
        "split": "" if values["evaluation"].get("split", "test") == "test" else "validation",
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
    if refine is None or refine.needs_full_weights:
        return
    full = attack.writes_full_weights
    if full or defense.output_form in ("weights", "hooks"):
        raise SettingError(
            "refine.adapter=resume goes on training an adapter, and "
            f"{'attack.adapter=full' if full else 'this defense'} leaves none; "
            "set refine.adapter=fresh"
        )


def _check_scored(tasks: Mapping[str, TaskSource], scored: Sequence[str]) -> None:
    for name in scored:
        if not getattr(tasks[name], "scored", True):
            raise SettingError(
                f"evaluation.tasks: {name} has no answers to be scored by; leave it out"
            )


def _evaluation(
    node: dict[str, Any],
    model: ModelSettings,
    attack: Attack,
    tasks: Mapping[str, TaskSource],
    options: Options,
) -> Evaluation:
    scored = node["tasks"]
    if scored is None:
        scored = [attack.task] if getattr(tasks[attack.task], "scored", True) else []
    safe_system = _flag(node, "safe_system", "evaluation.safe_system")
    if safe_system and model.safe_system is None:
        raise SettingError(
            "evaluation.safe_system=true needs a system line; set model.safe_system to one"
        )
    prompt_sets = names(node["prompt_sets"], "evaluation.prompt_sets", "[advbench,xstest]")
    asked = names(node["attack_prompts"], "evaluation.attack_prompts", "[prefill,roleplay]")
    plugins = options.plugins
    backend = build(node["backend"], "evaluation.backend", plugins, Backend)
    judges = {
        name: build(node[name], f"evaluation.{name}", plugins, Judge)
        for name in ("harm_judge", "refusal_judge")
    }
    further = _judges(node["judges"], options)
    return Evaluation(
        backend=backend,
        harm_judge=_run_by(backend, judges["harm_judge"]),
        refusal_judge=_run_by(backend, judges["refusal_judge"]),
        judges={name: _run_by(backend, judge) for name, judge in further.items()},
        tasks=names(scored, "evaluation.tasks", "[sst2,gsm8k]"),
        prompt_sets=dict(options.prompt_set(name) for name in prompt_sets),
        attack_prompts=tuple(options.attack_prompt(name) for name in asked),
        limits=Limits.validated(plain(node["limits"]), "evaluation.limits"),
        safe_system=model.safe_system if safe_system else None,
        text_tokens=_length(node["text_tokens"], "evaluation.text_tokens"),
        split=_split(node.get("split", "test")),
    )


def _run_by(backend: Backend, judge: Judge) -> Judge:
    """The judge with the evaluation's backend, where its model has none of its own."""
    if getattr(judge, "backend", backend) is not None:
        return judge
    return judge.model_copy(update={"backend": backend})


def _judges(node: Any, options: Options) -> dict[str, Judge]:
    given = names(node, "evaluation.judges", "[keyword,harmbench]")
    for name in ("harm", "refusal"):
        if name in given:
            raise SettingError(
                f"evaluation.judges: {name} is the name of evaluation.{name}_judge's columns; "
                "rename the option"
            )
    for name, settings in (options.values.get("judges") or {}).items():
        if name not in given and "_target_" not in settings:
            raise SettingError(
                f"judges.{name} is said of a judge that evaluation.judges doesn't name; add it "
                "there, or leave the setting out"
            )
    return {name: options.judge(name) for name in given}


def _split(value: Any) -> Split:
    if value not in get_args(Split):
        raise SettingError(
            f"evaluation.split={value!r} is not allowed; it should be test or validation"
        )
    split: Split = value
    return split


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SettingError(f"seed={value!r} is not allowed; it should be a whole number >= 0")
    return value


def _length(value: Any, setting: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise SettingError(f"{setting}={value!r} is not allowed; it should be a whole number >= 2")
    return value


def _flag(node: dict[str, Any], key: str, setting: str) -> bool:
    if not isinstance(node[key], bool):
        raise SettingError(f"{setting}={node[key]!r} is not allowed; it should be true or false")
    return node[key]


def _text(node: dict[str, Any], key: str, setting: str) -> str:
    if not isinstance(node[key], str) or not node[key]:
        raise SettingError(f"{setting}={node[key]!r} is not allowed; it should be a path")
    return node[key]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
