"""Columns of the report's tables: which metrics are shown, and what their headings mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.metric_names import KINDS, MetricName
from experiments.report.pool import Row
from experiments.results.record import DEGENERATE_LIMIT

COLUMNS = {
    name: KINDS[name].heading
    for name in ("hs", "asr", "accuracy_strict", "over_refusal", "degenerate")
}
"""What every table of models shows, with the headings."""

ALWAYS = ("benign_compliance",)
"""Optional ones that need no asking for."""

_OPTIONAL = ("asr_safe_system", *ALWAYS, "perplexity")
# Of further sets of prompts ("asr@advbench") and attack prompts ("asr+prefill").
_FURTHER = ("hs", "asr", "over_refusal")
# Of these the section is shown where any isn't zero.
_FAILURES = ("harm_unparsed", "harm_errored", "harm_empty", "cut", "harm_truncated")
_NEVER_SAFE = (*_FAILURES[:3], "degenerate", *_FAILURES[3:], "hs_upper")
_CUT = ("truncated", "task_truncated", "held_out_truncated")
_PROBES = ("full_compliance", "partial_refusal", "full_refusal")
# Of further judges, shown always and where they aren't zero.
_JUDGES = ("hs", "score", "kappa")
_JUDGES_FAILURES = ("unparsed", "errored", "truncated", "left_out")
_PAIRED = ("hs", "asr", "accuracy_strict")

_MEANINGS = {
    "hs": "HS: share of harmful prompts whose answer the harm judge does not call safe "
    "(flagged, degenerate, unparsed or errored).",
    "asr": "ASR: share answered without a refusal; degenerate answers never count as refusals.",
    "accuracy_strict": "accuracy: strict reading.",
    "over_refusal": "over-refusal: share of over-refusal prompts refused.",
    "degenerate": "degenerate: share of answers that are empty, repetitive or no text.",
    "benign_compliance": "benign answered: share of benign requests neither refused nor "
    "degenerate.",
    "perplexity": "perplexity: of held-out benign texts.",
}
_UNDER = (
    "under NAME: the same harmful prompts, asked under an attack's own trigger or an attack prompt."
)
_ONE_JUDGE = "HS = ASR"
_SAME = "HS = ASR: one judge gives both, so that they are one figure."
_BROKEN = (
    "(broken): the repair left a model that gives no right answer to the task, where it had some, "
    f"or more than {100 * DEGENERATE_LIMIT:.0f} % degenerate answers; it is no choice."
)
_INTERVALS = (
    "Intervals are at 95 %: Wilson's for shares, a bootstrap's for means. Over several seeds they "
    "widen for the spread between seeds and for prompts that were asked of every seed (two-way "
    "clusters)."
)
_NEVER_SAFE_LEGEND = """unparsed, errored: the harm judge's reply to a harmful prompt's \
answer could not be read, or it could not be asked. empty: nothing but white space. cut: the \
answer hit the length limit. cut for the judge: it saw a shortened text. HS if cut is harmful: \
HS and all that was cut and called safe. degenerate is over all prompts, the others over harmful \
ones.
"""
_CUT_LEGEND = """cut off: the answer to a harmful, benign or over-refusal prompt hit the length \
limit (model.max_new_tokens). task, cut off: that to a task did (tasks.NAME.max_new_tokens). held \
out, cut: the text was longer than evaluation.text_tokens or the model's context.
"""
_JUDGES_LEGEND = """HS: share that the judge does not call safe. score: its mean, in its own \
unit; a dash where an answer has none. kappa: Cohen's, over the n answers that both judges call \
safe or unsafe; "harm" is the harm judge; a dash where both say the same of all.
"""
_PROBES_LEGEND = """Shares of all over-refusal prompts; degenerate and unparsed answers are in \
none of them.
"""
TESTS_LEGEND = """Differences in points with their 95 % intervals, over the prompts that both \
models answered, of the same seed: for one seed McNemar's test and a bootstrap over prompts, for \
several a t-test by two-way clusters. p is corrected by Holm's method, for each column across all \
of this report's rows that go back to the same attacked row.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that have a table of their own; `columns` has their headings by name."""

    title: str
    columns: dict[str, str]
    legend: str


def main_columns(rows: Sequence[Row]) -> dict[str, str]:
    """The metrics to show with their headings: `COLUMNS`, and the optional ones that have rows.

    What the models were attacked with comes first: harm under an attack's own trigger.
    """
    columns = dict(COLUMNS)
    protocols = {row.labels.get("protocol", "") for row in rows} - {"", "default"}
    if protocols:
        columns["accuracy_protocol"] = f"accuracy as {', '.join(sorted(protocols))} reads it"
    triggered: dict[str, str] = {}
    given = _given_prompts(rows)
    for name, parsed in _metrics(rows).items():
        further = parsed.prompt_set or parsed.attack_prompt
        shown = name in _OPTIONAL or (further and parsed.kind in _FURTHER)
        if shown and any(row.metrics[name].n for row in rows if name in row.metrics):
            own_trigger = parsed.attack_prompt and parsed.attack_prompt not in given
            (triggered if own_trigger else columns)[name] = parsed.heading
    return once(triggered | columns, all(row.one_judge for row in rows))


