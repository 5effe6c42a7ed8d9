"""From a composed Hydra configuration to a validated experiment, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from attacks.base import Attack
from data.rows import ExampleSource, PairSource, PromptSource, TaskSource
from defenses.base import Defense
from defenses.stack import Stack
from evaluation.base import Backend, Judge
from modeling.alignment import Alignment
from modeling.chat import PromptStyle
from settings import SettingError, Settings, build, plain, target
from settings.base import closest

PROJECT = Path(__file__).resolve().parent.parent
CONF = PROJECT / "conf"


class ModelSettings(Settings):
    """Which model the experiment is about.

    Attributes:
        name: A short name for tables.
        base: Local folder or hub id of the model before alignment (W_0).
        aligned: The aligned model: an adapter folder on `base`, a full model (folder or hub
            id), or None to make it by the `align` stage.
        revision: Hub revision of `base` and `aligned`; None for the newest.
        dtype: Precision of the weights.
        prompt: How prompts are rendered.
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
    dtype: str = Field("float32", pattern="^(float32|float16|bfloat16)$")
    prompt: PromptStyle = PromptStyle()
    task: str
    max_new_tokens: int = Field(512, ge=1)
    moderation: str
    safe_system: str | None = None
    presets: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where rows come from; any of them may be None where nothing needs it."""

    sft: ExampleSource | None
    pairs: PairSource | None
    poison: ExampleSource | None
    calibration: PromptSource | None
    safety_pairs: PairSource | None
    safety_prompts: PromptSource | None
    utility_prompts: PromptSource | None
    harmful: PromptSource
    benign: PromptSource | None
    over_refusal: PromptSource | None


class Limits(Settings):
    """How many prompts of each set are evaluated; None: all."""

    harmful: int | None = Field(None, ge=1)
    benign: int | None = Field(None, ge=1)
    over_refusal: int | None = Field(None, ge=1)
    task: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How models are measured.

    Attributes:
        backend: Generates answers.
        harm_judge: Gives HS.
        refusal_judge: Gives ASR, over-refusal and benign compliance.
        tasks: The tasks scored; the attack's own by default.
        limits: How many prompts of each set.
        safe_system: A system line under which the harmful prompts are asked once more, or None.
    """

    backend: Backend
    harm_judge: Judge
    refusal_judge: Judge
    tasks: tuple[str, ...]
    limits: Limits
    safe_system: str | None


@dataclass(frozen=True, slots=True)
class Experiment:
    """A validated experiment, ready to run."""

    seed: int
    model: ModelSettings
    align: Alignment
    attack: Attack
    defense: Defense
    labels: dict[str, str]
    evaluation: Evaluation
    sources: Sources
    tasks: dict[str, TaskSource]
    tracker: Any
    store: Path
    isolate: bool
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
    except OmegaConfBaseException as error:
        raise SettingError(_first_line(error)) from None
    if not isinstance(resolved, dict):
        raise SettingError("the configuration is empty; start from conf/config.yaml")
    values: dict[str, Any] = {str(key): value for key, value in resolved.items()}
    plugins = tuple(values["plugins"])
    model = ModelSettings.validated(plain(values["model"]), "model")
    attack = build(values["attack"], "attack", plugins, Attack)
    defense = _defense(values, plugins, conf)
    evaluation = _evaluation(values["evaluation"], model, attack, plugins)
    names = dict.fromkeys((attack.task, *evaluation.tasks))
    return Experiment(
        seed=_seed(values["seed"]),
        model=model,
        align=Alignment.validated(plain(values["align"]), "align"),
        attack=attack,
        defense=defense,
        labels={
            "model": model.name,
            "attack": choices.get("attack", type(attack).__name__),
            "task": attack.task,
            "defense": choices.get("defense", type(defense).__name__),
        },
        evaluation=evaluation,
        sources=_sources(values["sources"], plugins),
        tasks={name: _task(name, values, plugins, conf) for name in names},
        tracker=build(values["tracker"], "tracker", plugins),
        store=Path(_text(values["store"], "root", "store.root")),
        isolate=_flag(values["runtime"], "isolate", "runtime.isolate"),
        resolved=values,
    )


