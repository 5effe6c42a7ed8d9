"""`python -m experiments.dashboard SWEEP`: a W&B workspace and a report for a sweep."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.launch.job import quiet_libraries
from settings import RelockError
from settings.terminal import exit_code

if TYPE_CHECKING:
    from experiments.report.pool import Run
    from experiments.tracking.wandb_tracker import WandbTracker

_KINDS = ("workspace", "report")
_NOBODY = "ENTITY"


def main(arguments: list[str] | None = None) -> int:
    """Reads the sweep, sums it up on W&B, and makes or updates what shows it there."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("relock").setLevel(logging.INFO)
    kinds = [kind for kind in _KINDS if getattr(options, kind)] or list(_KINDS)
    return exit_code(lambda: _dashboard(options, kinds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.dashboard", description=__doc__)
    parser.add_argument("sweep", type=Path, help="a sweep's folder, or a single run's")
    parser.add_argument("--project", help="W&B project (default: the one the sweep was tracked in)")
    parser.add_argument("--entity", help="W&B user or team (default: likewise, or the key's own)")
    parser.add_argument("--workspace", action="store_true", help="make only the workspace")
    parser.add_argument("--report", action="store_true", help="make only the report")
    parser.add_argument(
        "--track",
        action="store_true",
        help="first upload the runs that are not on W&B yet; without a key, track them offline",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="send nothing; write what would be sent to the sweep's folder",
    )
    return parser


def _dashboard(options: argparse.Namespace, kinds: list[str]) -> int:
    from experiments.report import figures, html, published, tables
    from experiments.report.pool import collect
    from experiments.tracking import panels, wandb_fields
    from experiments.tracking.wandb_tracker import sweep_name

    sweep: Path = options.sweep
    if not sweep.is_dir():
        raise RelockError(f"{sweep} is not a folder; give a sweep's folder")
    collected = wandb_fields.shareable(collect([sweep]))
    if not collected.runs:
        raise RelockError(f"no record.json under {sweep}; give the folder of a finished sweep")
    tracker = panels.tracker_of(collected.runs, options.project, options.entity)
    group = tracker.group or sweep_name(sweep)
    if not options.dry_run:
        _check_uploads(options, collected.runs, tracker)
        entity = panels.find_entity(tracker.entity, tracker.project, group, len(collected.runs))
        tracker = tracker.model_copy(update={"entity": entity})
    comparisons = published.comparisons(collected)
    page = html.write(collected, comparisons, [sweep], sweep / "wandb", shared=True)
    images = figures.write(collected, sweep / "report")
    content = panels.Content(
        sweep=group,
        project=tracker.project,
        entity=tracker.entity or _NOBODY,
        figures=[panels.figure_key(path) for path in images],
        table=tables.markdown(collected),
        varies_ratio=any("attack.poison_ratio" in row.settings for row in collected.rows),
    )
    if options.dry_run:
        for path in [*panels.write(content, sweep / "report"), page, *images]:
            print(path)
        return 0
    with panels.explained():
        url = panels.sum_up(collected, page, images, tracker, sweep, group)
    print(f"summary run: {url}")
    for kind, address in panels.save(content, sweep / "wandb", kinds).items():
        print(f"{kind}: {address}")
    return 0


def _check_uploads(options: argparse.Namespace, runs: Sequence[Run], tracker: WandbTracker) -> None:
    """Uploads what `--track` asks for; refuses to go on without a key or before all is uploaded."""
    from experiments.tracking import panels
    from experiments.tracking.wandb_tracker import has_key

    untracked, waiting = panels.missing(runs)
    if options.track:
        to_track = [*untracked, *(waiting if tracker.online else ())]
        panels.track(to_track, tracker, options.sweep)
        untracked, waiting = panels.missing(runs)
    command = _again(options)
    if untracked:
        command += " --track"
    elif waiting:
        command = f"{panels.sync_command(options.sweep, waiting)} && {command}"
    if not has_key():
        raise RelockError(
            "no W&B API key was found; set WANDB_API_KEY or run `wandb login`, then run "
            f"`{command}`"
        )
    if untracked or waiting:
        raise RelockError(f"not all of the sweep's runs are on W&B; run `{command}`")


def _again(options: argparse.Namespace) -> str:
    """The command line as it was given, without what is done once."""
    parts = ["python", "-m", "experiments.dashboard", str(options.sweep)]
    parts += [f"--{kind}" for kind in _KINDS if getattr(options, kind)]
    for name in ("project", "entity"):
        if value := getattr(options, name):
            parts += [f"--{name}", value]
    return shlex.join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
