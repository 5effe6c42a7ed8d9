"""What must stay: the keys of all stages of reference jobs, and the main job's rows and figures.

A key that changes makes everybody's stored stages worthless; a figure that changes was wrong before
or is wrong now. `python -m tests.experiments.pipeline.test_reference` writes
down today's, for a change that is meant and whose commit says which and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.config.experiment import register_resolvers
from experiments.config.jobs import expand
from experiments.plan.dry_run import walk
from experiments.plan.models import Library
from experiments.results.record import Record
from tests.experiments.conftest import Command

REFERENCE = Path(__file__).parent / "reference"
REFINE = ("attack@refine=harmful_ft", "refine.poison_ratio=0.5")
# By name: the command line, "-m" first where it is a sweep.
JOBS: dict[str, tuple[str, ...]] = {
    "main": ("defense=nlsr", "attack=harmful_ft", "model=organism"),
    "defenses": (
        "-m",
        "defense=none,reset,nlsr,safetylock,fgsn,safelora,resta,wanda_prune,antidote,stack",
        "+scale=toy",
    ),
    "refine": ("-m", "defense=none,nlsr,safetylock", "refine.adapter=fresh", *REFINE),
    "attacks": (
        "-m",
        "attack=harmful_ft,explicit,identity_shift,benign_ft",
        "defense=none",
        "seed=0,1",
    ),
    "adapters": ("-m", "attack.adapter=resume,fresh,full", "defense=none"),
    "own alignment": (
        "-m",
        "align=organism,nlsr_sft,nlsr_dpo",
        "model.alignment=own",
        "defense=none",
        "+scale=toy",
    ),
    "tasks": ("-m", "attack.task=arithmetic,sentiment,topic,small_talk", "defense=none"),
    "real tasks": (
        "-m",
        "attack.task=sst2,ag_news,gsm8k,alpaca,dolly",
        "attack.n=8",
        "data.root=${oc.env:REFERENCE_ROWS}",
        "defense=none",
    ),
    "measuring": (
        "evaluation.attack_prompts=[prefill,roleplay]",
        "evaluation.judges=[keyword]",
        "evaluation.safe_system=true",
        "protocol=booster",
        "evaluation.tasks=[arithmetic,topic]",
    ),
    "validation": ("evaluation.split=validation",),
}
SST2 = ("a warm and funny film", 1), ("dull from start to end", 0)
NEWS_FILES = {"train": "train_subset_10k.csv", "test": "test.csv"}
NEWS = ((3, "Chips", "A new chip"), (2, "Shares", "Shares fell"), (4, "Cup", "They won"))


def write_rows(root: Path) -> None:
    """A few rows for each of the tasks that are read from files."""
    for name, count in (("train", 60), ("test", 8)):
        numbers = range(count)
        lines = [f"{text} {number}\t{label}" for number in numbers for text, label in SST2]
        _write(root / "sst2" / f"{name}.tsv", ["sentence\tlabel", *lines])
        news = [
            f'"{label}","{title} {number}","{text} {number}."'
            for number in numbers
            for label, title, text in NEWS
        ]
        _write(root / "ag_news" / NEWS_FILES[name], news)
        sums = [
            {"question": f"How much are {n} and {n}?", "answer": f"It is.\n#### {2 * n}"}
            for n in numbers
        ]
        _write(root / "gsm8k" / f"{name}.jsonl", map(json.dumps, sums))
    talk = [{"instruction": f"Say {n}.", "input": "", "output": f"Number {n}."} for n in range(60)]
    _write(root / "instructions" / "alpaca_5000.json", [json.dumps(talk)])
    dolly = [
        {"instruction": f"Say {n}.", "context": "", "response": f"{n}.", "category": "open_qa"}
        for n in range(60)
    ]
    _write(root / "instructions" / "dolly_subset_387.jsonl", map(json.dumps, dolly))


def _write(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def planned_keys(overrides: Sequence[str]) -> list[str]:
    """Every stage of a command line as "NAME KEY", as they are on an empty store."""
    register_resolvers()
    line = [each for each in overrides if each != "-m"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_rows(root / "rows")
        os.environ["REFERENCE_ROWS"] = str(root / "rows")
        line += [f"store.root={root / 'store'}", "tracker=none"]
        ledger = walk(expand(line, multirun="-m" in overrides), Library(root / "library"))
        return sorted(f"{entry.name} {key}" for key, entry in ledger.entries.items())


@pytest.mark.parametrize("name", JOBS)
def test_the_keys_of_all_stages_are_those_of_before(name: str) -> None:
    expected = json.loads((REFERENCE / "keys.json").read_text())
    assert planned_keys(JOBS[name]) == expected[name]


TOY_JOB = ("defense=nlsr", "+scale=toy", "runtime.threads=1")


def arithmetic() -> str:
    """A hash of what this machine's floating point makes of some products and exponentials."""
    import torch

    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left = torch.randn(64, 768, generator=generator)
    right = torch.randn(768, 320, generator=generator)
    product = (left @ right).softmax(-1).log().tanh()
    found = [
        product,
        product.sum(0),
        torch.nn.functional.silu(product),
        product.rsqrt().nan_to_num(),
    ]
    torch.set_num_threads(threads)
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in found)).hexdigest()[:20]


def toy_results(folder: Path, printed: str) -> dict[str, Any]:
    """The rows of a run as a hash for each of its models and sets, its figures, its tables."""
    rows = pd.read_parquet(folder / "rows.parquet")
    record = Record.read(folder)
    return {
        "stages": sorted({f"{stage['name']} {stage['key']}" for stage in record.stages}),
        "models": record.models,
        "rows": {
            f"{model} {name}": _digest(part)
            for (model, name), part in rows.groupby(["model", "set"], sort=True)
        },
        "metrics": record.metrics,
        "paired": record.paired,
        "edited": record.cost["parameters_edited"],
        "tables": [line for line in printed.splitlines() if line[:1] in "┏┃┡│└"],
    }


def _digest(rows: pd.DataFrame) -> str:
    text = rows.dropna(axis="columns", how="all").to_csv(index=False, float_format="%.4g")
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def test_the_main_jobs_rows_and_figures_are_those_of_before(
    command: Command, tmp_path: Path
) -> None:
    expected = json.loads((REFERENCE / "toy.json").read_text())
    if arithmetic() != expected["arithmetic"]:
        pytest.skip("this machine's floating point rounds otherwise than the reference's")
    # Of its own: scores that another test had made in another batch differ in a last digit.
    run = command(*TOY_JOB, f"store.root={tmp_path / 'store'}", toy=False)
    assert run.code == 0, run.err
    found = toy_results(run.folder, run.out)
    for part in found:
        assert found[part] == expected[part], part


def _write_down() -> None:
    import subprocess

    keys = {name: planned_keys(line) for name, line in JOBS.items()}
    counts = {
        name: dict(Counter(each.split()[0] for each in found)) for name, found in keys.items()
    }
    print(json.dumps(counts, indent=1))
    (REFERENCE / "keys.json").write_text(json.dumps(keys, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        line = [*TOY_JOB, "tracker=none", f"store.root={scratch}/store", f"hydra.run.dir={folder}"]
        command = [sys.executable, "-m", "experiments.run", *line]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = {"arithmetic": arithmetic(), **toy_results(folder, printed)}
    (REFERENCE / "toy.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    _write_down()
