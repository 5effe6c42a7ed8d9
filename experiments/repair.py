"""`python -m experiments.repair`: any defense on models that are there, without an experiment."""

from __future__ import annotations

import argparse
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from experiments.config.experiment import register_resolvers
from experiments.launch.sweep import run_command
from experiments.repairing.shown import cost, describe, edited, working
from modeling.checkpoint import Dtype
from settings import SettingError
from settings.places import check_folder

EXAMPLES = """examples:
  prepare nlsr --base B --aligned A --calibration rows.jsonl --out reference
  prepare safetylock --base B --aligned A --calibration pairs.jsonl --set k=24 --out reference
  apply reference --model CUSTOMER --out REPAIRED
  inspect reference
  import Meta-Llama-3-8B-Instruct.safelock --model meta-llama/Meta-Llama-3-8B-Instruct --out lock

B, A and CUSTOMER are folders or hub ids: full weights or LoRA adapters. rows.jsonl holds one JSON
object per line with a harmful "prompt" and, where the defense needs pairs, "chosen" (the safe
answer) and "rejected". A bare --set NAME=VALUE is the defense's (conf/defense); any other setting
of a run can be given too, such as --set model=llama3 for that model's presets, or
--set judge@evaluation.harm_judge=keyword.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it asks; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _start(options))


def _start(options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    register_resolvers()
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.repair",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a defense's artefact, once per model")
    prepare.add_argument("method", help="an option of conf/defense")
    prepare.add_argument("--base", required=True, help="the model before alignment")
    prepare.add_argument("--aligned", required=True, help="the aligned model")
    prepare.add_argument("--calibration", type=Path, help="a file of harmful rows")
    prepare.add_argument("--benign", type=Path, help="a file of benign prompts")
    _add_common(prepare, "folder of the artefact")
    prepare.set_defaults(run=_prepare)

    apply = commands.add_parser("apply", help="repair fine-tuned models")
    apply.add_argument("artefact", type=Path, help="what prepare or import left")
    apply.add_argument("--model", required=True, nargs="+", help="the fine-tuned models")
    apply.add_argument("--base", help="where the base model is now, if it has moved")
    apply.add_argument("--aligned", help="where the aligned model is now, if it has moved")
    apply.add_argument("--base-of-adapter", help="the weights under --model's adapter")
    apply.add_argument(
        "--link", action="store_true", help="weights files that stay the same: links, not copies"
    )
    _add_common(apply, "folder of the repaired model, or of one folder for each of several")
    apply.set_defaults(run=_apply)

    inspect = commands.add_parser("inspect", help="say what an artefact holds")
    inspect.add_argument("artefact", type=Path)
    inspect.add_argument("--k", type=int, help="show so many heads of a lock")
    inspect.set_defaults(run=_inspect)

    imported = commands.add_parser("import", help="read a published Meta-SafetyLock")
    imported.add_argument("file", type=Path, help="the .safelock")
    imported.add_argument("--model", required=True, help="the aligned model that it is for")
    imported.add_argument("--alpha", type=float, default=6.0, help="strength (default: 6)")
    imported.add_argument("--out", type=Path, required=True, help="folder of the lock")
    imported.set_defaults(run=_import)
    return parser


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=Path, required=True, help=f"{out}; must not exist")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; repeatable"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        help="precision to run and to write (default: as the model is stored)",
    )


def _prepare(options: argparse.Namespace) -> None:
    from experiments.repairing.composing import compose
    from experiments.repairing.preparing import prepare

    _require_new(options.out)
    experiment = compose(
        options.method,
        options.base,
        options.aligned,
        options.set,
        options.calibration,
        options.benign,
        options.dtype,
    )
    with working(f"preparing {options.method}"):
        report = prepare(experiment, options.out)
    print(f"prepared {options.method}: {cost(report)}")
    print(options.out)


def _apply(options: argparse.Namespace) -> None:
    from experiments.repairing.applying import Repair, outputs
    from experiments.repairing.artefact import open_artefact
    from modeling.stored import linking

    places = list(outputs(options.model, options.out))
    artefact = open_artefact(options.artefact)
    defense = artefact.defense(options.set)
    with working(f"opening {artefact.method}"):
        repair = Repair(artefact, defense, artefact.models(options.base, options.aligned))
        models = [repair.open(name, options.base_of_adapter, options.dtype) for name, _ in places]
    for model, (name, out) in zip(models, places, strict=True):
        with working(f"repairing {name}"), linking() if options.link else nullcontext():
            report = repair.write(model, f"--model={name!r}", out)
        print(f"repaired {name}: {cost(report)}, {edited(report)}")
        print(out)


def _inspect(options: argparse.Namespace) -> None:
    from experiments.repairing.artefact import open_artefact

    for line in describe(open_artefact(options.artefact), options.k):
        print(line)


def _import(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from defenses.safetylock.published import read_published
    from modeling.checkpoint import Checkpoint
    from modeling.heads import head_layout
    from modeling.shards import new_folder

    _require_new(options.out)
    lock = read_published(options.file, head_layout(Checkpoint(options.model)), options.model)
    with new_folder(options.out) as folder:
        replace(lock, alpha=options.alpha).save(folder)
    print(f"imported {lock.k} heads; that they are {options.model}'s can't be verified")
    print(options.out)


def _require_new(out: Path) -> None:
    if out.exists():
        raise SettingError(f"--out={str(out)!r} exists; give a folder that doesn't")
    check_folder(out, "--out")


if __name__ == "__main__":
    raise SystemExit(main())
