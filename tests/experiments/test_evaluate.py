"""`python -m experiments.evaluate`: models that are there, measured side by side."""

from __future__ import annotations

import html
import shlex
from pathlib import Path

import pandas as pd
import pytest

from experiments.config.experiment import PROJECT
from experiments.evaluate import main, names
from experiments.report.__main__ import main as report
from experiments.results.record import Record
from settings import SettingError

ALIGNED = str(PROJECT / "organism" / "weights" / "aligned")
BASE = str(PROJECT / "organism" / "weights" / "base")
SMALL = (
    "model=organism",
    "evaluation.limits.harmful=6",
    "evaluation.limits.task=4",
    "evaluation.limits.held_out=4",
    "evaluation.limits.over_refusal=4",
    "sources.benign=null",
)


def test_models_are_measured_side_by_side_and_tested(
    customer: dict[str, Path],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, models = tmp_path / "evaluation", [BASE, ALIGNED, str(customer["merged"])]
    assert main([*models, *SMALL, f"store.root={store}", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "aligned against base: HS -100.0" in shown
    assert "merged against base: HS" in shown
    assert "leakage isn't checked" in shown
    record = Record.read(out)
    assert list(record.metrics) == ["base", "aligned", "merged"]
    figures = ("hs", "asr", "accuracy_strict", "over_refusal", "perplexity")
    assert all(record.metrics["merged"][figure]["n"] for figure in figures)
    assert {stage["name"] for stage in record.stages} == {
        "generate", "likelihood", "judge", "score",
    }  # fmt: skip
    assert report([str(out), "--html"]) == 0
    table = pd.read_csv(out / "report" / "table.csv")
    assert table["measured"].tolist() == ["base", "aligned", "merged"]
    assert table["hs_p_holm"].notna().tolist() == [False, True, True]
    page = (out / "report" / "report.html").read_text()
    assert "Against base" in page
    assert "unknown, so that leakage" in page
    again = shlex.join([*models, *SMALL, f"store.root={store}"])
    assert f"python -m experiments.evaluate {again}" in html.unescape(page)
    assert main([*models, *SMALL, "--out", str(out)]) == 1, "a record stays"
    assert "holds something; give a folder that doesn't exist" in capsys.readouterr().err


def test_models_are_named_by_the_end_that_tells_them_apart() -> None:
    assert names(["/a/x/model", "/a/y/model", "some/hub-id"]) == ["x/model", "y/model", "hub-id"]
    with pytest.raises(SettingError, match="named twice"):
        names(["a", "./a"])


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mistakes = {
        "MODEL='./nowhere' is not a folder": ["./nowhere", "model=organism"],
        "did you mean evaluation.limits.harmful?": [BASE, "evaluation.limits.harmfull=2"],
        "there is no MODEL": ["model=organism"],
        "defense=nlsr is not for experiments.evaluate": [BASE, "model=organism", "defense=nlsr"],
        "refine=benign_ft is not for experiments.evaluate": [BASE, "attack@refine=benign_ft"],
        "attack=explicit is not for experiments.evaluate": [BASE, "attack=explicit"],
    }
    for sentence, arguments in mistakes.items():
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
