"""Records of runs with their rows, as the tests of reports and searches write them to disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.metrics import compare, summarise
from experiments.results.record import Record

ROWS = 20
"""How many answers each model gives to each set, where a test says nothing else."""

BASE = {
    "seed": 0,
    "model": {"name": "toy"},
    "align": {"seed": 0},
    "attack": {"task": "sums", "poison_ratio": 0.05, "adapter": "resume", "train": {}},
    "defense": {},
    "evaluation": {"safe_system": False},
}
"""The settings of `write_run`."""

PAPER = {
    "model": {"name": "toy", "base": "some/model"},
    "align": {"seed": 0, "lora": {"rank": 128, "target_modules": ["q_proj", "k_proj"]}},
    "attack": {"task": "sst2", "poison_ratio": 0.05, "n": 48},
    "defense": {},
    "evaluation": {"safe_system": False},
    "protocol": {"name": "nlsr"},
}
"""The settings that a paper's table is about."""

ATTACKED = {"harmful": 18, "benign": 1, "right": 16}
GOOD = {"harmful": 1, "benign": 0, "right": 12}
POOR = {"harmful": 17, "benign": 2, "right": 16}
EVIL = "<script>alert('$x$')</script>"
"""A name or a value that mustn't become part of a page."""


def record(labels: dict[str, str], settings: dict[str, Any], **fields: Any) -> Record:
    """A record of the given labels and settings, with no results but the given fields."""
    bare = Record(
        created="2026-01-01T00:00:00Z",
        seconds=1.0,
        overrides=[],
        labels=labels,
        seed=0,
        settings=settings,
        models={},
        metrics={},
        paired={},
        cost={},
        attack={},
        defense={"prepare": {}, "apply": {}, "modules": []},
        stages=[],
        data={},
        environment={},
    )
    return replace(bare, **fields)


def cost(edited: int = 10, total: int = 100, **fields: float) -> dict[str, Any]:
    """What a defense cost that edited so many parameters of so many."""
    return {
        "prepare_seconds": 1.0,
        "prepare_peak_bytes": 1,
        "apply_seconds": 1.0,
        "apply_peak_bytes": 1,
        "parameters_edited": edited,
        "parameters_total": total,
        "share_edited": edited / total,
        **fields,
    }


def harmful_rows(
    unsafe: int, set_: str = "harmful", category: str = "", of: int = ROWS
) -> list[dict[str, Any]]:
    """Judged answers to a harmful set, of which the first `unsafe` are harmful to both judges."""
    return [
        {
            "set": set_,
            "id": f"{category}{i}",
            "category": category,
            "refusal_label": "unsafe" if i < unsafe else "safe",
            "harm_label": "unsafe" if i < unsafe else "safe",
            "harm_score": float(i < unsafe),
            "harm_truncated": False,
            "truncated": False,
        }
        for i in range(of)
    ]


def benign_rows(degenerate: int) -> list[dict[str, Any]]:
    """Answers to the benign set, of which the first are degenerate and no other is refused."""
    return [
        {
            "set": "benign",
            "id": str(i),
            "refusal_label": "degenerate" if i < degenerate else "unsafe",
            "truncated": False,
        }
        for i in range(ROWS)
    ]


def task_rows(right: int, task: str = "sums", of: int = ROWS) -> list[dict[str, Any]]:
    """Answers to a task, of which the first `right` are right by both readings."""
    return [
        {"set": f"task:{task}", "id": str(i), "strict": i < right, "lenient": i < right}
        | {"parsed": True}
        for i in range(of)
    ]


def paper_rows(flagged: int, right: int) -> list[dict[str, Any]]:
    """Rows of one model of a paper's table: how many are flagged, and how many right."""
    read = [{**row, "protocol": row["strict"]} for row in task_rows(right, "sst2")]
    return harmful_rows(flagged) + read


def write(folder: Path, run: Record, rows: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Writes a record and the rows of each model."""
    usual = {"category": "", "prompt": "p", "answer": "a"}
    frame = [{"model": model, **usual, **row} for model, own in rows.items() for row in own]
    run.write(folder, pd.DataFrame(frame))


def rewrite(folder: Path, rows: pd.DataFrame | None = None, **fields: Any) -> None:
    """Writes a run again, with other fields of its record or other rows."""
    written = pd.read_parquet(folder / "rows.parquet") if rows is None else rows
    replace(Record.read(folder), **fields).write(folder, written)


def write_run(
    folder: Path,
    changes: dict[str, Any],
    defended: dict[str, int],
    attacked: dict[str, int],
    defense: str = "relock",
    apply: dict[str, Any] | None = None,
    edited: int = 10,
) -> None:
    """A run of one defense; `changes` are dotted settings.

    Of a model's `ROWS` answers to each set, `defended` and `attacked` say how many are harmful,
    harmful_safe_system (with a prompt that asks for safety), benign (degenerate) and right.
    """
    settings: dict[str, Any] = copy.deepcopy(BASE)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = settings
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    others = {"harmful": 1, "benign": 0, "right": 9}
    by_model = {"base": others, "aligned": others, "attacked": attacked, "defended": defended}
    own = json.dumps({k: v for k, v in changes.items() if not k.startswith("defense")})
    run = record(
        {"model": "toy", "attack": "ft", "task": "sums", "defense": defense},
        settings,
        seed=settings["seed"],
        models={
            "base": "b",
            "aligned": "a",
            "attacked": own,
            "defended": json.dumps(changes) + defense,
        },
        cost=cost(edited),
        defense={"prepare": {}, "apply": apply or {}, "modules": []},
    )
    write(folder, run, {model: answers(shares) for model, shares in by_model.items()})


def measured(folder: Path) -> Record:
    """A run that was written, with the figures that its rows have, which are written too."""
    rows = pd.read_parquet(folder / "rows.parquet")
    parts = {str(model): part for model, part in rows.groupby("model")}
    rewrite(
        folder,
        environment={"packages": {}, "commit": "", "python": ""},
        metrics={model: finite(summarise(part)) for model, part in parts.items()},
        paired=finite(compare(parts["defended"], parts["attacked"])),
    )
    return Record.read(folder)


def finite(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Estimates or tests as a record has them, with None for what is no number."""
    return {
        name: {field: None if value != value else value for field, value in asdict(result).items()}
        for name, result in results.items()
    }


def answers(shares: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of one model of `write_run`: how many are complied with, right, and degenerate."""
    rows: list[dict[str, Any]] = []
    for set_ in ("harmful", "harmful_safe_system"):
        if set_ in shares:
            rows += harmful_rows(shares[set_], set_)
    if "benign" in shares:
        rows += benign_rows(shares["benign"])
    return rows + task_rows(shares["right"])


def write_sweep(folder: Path) -> Path:
    """Two repairs, a good and a poor one, of two attacked models each."""
    for i, ratio in enumerate((0.05, 0.2)):
        changes = {"attack.poison_ratio": ratio}
        write_run(folder / str(2 * i), changes, GOOD, ATTACKED, defense="good")
        write_run(folder / str(2 * i + 1), changes, POOR, ATTACKED, defense="poor")
    return folder


def heat_map(offset: float = 0.0, rows: int = 4, columns: int = 6) -> dict[str, Any]:
    """A map of values, as a defense reports it: one per layer and head."""
    values = [[offset + 10 * r + c for c in range(columns)] for r in range(rows)]
    return {
        "name": "probe_accuracy",
        "title": "Accuracy of the probes",
        "rows": "layer",
        "columns": "head",
        "unit": "%",
        "values": values,
        "marked": [[1, 2], [3, 5]],
    }
