"""Runs of the real command line in this process, on the organism at toy size."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from experiments import run
from experiments.config.experiment import PROJECT
from experiments.results.record import Record

TOY = (
    "model.max_new_tokens=8",
    "attack.n=40",
    "attack.train.epochs=1",
    "evaluation.limits.harmful=12",
    "evaluation.limits.benign=6",
    "evaluation.limits.over_refusal=6",
    "evaluation.limits.task=6",
    "evaluation.limits.held_out=6",
    "sources.calibration.harmful=24",
    "sources.calibration.benign=8",
    "model.presets.nlsr.calibration_rows=16",
)


# The least that a run can do.
SMALL = (
    "tracker=none",
    "model.max_new_tokens=6",
    "attack.n=16",
    "attack.train.epochs=1",
    "evaluation.limits.harmful=4",
    "evaluation.limits.task=4",
    "evaluation.limits.held_out=4",
    "sources.benign=null",
    "sources.over_refusal=null",
)
# Over `TOY`, where no answer matters.
SHORT = ("model.max_new_tokens=6", "attack.n=16")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Finished:
    """What a command line left: its exit code, its output, and its folder."""

    code: int
    out: str
    err: str
    folder: Path


Command = Callable[..., Finished]


def made(folder: Path) -> Counter[str]:
    """How many stages of which name a run made."""
    stages = Record.read(folder).stages
    return Counter({s["key"]: s["name"] for s in stages if not s["reused"]}.values())


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage store for the whole session and all its workers, as users have one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "stages"


@pytest.fixture(scope="session")
def customer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a customer hands in: the organism's aligned adapter trained on, and the same merged."""
    import torch

    from modeling.checkpoint import Checkpoint
    from modeling.loading import load_model
    from modeling.training import write_merged

    folder, weights = tmp_path_factory.mktemp("customer"), PROJECT / "organism" / "weights"
    base, aligned = str(weights / "base"), str(weights / "aligned")
    torch.manual_seed(0)
    model = load_model(Checkpoint(base, aligned), trainable_adapter=True)
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
    model.save_pretrained(folder / "adapter")
    write_merged(Checkpoint(base, str(folder / "adapter")), folder / "merged")
    return {name: folder / name for name in ("adapter", "merged")}


@pytest.fixture
def command(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """`python -m experiments.run ...` with its runs under `tmp_path`, offline from any hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def call(*arguments: str, toy: bool = True) -> Finished:
        # A later override of the same key wins, so a test may change any of these.
        flags = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        line = [*flags, "tracker=none", f"store.root={store}", *(TOY if toy else ()), *overrides]
        line += [f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["run", *line])
            if not any(each.startswith("experiment=") for each in overrides):
                # Only an experiment sets a mode, which Hydra composes everything to read.
                patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            try:
                code = run.main()
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        out, err = capfd.readouterr()
        folder = tmp_path / ("sweep" if "-m" in arguments else "run")
        return Finished(code, out, err, folder)

    return call
