"""`python -m experiments.store`: list, prune and verify the stage store."""

from __future__ import annotations

import argparse
import json
import re
import time
from calendar import timegm

from experiments.store import MANIFEST, StageResult, Store

_OTHER_COLUMNS = 68
_UNITS = {"m": 60, "h": 3600, "d": 86400}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it asks; returns the exit code."""
    options = _parser().parse_args(arguments)
    store = Store(options.root)
    if options.command == "list":
        return _list(store)
    if options.command == "verify":
        return _verify(store)
    return _prune(store, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.store", description=__doc__)
    parser.add_argument("--root", default="outputs/store", help="the store (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every stage with its size, age and seconds")
    commands.add_parser("verify", help="hash every file; exit 1 if one is damaged")
    prune = commands.add_parser("prune", help="remove stages; says what it would do without --yes")
    prune.add_argument("--stage", action="append", help="only stages of this name (repeatable)")
    prune.add_argument(
        "--older-than", type=_age, default=0.0, metavar="AGE", help="only older ones: 30m, 12h, 7d"
    )
    prune.add_argument("--damaged", action="store_true", help="only those that verify complains of")
    prune.add_argument("--yes", action="store_true", help="really remove them")
    return parser


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write 30m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _list(store: Store) -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=str(store.root))
    for head in ("stage", "key", "size", "age", "took", "settings"):
        table.add_column(head, no_wrap=True)
    room = max(8, console.width - _OTHER_COLUMNS)
    total = count = 0
    for entry in store.entries():
        manifest = json.loads((entry.folder / MANIFEST).read_text())
        size = _size(entry)
        total, count = total + size, count + 1
        summary = json.dumps(manifest["settings"])
        table.add_row(
            entry.name,
            entry.key,
            _bytes(size),
            _duration(_seconds_old(entry)),
            f"{entry.seconds:.1f} s",
            summary if len(summary) <= room else summary[: room - 1] + "…",
        )
    console.print(table)
    console.print(f"{count} stages, {_bytes(total)}")
    return 0


def _verify(store: Store) -> int:
    damaged = list(store.damaged())
    for folder, name in damaged:
        print(f"{folder.parent.name} {folder.name}: {name} is damaged")
    hint = "; `prune --damaged --yes` removes them" if damaged else ""
    print(f"{len(damaged)} damaged{hint}")
    return 1 if damaged else 0


def _prune(store: Store, options: argparse.Namespace) -> int:
    damaged = {folder for folder, _ in store.damaged()} if options.damaged else None
    chosen = [
        entry
        for entry in store.entries()
        if (not options.stage or entry.name in options.stage)
        and _seconds_old(entry) >= options.older_than
        and (damaged is None or entry.folder in damaged)
    ]
    freed = sum(_size(entry) for entry in chosen)
    if not options.yes:
        print(f"would remove {len(chosen)} stages, {_bytes(freed)}; add --yes to do it")
        return 0
    busy = [entry for entry in chosen if not store.remove(entry.name, entry.key)]
    for entry in busy:
        print(f"{entry.name} {entry.key} is in use; left")
    freed -= sum(_size(entry) for entry in busy)
    print(f"removed {len(chosen) - len(busy)} stages, {_bytes(freed)}")
    leftovers = store.remove_leftovers()
    if leftovers:
        print(f"removed {leftovers} half-made folders of killed runs")
    return 0


def _size(entry: StageResult) -> int:
    return sum(path.stat().st_size for path in entry.folder.rglob("*") if path.is_file())


def _seconds_old(entry: StageResult) -> float:
    created = json.loads((entry.folder / MANIFEST).read_text())["created"]
    return time.time() - timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    raise SystemExit(main())
