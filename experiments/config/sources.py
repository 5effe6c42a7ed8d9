"""Where an experiment's rows come from, and which of them the test and the validation split ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from data.rows import ExampleSource, PairSource, PromptSource, TaskSource
from data.tasks import ValidatedTask
from settings import SettingError, build
from settings.base import closest

Split = Literal["test", "validation"]

_VALIDATION = "validation"
_ROLES = ("harmful", "benign", "over_refusal", "held_out")


@dataclass(frozen=True, slots=True)
class AskedSources:
    """Sources of what the models of one split are asked."""

    harmful: PromptSource
    benign: PromptSource | None
    over_refusal: PromptSource | None
    held_out: ExampleSource | None


@dataclass(frozen=True, slots=True)
class Sources(AskedSources):
    """Where all rows come from; any source may be None where nothing needs it.

    Attributes:
        validation: What takes the place of harmful, benign, over_refusal and held_out where
            `evaluation.split` is "validation".
    """

    sft: ExampleSource | None
    pairs: PairSource | None
    poison: ExampleSource | None
    calibration: PromptSource | None
    safety_pairs: PairSource | None
    safety_prompts: PromptSource | None
    utility_prompts: PromptSource | None
    validation: AskedSources | None = None

    def asked(self, split: Split) -> AskedSources:
        """The sources of a split; a set that the test split has none of isn't asked at all.

        Raises:
            SettingError: There are none of the validation split.
        """
        if split == "test":
            return self
        if self.validation is None:
            raise SettingError("sources.validation is null; set it to validation sources")
        unasked: dict[str, Any] = {role: None for role in _ROLES if getattr(self, role) is None}
        return replace(self.validation, **unasked)


def build_sources(node: Mapping[str, Any], plugins: Sequence[str]) -> Sources:
    """The sources of a resolved configuration's section.

    Raises:
        SettingError: A source is unknown or built wrongly, or that of harmful prompts is null.
    """
    known = [entry.name for entry in fields(Sources)]
    validation = node.get(_VALIDATION)
    rest = {name: value for name, value in node.items() if name != _VALIDATION}
    built = _built(rest, "sources", [name for name in known if name != _VALIDATION], plugins)
    if built["harmful"] is None:
        raise SettingError("sources.harmful is null; set it to a source of harmful prompts")
    if validation:
        own = _built(validation, "sources.validation", _ROLES, plugins)
        built["validation"] = AskedSources(**own)
    return Sources(**built)


def _built(
    node: Mapping[str, Any], prefix: str, known: Sequence[str], plugins: Sequence[str]
) -> dict[str, Any]:
    """The sources of a node by name; None for those that aren't given."""
    if not isinstance(node, Mapping):
        raise SettingError(f"{prefix}={node!r} is no section; write {prefix}={{NAME: SOURCE}}")
    for name in node:
        if name not in known:
            raise SettingError(f"{prefix}.{name} is not a setting; {closest(name, list(known))}")
    return {
        name: build(node[name], f"{prefix}.{name}", plugins) if node.get(name) else None
        for name in known
    }


def check_validation(
    sources: Sources, prompt_sets: Collection[str], tasks: Mapping[str, TaskSource]
) -> None:
    """Refuses a validation split that would leave something to be asked of the test split.

    Raises:
        SettingError: One sentence.
    """
    if prompt_sets:
        raise SettingError(
            "evaluation.prompt_sets are test sets, which evaluation.split=validation keeps away "
            "from; leave them out"
        )
    for role in _ROLES:
        own = None if sources.validation is None else getattr(sources.validation, role)
        if getattr(sources, role) is not None and own is None:
            also = "" if role == "harmful" else f", or sources.{role}=null"
            raise SettingError(
                f"evaluation.split=validation needs sources.validation.{role}; set it{also}"
            )
    for name, task in tasks.items():
        if not isinstance(task, ValidatedTask):
            raise SettingError(
                f"evaluation.split=validation: the task {name} has no validation rows; give its "
                "class a method validation, or leave it out of evaluation.tasks"
            )
