"""The evaluation of an experiment: backend, judges, tasks and prompts, from its section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo

from attacks.prompts import AttackPrompt
from data.rows import EvaluationPrompts
from evaluation.base import Backend, Judge
from experiments.config.model import ModelSettings
from experiments.config.options import Options
from experiments.config.sources import Split
from settings import SettingError, Settings, build

_EXAMPLES = {
    "judges": "[keyword,harmbench]",
    "tasks": "[sst2,gsm8k]",
    "prompt_sets": "[advbench,xstest]",
    "attack_prompts": "[prefill,roleplay]",
}


def _checked_names(value: object, info: ValidationInfo) -> object:
    setting, example = f"evaluation.{info.field_name}", _EXAMPLES[str(info.field_name)]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{setting}={value!r} is no list of names; write {setting}={example}")
    if len(set(value)) < len(value):
        raise ValueError(f"{setting}={list(value)} names one option twice; name each once")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_checked_names)]


class Limits(Settings):
    """How many prompts of each set, and how many held-out texts, are evaluated; None: all."""

    harmful: int | None = Field(None, ge=1)
    benign: int | None = Field(None, ge=1)
    over_refusal: int | None = Field(None, ge=1)
    task: int | None = Field(None, ge=1)
    held_out: int | None = Field(None, ge=1)


class EvaluationSettings(Settings):
    """The `evaluation` section as it is written, with options by name; see `Evaluation`.

    Attributes:
        tasks: The tasks that are scored; None: the attack's own.
        safe_system: Whether the harmful prompts are asked once more under `model.safe_system`.
    """

    backend: dict[str, Any]
    harm_judge: dict[str, Any]
    refusal_judge: dict[str, Any]
    judges: Names = ()
    tasks: Names | None = None
    prompt_sets: Names = ()
    attack_prompts: Names = ()
    limits: Limits = Limits()
    safe_system: bool = False
    text_tokens: int = Field(1024, ge=2)
    split: Split = "test"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How models are measured.

    Attributes:
        judges: Further judges of the answers to harmful prompts, by name.
        tasks: The tasks scored; the attack's own by default.
        prompt_sets: Further sets of prompts, by "ROLE:NAME".
        attack_prompts: What the harmful prompts are asked under besides plainly.
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


def build_evaluation(
    settings: EvaluationSettings,
    model: ModelSettings,
    default: tuple[str, ...],
    options: Options,
) -> Evaluation:
    """Builds backend, judges and sets of prompts.

    Raises:
        SettingError: A name is unknown, or what is built of it is wrong; one sentence.
    """
    if settings.safe_system and model.safe_system is None:
        raise SettingError(
            "evaluation.safe_system=true needs a system line; set model.safe_system to one"
        )
    plugins = options.plugins
    backend = build(settings.backend, "evaluation.backend", plugins, Backend)
    harm = build(settings.harm_judge, "evaluation.harm_judge", plugins, Judge)
    refusal = build(settings.refusal_judge, "evaluation.refusal_judge", plugins, Judge)
    judges = _judges(settings.judges, options)
    return Evaluation(
        backend=backend,
        harm_judge=_run_by(backend, harm),
        refusal_judge=_run_by(backend, refusal),
        judges={name: _run_by(backend, judge) for name, judge in judges.items()},
        tasks=default if settings.tasks is None else settings.tasks,
        prompt_sets=dict(options.prompt_set(name) for name in settings.prompt_sets),
        attack_prompts=tuple(options.attack_prompt(name) for name in settings.attack_prompts),
        limits=settings.limits,
        safe_system=model.safe_system if settings.safe_system else None,
        text_tokens=settings.text_tokens,
        split=settings.split,
    )


def _run_by(backend: Backend, judge: Judge) -> Judge:
    """The judge with the evaluation's backend, where its model has none of its own."""
    if getattr(judge, "backend", backend) is not None:
        return judge
    return judge.model_copy(update={"backend": backend})


def _judges(names: tuple[str, ...], options: Options) -> dict[str, Judge]:
    for name in ("harm", "refusal"):
        if name in names:
            raise SettingError(
                f"evaluation.judges: {name} is the name of evaluation.{name}_judge's columns; "
                "rename the option"
            )
    for name, node in (options.values.get("judges") or {}).items():
        if name not in names and "_target_" not in node:
            raise SettingError(
                f"judges.{name} is said of a judge that evaluation.judges doesn't name; add it "
                "there, or leave the setting out"
            )
    return {name: options.judge(name) for name in names}
