"""`python -m defenses.safetylock`: a lock built, looked at and applied without an experiment."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from defenses.safetylock.__main__ import main
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from tests.defenses.tiny_lora_models import number_pairs, save_base

SETTINGS = ("defense.n_pairs=12", "defense.last_tokens=3", "defense.k=4", "defense.alpha=5.0")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [asdict(pair) for pair in number_pairs(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def lock(run: Run, aligned: Checkpoint, pairs: Path, tmp_path: Path) -> Path:
    out = tmp_path / "lock"
    model = ("--model", aligned.base, "--adapter", aligned.adapter)
    code, _, err = run("build", *model, "--pairs", pairs, "--out", out, *SETTINGS)
    assert code == 0, err
    return out


def test_a_lock_is_built_inspected_and_applied(
    run: Run, lock: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    assert sorted(path.name for path in lock.iterdir()) == ["lock.json", "lock.safetensors"]
    code, shown, _ = run("inspect", lock)
    assert code == 0
    assert "3 layers x 4 heads of 8" in shown
    assert "K=4, alpha=5.0" in shown
    out = tmp_path / "locked"
    model = ("--model", attacked.base, "--adapter", attacked.adapter)
    code, said, err = run("apply", lock, *model, "--out", out)
    assert code == 0, err
    assert "4 heads at alpha 5" in said
    ids = torch.tensor([[3, 8, 12, 5]])
    with torch.no_grad():
        locked = load_model(Checkpoint(str(out))).eval()(input_ids=ids).logits
        before = load_model(attacked).eval()(input_ids=ids).logits
    assert (locked - before).abs().max() > 0.1


def test_k_and_alpha_can_be_chosen_when_applied(
    run: Run, lock: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    model = ("--model", attacked.base, "--adapter", attacked.adapter)
    chosen = ("--k", 2, "--alpha", "-1.5", "--dtype", "bfloat16")
    code, said, _ = run("apply", lock, *model, "--out", tmp_path / "out", *chosen)
    assert code == 0
    assert "2 heads at alpha -1.5" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_mistakes_are_one_sentence_and_leave_nothing(
    run: Run, lock: Path, aligned: Checkpoint, pairs: Path, tmp_path: Path
) -> None:
    other = save_base(tmp_path / "wide", width=48)
    built = ("build", "--model", aligned.base, "--pairs", pairs, "--out", tmp_path / "new")
    applied = ("apply", lock, "--model", aligned.base, "--out", tmp_path / "new")
    mistakes = {
        "defense.n_pairs=100, but sources.safety_pairs has only 16": (*built, "defense.k=2"),
        "defense.kk is not a setting; did you mean defense.k?": (*built, "defense.kk=2"),
        "'k=2' is no setting; write defense.NAME=VALUE": (*built, "k=2"),
        "more than the model's 12 heads": (*built, "defense.k=13"),
        "exists; give a folder that doesn't": (*applied[:-1], lock),
        "--k=13 is not among 1 to 12": (*applied, "--k", 13),
        "head_dim=12, but the lock": ("apply", lock, "--model", other.base, *applied[-2:]),
        "no lock (lock.safetensors is missing)": ("apply", tmp_path, *applied[2:]),
        "--model='./nowhere' is not a folder": (*applied[:2], "--model", "./nowhere", *applied[4:]),
        "is no lock": ("inspect", tmp_path),
    }
    before = sorted(tmp_path.iterdir())
    for sentence, arguments in mistakes.items():
        code, _, err = run(*arguments)
        assert code == 1
        said = err.rpartition("error: ")[2]
        assert said.count("\n") == 1
        assert sentence in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_of_an_experiment_needs_k_and_alpha(
    run: Run, lock: Path, aligned: Checkpoint, tmp_path: Path
) -> None:
    metadata = json.loads((lock / "lock.json").read_text())
    (lock / "lock.json").write_text(json.dumps({**metadata, "k": None, "alpha": None}))
    apply = ("apply", lock, "--model", aligned.base, "--out", tmp_path / "out")
    assert "give --k" in run(*apply)[2]
    assert "give --alpha" in run(*apply, "--k", 2)[2]
    assert run(*apply, "--k", 2, "--alpha", 3)[0] == 0
