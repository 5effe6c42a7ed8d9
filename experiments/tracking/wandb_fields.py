"""Columns of a W&B run: flat, comparable, without a prompt or an answer; the tracker logs them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS, worst_hs
from experiments.config.experiment import PROJECT
from experiments.results.record import Record

if TYPE_CHECKING:
    from experiments.report.pool import Collected

# Where things lie, where they are sent, and presets, which the methods' own settings repeat.
_LEFT_OUT = ("store/", "tracker/", "runtime/", "plugins", "model/presets/")
# Longer settings are texts: templates, system lines, lists of phrases.
_LONGEST = 120
_LONGEST_TAG = 64
# Of an absolute path; a web address, and a path from here, are none.
_PLACE = re.compile(r"""(?<![\w./])(?:file://)?[/~](?!/)[^\s,\]}'"]*""")
_VERSIONS = ("torch", "transformers", "peft", "trl", "vllm")


def config(record: Record, job: str, sweep: str | None) -> dict[str, Any]:
    """One column per setting, "attack/poison_ratio", beside the names of what was chosen.

    Returns:
        Scalars by name. Labels (model, attack, task, defense, ...) stand under their bare names.
        Folders are named without where they lie, and texts by their fingerprints.
    """
    flat = {
        name: value
        for name, value in _flat(record.settings)
        if not name.startswith(_LEFT_OUT) and value is not None
    }
    labels = {name: value for name, value in record.labels.items() if value}
    packages = record.environment["packages"]
    further = {
        "attack_and_defense": f"{labels['attack']} + {labels['defense']}",
        "sweep": sweep,
        "job": job,
        "commit": record.environment["commit"],
        "python": record.environment["python"],
        **{name: packages.get(name) for name in _VERSIONS},
    }
    return flat | labels | {name: value for name, value in further.items() if value is not None}


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", public(value)


def public(value: Any) -> Any:
    """A setting as it may leave this machine: no folder's place, no login, no long text."""
    if isinstance(value, Mapping):
        return _short(",".join(f"{key}={public(each)}" for key, each in value.items()))
    if isinstance(value, list | tuple):
        return _short(f"[{','.join(str(public(each)) for each in value)}]")
    return _short(_without_login(_without_place(value))) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    """A folder of the project from there on, any other absolute one by its name."""
    if not text.startswith(("/", "~")) or "\n" in text:
        return text
    path = Path(text)
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else path.name


def _without_login(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _short(text: str) -> str:
    if len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def tags(record: Record) -> list[str]:
    """What was chosen as "defense:nlsr", cut to the length that W&B allows."""
    return [f"{name}:{value}"[:_LONGEST_TAG] for name, value in record.labels.items() if value]


def summary(record: Record) -> dict[str, float | str]:
    """The record's figures under names that are the same for every defense.

    Returns:
        By name, without those that there were no rows for:

        - "MODEL/METRIC" with "_low", "_high" (95 %) and "_n": shares from 0 to 1, and scores,
          kappas and perplexities in their own units; MODEL is base, aligned, attacked, defended,
          refined, or a step's; "MODEL/hs/CATEGORY" is HS by category;
        - "MODEL/worst_hs" with the same: HS under what the defended model is worst under, plain
          prompts, the attack's own trigger or an attack prompt; "worst_hs_under" names it;
        - "broken": "no", or how the defense broke the model, as "accuracy 0, degenerate 45 %";
        - "difference/METRIC" with "_low", "_high", "_n" and "_p_value": defended less attacked
          over the same prompts; "difference_refined/METRIC": refined less defended;
        - "cost/...": seconds, bytes, scalars, and "cost/share_edited" from 0 to 1;
        - "steps/NUMBER/parameters_edited" and "/share" of a repair in several steps;
        - "seconds/STAGE" and "seconds/run", stages read from the store with what making them took;
        - "stages/made" and "stages/reused": counts.
    """
    values: dict[str, float | str | None] = {}
    worst = worst_hs(record.estimates("defended")) or HS
    values["broken"] = record.broken or "no"
    values["worst_hs_under"] = worst.attack_prompt or "plain prompts"
    for model, metrics in record.metrics.items():
        for metric, estimate in metrics.items():
            _spread(values, f"{model}/{metric}", estimate, ("low", "high", "n"))
        if str(worst) in metrics:
            _spread(values, f"{model}/worst_hs", metrics[str(worst)], ("low", "high", "n"))
    for name, tests in (
        ("difference", record.paired),
        ("difference_refined", record.paired_refined),
    ):
        for metric, test in tests.items():
            figures = {**test, "value": test["difference"]}
            _spread(values, f"{name}/{metric}", figures, ("low", "high", "n", "p_value"))
    values |= {f"cost/{name}": value for name, value in record.cost.items()}
    for number, step in enumerate(record.steps, start=1):
        values |= {f"steps/{number}/{name}": step[name] for name in ("parameters_edited", "share")}
    seconds: dict[str, float] = {}
    for stage in record.stages:
        seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
    values |= {f"seconds/{name}": value for name, value in seconds.items()}
    values["seconds/run"] = record.seconds
    reused = {stage["key"]: stage["reused"] for stage in record.stages}
    values["stages/reused"] = sum(reused.values())
    values["stages/made"] = len(reused) - sum(reused.values())
    return {name: value for name, value in values.items() if value is not None}


def _spread(
    values: dict[str, float | str | None],
    name: str,
    figures: Mapping[str, Any],
    parts: Iterable[str],
) -> None:
    if not figures["n"]:
        return
    values[name] = figures["value"]
    values |= {f"{name}_{part}": figures[part] for part in parts}


def shareable(collected: Collected) -> Collected:
    """Runs and rows with settings as they may leave this machine."""
    runs = {run.folder: replace(run, record=_shareable(run.record)) for run in collected.runs}
    rows = [
        replace(
            row,
            settings={key: public(value) for key, value in row.settings.items()},
            runs=tuple(runs[run.folder] for run in row.runs),
        )
        for row in collected.rows
    ]
    return replace(collected, runs=list(runs.values()), rows=rows)


def _shareable(record: Record) -> Record:
    pairs = (override.partition("=") for override in record.overrides)
    # A place may stand within a list or mapping.
    shown = [f"{key}{sign}{public(_PLACE.sub(_last_name, value))}" for key, sign, value in pairs]
    settings, judges, data = map(_shareable_tree, (record.settings, record.judges, record.data))
    return replace(record, overrides=shown, settings=settings, judges=judges, data=data)


def _shareable_tree(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _shareable_tree(value) for key, value in node.items()}
    return [_shareable_tree(each) for each in node] if isinstance(node, list) else public(node)


def _last_name(place: re.Match[str]) -> str:
    return str(_without_place(place[0].removeprefix("file://")))
