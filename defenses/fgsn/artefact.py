"""FGSN's artefact: the prompts as tokens, their categories, and the layers' gaps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.artefacts import ROWS, prompt_rows, require_files
from defenses.base import Calibration, Models
from defenses.fgsn.layers import hidden_states, safety_gap
from modeling.capture import TokenRow
from modeling.checkpoint import identify
from modeling.deltas import alignment, frobenius
from modeling.projections import projections
from settings import DataError, ModelError, SettingError

if TYPE_CHECKING:
    from defenses.fgsn import FGSN

RECORD = "fgsn.json"
ALL = "all"
BENIGN = ""  # Key of the benign prompts, which no dimension can have.


def write_artefact(
    settings: FGSN, models: Models, calibration: Calibration, out: Path
) -> dict[str, Any]:
    """Writes the token rows of both kinds of prompts and the layers' gaps; returns diagnostics.

    Raises:
        DataError: There are too few prompts.
        SettingError: A dimension isn't among the prompts' categories.
        ModelError: Alignment changed nothing.
    """
    harmful, benign = calibration.safety_prompts, calibration.utility_prompts
    if not harmful or len(benign) < 2:
        raise DataError(
            f"defense=fgsn compares {len(harmful)} harmful with {len(benign)} benign prompts; "
            "give at least one in sources.safety_prompts and two in sources.utility_prompts"
        )
    categories = [prompt.category for prompt in harmful]
    _check_dimensions(settings, categories)
    names = list(projections(models.aligned))
    _require_direction(models, names)
    texts = [prompt.text for prompt in (*benign, *harmful)]
    if settings.tokens == "answer":
        answers = calibration.respond(models.aligned, texts)
        rows = calibration.encode(models.aligned, texts, answers)
    else:
        rows = prompt_rows(calibration, models.aligned, texts)
    report: dict[str, Any] = {
        "benign": len(benign),
        "harmful": {name: categories.count(name) for name in dict.fromkeys(categories)},
    }
    if settings.layers == "auto":
        states = hidden_states(models.aligned, names, rows, settings.batch_size)
        parts = states[:, : len(benign)], states[:, len(benign) :]
        report["gaps"] = safety_gap(*parts, settings.n_pairs, settings.seed)
    content = {"categories": categories, "benign": rows[: len(benign)]}
    (out / ROWS).write_text(json.dumps(content | {"harmful": rows[len(benign) :]}))
    record = {"aligned": identify(models.aligned), **report}
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return report


def read_artefact(
    settings: FGSN, artefact: Path
) -> tuple[dict[str, Any], dict[str, list[TokenRow]]]:
    """The artefact's record, and the token rows of each dimension and the benign prompts.

    Raises:
        ModelError: It is incomplete.
        SettingError: A dimension isn't among the prompts' categories.
    """
    require_files(artefact, "fgsn", ROWS, RECORD)
    content = json.loads((artefact / ROWS).read_text())
    categories = content["categories"]
    _check_dimensions(settings, categories)
    harmful = [(prompt, answer) for prompt, answer in content["harmful"]]
    rows = {
        name: [row for row, own in zip(harmful, categories, strict=True) if own == name]
        for name in settings.dimensions or ()
    } or {ALL: harmful}
    rows[BENIGN] = [(prompt, answer) for prompt, answer in content["benign"]]
    return json.loads((artefact / RECORD).read_text()), rows


def _check_dimensions(settings: FGSN, categories: Sequence[str]) -> None:
    for name in settings.dimensions or ():
        if name not in categories:
            raise SettingError(
                f"defense.dimensions: {name!r} is no category of sources.safety_prompts; "
                f"choose from {', '.join(sorted(set(categories)))}"
            )


def _require_direction(models: Models, names: list[str]) -> None:
    if not any(frobenius(alignment(models, name, "cpu")) > 0 for name in names):
        raise ModelError(
            "defense=fgsn projects on what alignment changed, but model.aligned has the very "
            "projections of model.base (D = 0); set model.base to the model before alignment"
        )
