"""`python -m experiments.evaluate MODEL ...`: any models measured side by side, nothing trained."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.config.experiment import PROJECT, Experiment, register_resolvers
from experiments.config.jobs import expand
from experiments.launch.sweep import run_command
from experiments.results.command_line import EVALUATE, override_key
from settings import SettingError
from settings.places import check_folder

EXAMPLES = """examples:
  ./customer ./repaired model=llama3
  ./customer ./repaired model=organism attack.task=arithmetic evaluation.limits.harmful=100

A MODEL is a folder or hub id: full weights, or a LoRA adapter that says in its adapter_config.json
what it sits on. What holds a "=" is a setting, as for python -m experiments.run; without model=NAME
the models are local ones. The first MODEL is what the others are tested against.
"""


def main(arguments: list[str] | None = None) -> int:
    """Measures the models of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL|NAME=VALUE")
    parser.add_argument("--base-of-adapter", help="the weights under every MODEL's adapter")
    parser.add_argument("--out", type=Path, help="folder of the record (default: in outputs/)")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _start(options))


def _start(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("relock").setLevel(logging.INFO)
    register_resolvers()
    settings = [each for each in options.models if "=" in each and not Path(each).exists()]
    models = [each for each in options.models if each not in settings]
    day, now = time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S")
    folder = options.out or PROJECT / "outputs" / "evaluations" / day / now
    experiment = _composed(models, settings)
    check_folder(folder, "--out", new=True)
    evaluate(experiment, models, options.base_of_adapter, settings, folder)
    return 0


def evaluate(
    experiment: Experiment,
    models: Sequence[str],
    base: str | None,
    settings: list[str],
    folder: Path,
) -> None:
    """Measures models by the stages of a run, writes their record and prints it.

    Args:
        experiment: What they are asked, how, and by whom they are judged.
        models: Folders and hub ids.
        base: The weights under the adapters among them; None: as each says.
        settings: Overrides, for the record.
        folder: Where the record goes.

    Raises:
        RelockError: One sentence on what is wrong or missing.
    """
    from transformers.utils import logging as transformers_logging

    from experiments.launch.progress.listener import listening
    from experiments.pipeline.checks import check_settings
    from experiments.pipeline.given import GivenModels
    from experiments.pipeline.inputs import read_inputs
    from experiments.pipeline.pipeline import Pipeline
    from experiments.pipeline.recording import measured_record
    from experiments.pipeline.runner import Runner
    from experiments.pipeline.steps.base import Model
    from experiments.report.run_table import print_measured
    from experiments.results.environment import environment
    from experiments.store import Store
    from modeling.checkpoint import Checkpoint
    from modeling.loading import chat_template

    start = time.perf_counter()
    transformers_logging.disable_progress_bar()
    like = Model(Checkpoint("", dtype=experiment.model.dtype), "", experiment.model.prompt)
    given = GivenModels(like, {})
    opened = {
        called: given.open(name, "MODEL", base=base, base_setting="--base-of-adapter")
        for called, name in zip(names(models), models, strict=True)
    }
    for called, model in opened.items():
        style = experiment.model.prompt.fitted(chat_template(model.checkpoint), None)
        opened[called] = replace(model, style=style)
    inputs = read_inputs(experiment)
    checkpoints = [model.checkpoint for model in opened.values()]
    check_settings(experiment, inputs, checkpoints, aligns=False)
    progress = experiment.runtime.progress
    with listening(folder, in_sweep=False, progress=progress) as listener:
        runner = Runner(Store(experiment.store), listener, isolate=experiment.runtime.isolate)
        pipeline = Pipeline(experiment, inputs, like, None, runner)
        rows = pipeline.rows(opened, pipeline.measure(opened))
    seconds = time.perf_counter() - start
    command = [*EVALUATE, *models, *([] if base is None else ["--base-of-adapter", base])]
    record = measured_record(
        experiment, inputs, opened, rows, pipeline.stages, settings, environment(), seconds
    )
    record = replace(record, command=command)
    record.write(folder, rows)
    print_measured(folder)


def names(models: Sequence[str]) -> list[str]:
    """The shortest end of each folder or hub id that tells it from the others.

    Raises:
        SettingError: One is named twice.
    """
    if len({Path(model).resolve() for model in models}) < len(models):
        raise SettingError("a MODEL is named twice; name each once")
    parts = [Path(model).parts for model in models]
    found = []
    for own in parts:
        ends = (own[-length:] for length in range(1, len(own) + 1))
        end = next((e for e in ends if sum(other[-len(e) :] == e for other in parts) == 1), own)
        found.append(str(Path(*end)))
    return found


def _composed(models: Sequence[str], settings: Sequence[str]) -> Experiment:
    if not models:
        raise SettingError("there is no MODEL; name a folder or hub id")
    for override in settings:
        _check_measures(override)
    local = [] if any(s.startswith("model=") for s in settings) else ["model=local", "model.base=."]
    (experiment,) = expand(
        [
            "attack=given",
            "attack.model=.",
            "defense=none",
            "model.aligned=.",
            "model.alignment=published",
            "tracker=none",
            *local,
            *settings,
        ],
        multirun=False,
    )
    experiment.resolved["attack"]["model"] = ", ".join(models)
    return experiment


def _check_measures(override: str) -> None:
    """Refuses a setting of what comes before the measuring, which would be ignored."""
    group, _, rest = override_key(override).partition(".")
    if group in ("defense", "attack@refine", "refine") or (group == "attack" and rest != "task"):
        raise SettingError(
            f"{override} is not for experiments.evaluate, which trains and repairs nothing; leave "
            "it out, or use experiments.run or experiments.repair"
        )


if __name__ == "__main__":
    raise SystemExit(main())