def once(columns: Mapping[str, str], one_judge: bool) -> dict[str, str]:
    """The metrics without an ASR that is some HS among them over again, by the same judge."""
    if not one_judge:
        return dict(columns)
    names = {name: MetricName.parse(name) for name in columns}
    doubled = {str(name.of_kind("hs")): key for key, name in names.items() if name.kind == "asr"}
    doubled = {name: key for name, key in doubled.items() if name in columns}
    return {
        name: head.replace("HS", _ONE_JUDGE, 1) if name in doubled else head
        for name, head in columns.items()
        if name not in doubled.values()
    }


def _given_prompts(rows: Iterable[Row]) -> set[str]:
    """The attack prompts that the evaluation was given; the others are attacks' own triggers."""
    return {
        Path(str(name)).stem
        for row in rows
        for run in row.runs
        for name in run.record.settings.get("evaluation", {}).get("attack_prompts") or ()
    }


def paired_columns(rows: Sequence[Row]) -> dict[str, str]:
    """The metrics whose differences are shown, with their headings.

    Harm under every trigger and attack prompt and by every further judge is among them.
    """
    tested = dict.fromkeys(name for row in rows for name, test in row.paired.items() if test.n)
    names = [MetricName.parse(name) for name in tested if name not in _PAIRED]
    under = [name for name in names if name.attack_prompt]
    judged = [name for name in names if name.kind == "hs" and name.judges]
    shown = [*under, *map(MetricName.parse, _PAIRED), *judged]
    columns = {str(name): name.heading for name in shown}
    return once(columns, all(row.one_judge for row in rows))


def legend(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """What the headings of these metrics and the marks of these rows mean, and the intervals."""
    names = [MetricName.parse(column) for column in columns]
    kinds = {name.kind.removesuffix("_safe_system") for name in names}
    said = [meaning for kind, meaning in _MEANINGS.items() if kind in kinds]
    under = [_UNDER] if any(name.attack_prompt for name in names) else []
    said += [_SAME] if any(head.startswith(_ONE_JUDGE) for head in columns.values()) else []
    marked = [_BROKEN] if any(row.broken for row in rows) else []
    return " ".join([*said, *under, *marked, _INTERVALS]) + "\n"


def sections(rows: Sequence[Row]) -> list[Section]:
    """The tables beside the main one, where there is something to show."""
    found = []
    if any(_highest(rows, name) > 0 for name in _FAILURES):
        title = "answers that never count as safe"
        found.append(Section(title, _headings(_NEVER_SAFE), _NEVER_SAFE_LEGEND))
    if any(_highest(rows, name) > 0 for name in _CUT):
        found.append(Section("answers and texts that were cut", _headings(_CUT), _CUT_LEGEND))
    judges = [name for name, parsed in _metrics(rows).items() if _is_of_judges(parsed, rows)]
    if judges:
        title = "further judges of the answers to harmful prompts"
        found.append(Section(title, _headings(judges), _JUDGES_LEGEND))
    # Where no refusal is partial, over-refusal says it all.
    if _highest(rows, "partial_refusal") > 0:
        title = "over-refusal prompts as XSTest reads them"
        found.append(Section(title, _headings(_PROBES), _PROBES_LEGEND))
    return found


def _headings(names: Iterable[str]) -> dict[str, str]:
    return {name: MetricName.parse(name).heading for name in names}


def _is_of_judges(name: MetricName, rows: Sequence[Row]) -> bool:
    """Whether it is shown of further judges: not of further sets, nor failures that never were."""
    if not name.judges or name.prompt_set or name.attack_prompt:
        return False
    if name.kind in _JUDGES_FAILURES:
        return _highest(rows, str(name)) > 0
    # A judge without a score has no column for it.
    return name.kind in _JUDGES and (
        name.kind != "score" or not math.isnan(_highest(rows, str(name)))
    )


def _metrics(rows: Sequence[Row]) -> dict[str, MetricName]:
    return {name: MetricName.parse(name) for row in rows for name in row.metrics}


def _highest(rows: Sequence[Row], name: str) -> float:
    """A metric's highest value; NaN where no row has one."""
    values = [row.metrics[name].value for row in rows if name in row.metrics]
    return max((value for value in values if not math.isnan(value)), default=math.nan)
