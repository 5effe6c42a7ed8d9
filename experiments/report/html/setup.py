"""The set-up of a report's runs in words: what was run on what, asked what, judged by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.report.cut_rows import cut_rows
from experiments.report.names import plain
from experiments.report.pool import Run

_MOST_NAMES = 4


def title(runs: Sequence[Run]) -> str:
    """Experiment, models, attacks, defenses and day, as a heading; "" without runs."""
    if not runs:
        return ""
    experiment, models, attacks, defenses = (
        _several(run.record.labels.get(name, "") for run in runs)
        for name in ("experiment", "model", "attack", "defense")
    )
    days = sorted({run.record.created[:10] for run in runs})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    repaired = f", repaired by {defenses}" if defenses else ""
    return f"{f'{experiment}: ' if experiment else ''}{attacks} on {models}{repaired} ({when})"


def _several(names: Iterable[str]) -> str:
    """Names in words, "none" left out; of many the first ones."""
    distinct = [name for name in dict.fromkeys(names) if name not in ("", "none")]
    if len(distinct) > _MOST_NAMES:
        left = len(distinct) - _MOST_NAMES + 1
        return f"{', '.join(distinct[: _MOST_NAMES - 1])} and {left} more"
    return " and ".join(filter(None, (", ".join(distinct[:-1]), *distinct[-1:])))


def setup(runs: Sequence[Run]) -> dict[str, str]:
    """By heading, what the runs have in common or each for itself, in words."""
    said = {
        "Model": _each(runs, _model),
        "Alignment": _each(runs, _alignment),
        "Attack": _attacks(runs),
        "Rows that were cut": "; ".join(cut_rows(runs)),
        "Defense": _each(runs, _defense),
        "Prompts": _each(runs, _prompts),
        "Judges": _each(runs, _judges),
        "Decoding": _each(runs, _decoding),
        "Seeds": ", ".join(map(str, sorted({run.record.seed for run in runs}))),
        "Versions": _each(runs, _versions),
    }
    return {heading: words for heading, words in said.items() if words}


def _each(runs: Iterable[Run], say: Callable[[Run], str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, map(say, runs))))


def _model(run: Run) -> str:
    record = run.record
    dtype = run.flat.get("model.dtype")
    known = [
        f"{role} {record.models[role]}" for role in ("base", "aligned") if role in record.models
    ]
    return f"{record.labels['model']} ({', '.join([*known, *([dtype] if dtype else [])])})"


def _alignment(run: Run) -> str:
    own = run.record.labels.get("align")
    return f"made here by {own}" if own else "as published"


def _attacks(runs: Iterable[Run]) -> str:
    """Every attack with what it trained on and how; several values where runs differ in one."""
    attacks: dict[str, dict[str, dict[str, None]]] = {}
    for run in sorted(runs, key=lambda run: run.flat.get("attack.poison_ratio") or 0):
        record, flat = run.record, run.flat
        facts = {
            "rows": " and ".join(
                f"{count} {kind}" for kind, count in record.attack.get("rows", {}).items() if count
            ),
            "model": flat.get("attack.model"),
            "poison ratio": flat.get("attack.poison_ratio"),
            "epochs": flat.get("attack.train.epochs"),
            "learning rate": flat.get("attack.train.learning_rate"),
            "adapter": flat.get("attack.adapter"),
        }
        known = attacks.setdefault(_on(record.labels), {})
        for name, value in facts.items():
            if value not in (None, ""):
                known.setdefault(name, {})[plain(value)] = None
    said = {
        attack: ", ".join(f"{name} {' or '.join(values)}" for name, values in facts.items())
        for attack, facts in attacks.items()
    }
    return "; ".join(f"{attack} ({facts})" if facts else attack for attack, facts in said.items())


def _on(labels: dict[str, str]) -> str:
    return " on ".join(filter(None, (labels["attack"], labels["task"])))


def _defense(run: Run) -> str:
    labels = run.record.labels
    if labels["defense"] == "none":
        return ""
    return labels["defense"] + (f", then {labels['refine']}" if labels.get("refine") else "")


def _prompts(run: Run) -> str:
    sources: dict[str, Any] = run.record.data.get("sources", {})
    asked = run.measured[["set", "id"]].drop_duplicates()["set"].value_counts(sort=False)
    parts = [
        f"{count} {name}" + (f" from {sources[name]['name']}" if name in sources else "")
        for name, count in asked.items()
    ]
    return ", ".join(parts)


def _judges(run: Run) -> str:
    parts = []
    for role, identity in run.record.judges.items():
        details = [f"{k} {identity[k]}" for k in ("weights", "threshold", "match") if k in identity]
        named = f"{role}: {identity.get('judge', 'unknown')}"
        parts.append(f"{named} ({', '.join(details)})" if details else named)
    return ", ".join(parts)


def _decoding(run: Run) -> str:
    length = run.flat.get("model.max_new_tokens")
    backends = {str(each["_target_"]).rpartition(".")[2] for each in run.record.backends.values()}
    parts = [f"at most {length} new tokens"] if length else []
    parts += [f"by {' and '.join(sorted(backends))}"] if backends else []
    return ", ".join(["greedy", *parts])


def _versions(run: Run) -> str:
    environment = run.record.environment
    known = {"commit": environment.get("commit"), "Python": environment.get("python")}
    known |= {"CUDA": environment.get("cuda"), **environment.get("packages", {})}
    said = [f"{name} {version}" for name, version in known.items() if version]
    return ", ".join([*said, *filter(None, [environment.get("platform")])])
