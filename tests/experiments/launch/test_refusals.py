"""Launchers that couldn't run a job, folders that can't be had: one sentence, and no job."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import run


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 runs"),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=0"],
            "hydra.launcher.timeout_min=0 ends every job at once",
        ),
        (["hydra/launcher=submitit_slurm"], "needs Slurm's sbatch, srun, squeue, scontrol on PATH"),
    ],
)
def test_options_that_run_nothing_are_refused(
    overrides: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = ["run", "-m", *overrides, "defense=none,reset", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 1
    out, err = capfd.readouterr()
    (error,) = err.strip().splitlines()
    assert error.startswith("error: ")
    assert sentence in error
    assert not out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_folder_that_cannot_be_made_is_one_sentence(
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    line = ["run", *(["-m"] if mode == "sweep" else []), "defense=none", f"hydra.{mode}.dir={file}"]
    monkeypatch.setattr("sys.argv", line)
    assert run.main() == 1
    (error,) = capfd.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {str(file)!r} can't be made a folder")
