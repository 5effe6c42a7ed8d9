"""`prepare`: a defense's artefact, made once per aligned model, without a stage store."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.own_answers import open_prompts
from defenses.base import Models
from experiments.config.experiment import Experiment
from experiments.pipeline.inputs import read_calibration
from experiments.pipeline.pipeline import find_models, stored_calibration
from experiments.pipeline.prompt_sets import LeakFilter
from experiments.pipeline.steps.defense import Prepare
from experiments.repairing.artefact import REPAIR
from experiments.store import Store
from experiments.store.manifest import write_manifest
from modeling.shards import new_folder
from settings import SettingError


def prepare(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Prepares a defense into a new folder, which appears complete or not at all.

    Returns:
        The stage's report: cost and diagnostics, and under "repair" what `apply` reads.

    Raises:
        RelockError: One sentence on what is wrong or missing.
    """
    experiment.runtime.prepare(None)
    defense, settings = experiment.defense, experiment.model
    base, aligned = find_models(settings)
    assert aligned is not None
    defense.check(Models(base.checkpoint, aligned.checkpoint), None)
    rows = read_calibration(experiment, LeakFilter([]))
    if open_prompts(rows["safety_pairs"]):
        raise SettingError(
            "sources.safety_pairs leaves answers to the base model, which an experiment alone asks "
            "for them; give pairs that are there (--calibration, or another sources=...)"
        )
    if defense.calibration_answers:
        experiment.evaluation.backend.chosen(base.checkpoint).check(base.checkpoint)
        experiment.evaluation.harm_judge.check("evaluation.harm_judge")
    with new_folder(out) as folder, TemporaryDirectory() as store:
        calibration = stored_calibration(experiment, rows, base, aligned, Store(store))
        step = Prepare(defense, base, aligned, calibration)
        start = time.perf_counter()
        report = step.run(folder)
        seconds = time.perf_counter() - start
        report[REPAIR] = {
            "method": experiment.labels["defense"],
            "defense": experiment.resolved["defense"],
            "plugins": experiment.resolved["plugins"],
            "model": settings.model_dump(mode="json", exclude={"presets"}),
            "calibration": dict(Counter({name: len(each) for name, each in rows.items() if each})),
        }
        identity = {"stage": step.stage.name, "key": step.stage.key, "version": step.stage.version}
        further = {"settings": step.stage.settings, "inputs": list(step.stage.inputs)}
        write_manifest(folder, identity | further, report, seconds)
    return report