def _evaluation(
    node: dict[str, Any], model: ModelSettings, attack: Attack, plugins: Sequence[str]
) -> Evaluation:
    tasks = node["tasks"]
    if tasks is not None and (isinstance(tasks, str) or not isinstance(tasks, list | tuple)):
        raise SettingError(f"evaluation.tasks={tasks!r} is not a list; write [sst2,gsm8k] or null")
    safe_system = _flag(node, "safe_system", "evaluation.safe_system")
    if safe_system and model.safe_system is None:
        raise SettingError(
            "evaluation.safe_system=true needs a system line; set model.safe_system to one"
        )
    return Evaluation(
        backend=build(node["backend"], "evaluation.backend", plugins, Backend),
        harm_judge=build(node["harm_judge"], "evaluation.harm_judge", plugins, Judge),
        refusal_judge=build(node["refusal_judge"], "evaluation.refusal_judge", plugins, Judge),
        tasks=tuple(tasks) if tasks is not None else (attack.task,),
        limits=Limits.validated(plain(node["limits"]), "evaluation.limits"),
        safe_system=model.safe_system if safe_system else None,
    )


def _sources(node: dict[str, Any], plugins: Sequence[str]) -> Sources:
    known = [entry.name for entry in fields(Sources)]
    for name in node:
        if name not in known:
            raise SettingError(f"sources.{name} is not a setting; {closest(name, known)}")
    built: dict[str, Any] = {
        name: build(node[name], f"sources.{name}", plugins) if node.get(name) else None
        for name in known
    }
    if built["harmful"] is None:
        raise SettingError("sources.harmful is null; set it to a source of harmful prompts")
    return Sources(**built)


def _task(
    name: str, values: dict[str, Any], plugins: Sequence[str], conf: Sequence[Path]
) -> TaskSource:
    options = _options("task", conf)
    if name not in options:
        raise SettingError(f"attack.task={name!r} is unknown; known: {', '.join(sorted(options))}")
    node = OmegaConf.create({"data": values["data"], "task": OmegaConf.load(options[name])})
    OmegaConf.resolve(node)
    task = build(plain(OmegaConf.to_container(node.task)), f"task.{name}", plugins)
    if not isinstance(task, TaskSource):
        raise SettingError(f"conf/task/{name}.yaml builds no task; its class needs train and test")
    return task


def _defense(values: dict[str, Any], plugins: Sequence[str], conf: Sequence[Path]) -> Defense:
    """The defense; of a stack the parts, whose settings then stand among the resolved ones."""
    node = values["defense"]
    if node.get("_target_") != target(Stack):
        return build(node, "defense", plugins, Defense)
    order, given = node.get("order"), node.get("settings") or {}
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise SettingError(
            f"defense.order={order!r} is no list of defenses; write defense.order=[nlsr,safetylock]"
        )
    for name in [key for key in node if key not in ("_target_", "order", "settings")]:
        raise SettingError(
            f"defense.{name} is no setting of a stack; {closest(name, ['order', 'settings'])} "
            f"(a part's own: +defense.settings.NAME.{name}=...)"
        )
    for name in [name for name in given if name not in order]:
        raise SettingError(
            f"defense.settings.{name} is for a defense that defense.order doesn't name; "
            f"{closest(name, order)}"
        )
    node["settings"] = {name: _part(name, values, given.get(name) or {}, conf) for name in order}
    built = {
        name: build(settings, f"defense.settings.{name}", plugins, Defense)
        for name, settings in node["settings"].items()
    }
    parts = tuple(built[name] for name in order)
    return Stack.validated({"order": tuple(order), "parts": parts}, "defense")


def _part(
    name: str, values: dict[str, Any], given: dict[str, Any], conf: Sequence[Path]
) -> dict[str, Any]:
    """A stacked defense's settings: its own file's, with those given in their place."""
    options = _options("defense", conf)
    if name not in options:
        raise SettingError(f"defense.order: {name!r} is unknown; {closest(name, list(options))}")
    option = OmegaConf.merge(OmegaConf.load(options[name]), given)
    if OmegaConf.select(option, "_target_") == target(Stack):
        raise SettingError(
            f"defense.order can't hold a stack ({name}); write its own defenses in its place"
        )
    node = OmegaConf.create({**values, "defense": option})
    OmegaConf.resolve(node)
    resolved: dict[str, Any] = OmegaConf.to_container(node.defense)  # type: ignore[assignment]
    return resolved


def _options(group: str, conf: Sequence[Path]) -> dict[str, Path]:
    """The files of a configuration group by name."""
    return {path.stem: path for folder in conf for path in folder.glob(f"{group}/*.yaml")}


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SettingError(f"seed={value!r} is not allowed; it should be a whole number >= 0")
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
