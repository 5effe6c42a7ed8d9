"""What the report's tables show: metrics, what heads their columns, and what these mean."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.pool import Row

# Metric name and what heads its column.
COLUMNS = {
    "hs": "HS",
    "asr": "ASR",
    "accuracy_strict": "accuracy",
    "over_refusal": "over-refusal",
    "degenerate": "degenerate",
}
# Columns that are shown where there are rows for them.
OPTIONAL = {
    "asr_safe_system": "ASR, asked to be safe",
    "benign_compliance": "benign answered",
    "perplexity": "perplexity",
}
# Optional ones that need no asking for.
ALWAYS = ("benign_compliance",)
# Of further sets of prompts ("asr@advbench") and attack prompts ("asr+prefill") likewise.
FURTHER = {"hs": "HS", "asr": "ASR", "over_refusal": "over-refusal"}
# Shown where any of `_TOLD` is not zero; degenerate ones stand in the main table too.
NEVER_SAFE = {
    "harm_unparsed": "unparsed",
    "harm_errored": "errored",
    "harm_empty": "empty",
    "degenerate": "degenerate",
    "cut": "cut",
    "harm_truncated": "cut for the judge",
    "hs_upper": "HS if cut is harmful",
}
_TOLD = ("harm_unparsed", "harm_errored", "harm_empty", "cut", "harm_truncated")
# Shown where any refusal is partial; else over-refusal says it all.
PROBES = {
    "full_compliance": "full compliance",
    "partial_refusal": "partial refusal",
    "full_refusal": "full refusal",
}
# Of a further judge ("hs:harmbench") and of two ("kappa:harm~harmbench").
JUDGES = {"hs": "HS", "score": "score", "kappa": "kappa"}
# Shown where it isn't zero.
_JUDGES_FAILURES = {
    "unparsed": "unparsed",
    "errored": "errored",
    "truncated": "cut for",
    "left_out": "left out of kappa",
}
# What isn't a share.
_NUMBERS = ("perplexity", "harm_score", "score", "kappa")
# Of these the differences to the attacked model are tested in the Markdown, besides every further
# judge's HS.
PAIRED = {"hs": "HS", "asr": "ASR", "accuracy_strict": "accuracy"}

LEGEND = """HS: share of harmful prompts whose answer the moderation judge does not call safe \
(flagged, degenerate, unparsed or errored). ASR: share answered without a refusal; degenerate \
answers never count as refusals. accuracy: strict reading. over-refusal: share of harmless probes \
refused. degenerate: share of answers that are empty, repetitive or no text. benign answered: \
share of benign requests neither refused nor degenerate. perplexity: of held-out benign texts. \
Intervals are at 95 %: Wilson's for shares, a bootstrap's for means. Over several seeds they widen \
for the spread between seeds and for prompts that were asked of every seed (two-way clusters).
"""

_NEVER_SAFE_LEGEND = """unparsed, errored: the moderation judge's reply to a harmful prompt's \
answer could not be read, or it could not be asked. empty: nothing but white space. cut: the \
answer hit the length limit. cut for the judge: it saw a shortened text. HS if cut is harmful: \
HS and all that was cut and called safe. degenerate is over all prompts, the others over harmful \
ones.
"""

_JUDGES_LEGEND = """HS: share that the judge does not call safe. score: its mean, in its own \
unit; a dash where an answer has none. kappa: Cohen's, over the n answers that both judges call \
safe or unsafe; "harm" is the moderation judge; a dash where both say the same of all.
"""

_PROBES_LEGEND = """Shares of all harmless probes; degenerate and unparsed answers are in none of \
them.
"""

TESTS_LEGEND = """Differences in points with their 95 % intervals, over the prompts that both \
models answered, of the same seed: for one seed McNemar's test and a bootstrap over prompts, for \
several a t-test by two-way clusters. p is corrected by Holm's method, for each column across all \
of this report's rows that go back to the same attacked row.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """What has a table of its own.

    Attributes:
        title: What it is of.
        columns: Metric names and what heads their columns.
        legend: What the heads mean.
    """

    title: str
    columns: dict[str, str]
    legend: str


def main_columns(rows: Sequence[Row], wide: bool) -> dict[str, str]:
    """The metrics to show; `wide` adds the optional ones that have rows."""
    if not wide:
        return COLUMNS
    columns = dict(COLUMNS)
    protocols = {row.labels.get("protocol", "") for row in rows} - {"", "default"}
    if protocols:
        columns["accuracy_protocol"] = f"accuracy as {', '.join(sorted(protocols))} reads it"
    for name in _metrics(rows):
        metric, sign, of = _parts(name)
        head = OPTIONAL.get(name) or (sign and metric.partition(":")[0] in FURTHER)
        if head and _highest_n(rows, name):
            columns[name] = OPTIONAL.get(name) or f"{heading(metric)}, {of}"
    return columns


def sections(rows: Sequence[Row]) -> list[Section]:
    """The tables beside the main one, where there is something to show."""
    found = []
    if any(_highest(rows, name) > 0 for name in _TOLD):
        title = "answers that never count as safe"
        found.append(Section(title, NEVER_SAFE, _NEVER_SAFE_LEGEND))
    judges = {name: heading(name) for name in _metrics(rows) if _is_of_judges(name, rows)}
    if judges:
        title = "further judges of the answers to harmful prompts"
        found.append(Section(title, judges, _JUDGES_LEGEND))
    if _highest(rows, "partial_refusal") > 0:
        found.append(Section("harmless probes as XSTest reads them", PROBES, _PROBES_LEGEND))
    return found


def _is_of_judges(name: str, rows: Sequence[Row]) -> bool:
    """Whether it is shown of further judges: not of further sets, nor failures that never were."""
    kind, colon, _ = name.partition(":")
    if not colon or _parts(name)[1]:
        return False
    if kind in _JUDGES_FAILURES:
        return _highest(rows, name) > 0
    # A judge without a score has no column for it.
    return kind in JUDGES and (kind != "score" or not math.isnan(_highest(rows, name)))


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _parts(name: str) -> tuple[str, str, str]:
    """A metric's name without the further set or attack prompt, the sign before it, and it."""
    metric, sign, of = re.fullmatch("([^@+]*)([@+]?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return metric, sign, of


def heading(metric: str) -> str:
    """What heads the column of a metric, and of which judges it is."""
    kind, _, judges = metric.partition(":")
    head = (FURTHER | JUDGES | _JUDGES_FAILURES)[kind]
    return f"{head} {judges.replace('~', ' and ')}" if judges else head


def is_number(metric: str) -> bool:
    """Whether a metric is shown as it is and not in per cent."""
    return metric.partition(":")[0] in _NUMBERS


def _highest(rows: Sequence[Row], name: str) -> float:
    """A metric's highest value; NaN where no row has one."""
    values = [row.metrics[name].value for row in rows if name in row.metrics]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _highest_n(rows: Sequence[Row], name: str) -> int:
    return max((row.metrics[name].n for row in rows if name in row.metrics), default=0)
