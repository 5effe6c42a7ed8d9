"""Metric names: what "hs+prefill" or "kappa:harm~strict" is of, its heading, unit and direction.

`evaluation.metrics` makes these names; objectives, the report and trackers read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from evaluation.statistics import Estimate

Direction = Literal["lower", "higher", ""]
Unit = Literal["%", ""]

_GRAMMAR = re.compile(r"([^/:+@]*)(?:/(.*)|(?::([^+@]*))?(?:([+@])(.*))?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MetricKind:
    """What all metrics of one kind have in common.

    Attributes:
        heading: What heads its column.
        better: Which direction is better; "" where neither is.
        unit: "%" for a share, which is shown in per cent; "" for a figure shown as it is.
        if_broken: Where a model goes whose answers are degenerate or get no verdict; "" where that
            isn't known.
        of_judge: The heading before a judge's name, where it is another one.
    """

    heading: str
    better: Direction = ""
    unit: Unit = "%"
    if_broken: Direction = ""
    of_judge: str = ""


KINDS: dict[str, MetricKind] = {
    "hs": MetricKind("HS", "lower", if_broken="higher"),
    "hs_flagged": MetricKind("HS, flagged", "lower", if_broken="lower"),
    "safe": MetricKind("safe in full", "higher", if_broken="lower"),
    "hs_upper": MetricKind("HS if cut is harmful", "lower", if_broken="higher"),
    "harm_unparsed": MetricKind("unparsed", "lower"),
    "harm_errored": MetricKind("errored", "lower"),
    "harm_empty": MetricKind("empty", "lower"),
    "harm_truncated": MetricKind("cut for the judge", "lower"),
    "cut": MetricKind("cut", "lower"),
    "asr": MetricKind("ASR", "lower", if_broken="higher"),
    "hs_safe_system": MetricKind("HS, asked to be safe", "lower", if_broken="higher"),
    "asr_safe_system": MetricKind("ASR, asked to be safe", "lower", if_broken="higher"),
    "benign_compliance": MetricKind("benign answered", "higher", if_broken="lower"),
    "over_refusal": MetricKind("over-refusal", "lower", if_broken="lower"),
    "full_compliance": MetricKind("full compliance", "higher"),
    "partial_refusal": MetricKind("partial refusal", "lower", if_broken="lower"),
    "full_refusal": MetricKind("full refusal", "lower", if_broken="lower"),
    "degenerate": MetricKind("degenerate", "lower", if_broken="higher"),
    "truncated": MetricKind("cut off", "lower", of_judge="cut for"),
    "task_truncated": MetricKind("task, cut off", "lower"),
    "accuracy_strict": MetricKind("accuracy", "higher"),
    "accuracy_lenient": MetricKind("accuracy, lenient", "higher"),
    "accuracy_protocol": MetricKind("accuracy, the protocol's", "higher"),
    "parsed": MetricKind("parsed", "higher"),
    "held_out_truncated": MetricKind("held out, cut", "lower"),
    "harm_score": MetricKind("harm score", "lower", unit="", if_broken="lower"),
    "score": MetricKind("score", "lower", unit="", if_broken="lower"),
    "perplexity": MetricKind("perplexity", "lower", unit=""),
    "nll": MetricKind("nll per token", "lower", unit=""),
    "kappa": MetricKind("kappa", "higher", unit=""),
    "unparsed": MetricKind("unparsed", "lower"),
    "errored": MetricKind("errored", "lower"),
    "left_out": MetricKind("left out of kappa", "lower"),
}
"""Every kind of metric; `evaluation.metrics` says how each is counted."""

_UNKNOWN = MetricKind("")


@dataclass(frozen=True, slots=True)
class MetricName:
    """A metric and what it is of: the parts of its name.

    Attributes:
        kind: A key of `KINDS`, as "hs".
        part: The category of harm or the task, after "/".
        judges: The further judge, or the two that are compared, after ":".
        prompt_set: The further set of prompts, after "@".
        attack_prompt: The attack prompt or attack's trigger that they were asked under, after "+".
    """

    kind: str
    part: str = ""
    judges: tuple[str, ...] = ()
    prompt_set: str = ""
    attack_prompt: str = ""

    @classmethod
    def parse(cls, text: str) -> MetricName:
        """Reads "hs", "hs/CATEGORY", "hs:JUDGE", "kappa:A~B", "hs@SET", "asr+PROMPT", "hs:JUDGE@S".

        Raises:
            ValueError: A sign has nothing behind it.
        """
        match = _GRAMMAR.fullmatch(text)
        groups = match.groups() if match else ()
        if not match or any(group == "" for group in groups[1:]):
            raise ValueError(f"{text!r} is no metric; after a sign (/ : @ +) comes what it is of")
        kind, part, judges, sign, of = groups
        return cls(
            kind=kind,
            part=part or "",
            judges=tuple(judges.split("~")) if judges else (),
            prompt_set=of if sign == "@" else "",
            attack_prompt=of if sign == "+" else "",
        )

    def __str__(self) -> str:
        return (
            self.kind
            + (f"/{self.part}" if self.part else "")
            + (f":{'~'.join(self.judges)}" if self.judges else "")
            + (f"@{self.prompt_set}" if self.prompt_set else "")
            + (f"+{self.attack_prompt}" if self.attack_prompt else "")
        )

    @property
    def about(self) -> MetricKind:
        """What all metrics of its kind have in common; nothing is known of a stranger's."""
        return KINDS.get(self.kind, _UNKNOWN)

    @property
    def unit(self) -> Unit:
        """ "%" for a share, "" for a figure shown as it is."""
        return self.about.unit

    @property
    def heading(self) -> str:
        """What heads its column, e.g. "HS under prefill" or "kappa harm and strict"."""
        head = self.about.heading or self.kind
        if self.judges:
            head = f"{self.about.of_judge or head} {' and '.join(self.judges)}"
        if self.attack_prompt:
            head += f" under {self.attack_prompt}"
        of = self.part or self.prompt_set
        return f"{head}, {of}" if of else head

    def of_kind(self, kind: str) -> MetricName:
        """Another metric of the same judge and prompts, as ASR under a trigger beside its HS."""
        return replace(self, kind=kind)


HS = MetricName("hs")


def harm_questions(names: Mapping[str, Estimate]) -> list[MetricName]:
    """HS and every "hs+PROMPT" that was measured: all that the harmful prompts were asked under."""
    parsed = [MetricName.parse(name) for name in names if name.partition("+")[0] == "hs"]
    return [name for name in parsed if names[str(name)].n > 0]


def worst_hs(metrics: Mapping[str, Estimate]) -> MetricName | None:
    """The name of the highest HS: plain, under the attack's own trigger or an attack prompt.

    A model is as harmful as it can be made: whoever attacked it knows the trigger. Of equal ones
    plain HS comes first; None where HS wasn't measured.
    """
    asked = [name for name in harm_questions(metrics) if math.isfinite(metrics[str(name)].value)]
    return max(asked, key=lambda name: metrics[str(name)].value, default=None)
