"""A repair's settings: those of a run, as far as a defense and its calibration read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.sources import FilePrompts, JsonlPairs
from experiments.config.experiment import Experiment
from experiments.config.jobs import expand
from experiments.repairing.applying import stored_dtype
from modeling.checkpoint import Checkpoint, on_hub
from modeling.model_files import verify_folder
from settings import SettingError

# Sections of the configuration; any other setting is the defense's.
_SECTIONS = (
    "model", "evaluation", "sources", "data", "prompts", "judges", "judge", "backend", "protocol",
    "plugins", "runtime", "defense", "text",
)  # fmt: skip


def overrides(given: Sequence[str]) -> list[str]:
    """Overrides of a run for `--set NAME=VALUE`; a bare NAME is the defense's.

    Raises:
        SettingError: One is no NAME=VALUE.
    """
    found = []
    for text in given:
        name, sign, _ = text.partition("=")
        bare = name.lstrip("+~")
        if not sign or not bare:
            raise SettingError(f"--set {text!r} is no setting; write --set NAME=VALUE")
        section = bare.replace("@", ".").replace("/", ".").partition(".")[0]
        mark = name[: len(name) - len(bare)]
        found.append(text if section in _SECTIONS else f"{mark}defense.{bare}{text[len(name) :]}")
    return found


def compose(
    method: str,
    base: str,
    aligned: str,
    given: Sequence[str],
    calibration: Path | None,
    benign: Path | None,
    dtype: str | None,
) -> Experiment:
    """The experiment whose defense is prepared.

    Args:
        method: An option of `conf/defense`.
        base: Folder or hub id of the model before alignment.
        aligned: Likewise of the aligned one; an adapter on `base`, or full weights.
        given: `--set` as NAME=VALUE.
        calibration: A file of harmful rows; None for the configuration's own sources.
        benign: A file of benign prompts; likewise.
        dtype: Of the models; None: as the configuration says, or as they are stored.

    Raises:
        SettingError: A setting is wrong; one sentence.
        ModelError: A model isn't there.
    """
    own = overrides(given)
    said = any(each.startswith(("model=", "model.dtype=")) for each in own)
    if not any(each.startswith("model=") for each in own):
        own = ["model=local", "model.base=.", *own]
    lines = [f"defense={method}", "tracker=none", "model.alignment=published", "model.aligned=."]
    (experiment,) = expand([*lines, *own], multirun=False)
    _check_there("--base", base, experiment.model.revision)
    _check_there("--aligned", aligned, None)
    if dtype is None and not said:
        dtype = stored_dtype(Checkpoint(base, revision=experiment.model.revision))
    places = {"base": base, "aligned": aligned}
    changes = places if dtype is None else {**places, "dtype": dtype}
    model = experiment.model.model_copy(update=changes)
    rows: dict[str, Any] = {}
    if calibration is not None:
        harmful, pairs = FilePrompts(path=str(calibration)), JsonlPairs(path=str(calibration))
        rows = {"calibration": harmful, "safety_prompts": harmful, "safety_pairs": pairs}
        # What isn't given isn't fetched from the hub either.
        rows["utility_prompts"] = None
    if benign is not None:
        rows["utility_prompts"] = FilePrompts(path=str(benign))
    return replace(experiment, model=model, sources=replace(experiment.sources, **rows))


def _check_there(setting: str, name: str, revision: str | None) -> None:
    """Refuses (ModelError) a model that is neither a folder nor on the hub, by its own option."""
    hub = on_hub(name, revision, setting)
    if hub is None:
        verify_folder(name, setting)
    else:
        hub.fetch(["*config.json"])
