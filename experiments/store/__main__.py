"""`python -m experiments.store`: list, prune and verify the stage store."""

from __future__ import annotations

import argparse
import re
import time
from calendar import timegm
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from experiments.store import Store
from experiments.store.manifest import read_manifest
from settings import RelockError
from settings.terminal import exit_code

# Where runs write to, wherever they are started.
_ROOT = Path(__file__).resolve().parents[2] / "outputs" / "store"
_OTHER_COLUMNS = 68
_PIPED_WIDTH = 200
_LONGEST = 40
_CLASSES = ("_target_", "defense", "judge", "task")
_UNITS = {"m": 60, "h": 3600, "d": 86400}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it asks; returns the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _do(options))


def _do(options: argparse.Namespace) -> int:
    store = Store(options.root)
    if not store.root.is_dir():
        raise RelockError(f"{str(store.root)!r} is no folder; give the store's with --root")
    if options.command == "list":
        return _list(store)
    if options.command == "verify":
        return _verify(store)
    return _prune(store, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.store", description=__doc__)
    parser.add_argument("--root", default=_ROOT, help="the store (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every stage with its size, age and seconds")
    commands.add_parser("verify", help="hash every file; exit 1 if one is damaged")
    prune = commands.add_parser("prune", help="remove stages; says what it would do without --yes")
    prune.add_argument("--all", action="store_true", help="every stage")
    prune.add_argument(
        "--leftovers", action="store_true", help="no stage, only half-made folders of killed runs"
    )
    prune.add_argument("--stage", action="append", help="only stages of this name (repeatable)")
    prune.add_argument(
        "--defense",
        metavar="NAME",
        help="only what a defense made (stages prepare and apply), e.g. nlsr, or its class's name",
    )
    prune.add_argument(
        "--older-than", type=_age, metavar="AGE", help="only older ones: 30m, 12h, 7d"
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

    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, markup=False)
    table = Table(title=str(store.root))
    for head in ("stage", "key", "size", "age", "took", "settings"):
        table.add_column(head, no_wrap=True)
    room = max(8, console.width - _OTHER_COLUMNS)
    entries = list(store.entries())
    settings = {each.key: dict(_flat(read_manifest(each.folder)["settings"])) for each in entries}
    sizes = [_size(entry.folder) for entry in entries]
    for entry, size in zip(entries, sizes, strict=True):
        others = [settings[each.key] for each in entries if each.name == entry.name]
        summary = _summary(settings[entry.key], others)
        table.add_row(
            entry.name,
            entry.key,
            decimal(size),
            _duration(_seconds_old(entry.folder)),
            f"{entry.seconds:.1f} s",
            summary if len(summary) <= room else summary[: room - 1] + "…",
        )
    console.print(table)
    console.print(f"{len(entries)} stages, {decimal(sum(sizes))}")
    return 0


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name, without hashes; classes by their own names."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and not re.fullmatch(r"[\[\]', 0-9a-f]{16,}", str(value)):
            text = str(value).rpartition(".")[2] if _is_class(key, value) else str(value)
            yield f"{prefix}{key}", text[:_LONGEST]


def _is_class(key: str, value: Any) -> bool:
    return key in _CLASSES and "." in str(value)


def _summary(settings: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> str:
    """The classes that a stage was made by, and what sets it apart from others of its name."""
    classes = [text for name, text in settings.items() if name.rpartition(".")[2] in _CLASSES]
    apart = [
        f"{name}={text}"
        for name, text in settings.items()
        if any(each.get(name) != text for each in alike) and text not in classes
    ]
    return " ".join([*dict.fromkeys(classes), *apart])


def _verify(store: Store) -> int:
    damaged = list(store.damaged())
    for folder, name in damaged:
        print(f"{folder.parent.name} {folder.name}: {name} is damaged")
    hint = "; `prune --damaged --yes` removes them" if damaged else ""
    print(f"{len(damaged)} damaged{hint}")
    return 1 if damaged else 0


def _prune(store: Store, options: argparse.Namespace) -> int:
    """Removes what was chosen, and half-made folders of killed runs.

    Raises:
        RelockError: Nothing was chosen, or by a name that nothing has.
    """
    chosen = _chosen(store, options)
    sizes = {folder: _size(folder) for folder in chosen}
    if not options.yes:
        total = decimal(sum(sizes.values()))
        print(f"would remove {len(chosen)} stages, {total}; add --yes to do it")
        return 0
    busy = [folder for folder in chosen if not store.remove(folder.parent.name, folder.name)]
    for folder in busy:
        print(f"{folder.parent.name} {folder.name} is in use; left")
        del sizes[folder]
    print(f"removed {len(sizes)} stages, {decimal(sum(sizes.values()))}")
    leftovers = store.remove_leftovers()
    if leftovers:
        print(f"removed {leftovers} half-made folders of killed runs")
    return 0


def _chosen(store: Store, options: argparse.Namespace) -> list[Path]:
    """The folders of the stages that the options choose."""
    by = (options.all, options.stage, options.defense, options.older_than, options.damaged)
    if not (options.leftovers or any(by)):
        raise RelockError(
            "prune is to be told what to remove: --stage, --defense, --older-than, --damaged, "
            "--leftovers, or --all for every stage"
        )
    if not any(by):
        return []
    whole = [entry.folder for entry in store.entries()]
    folders = [folder for folder, _ in store.damaged()] if options.damaged else whole
    for name in options.stage or ():
        _check_known("stage", name, {folder.parent.name for folder in (*whole, *folders)})
    if options.defense:
        makers = [maker for folder in whole if (maker := _maker(folder))]
        if not any(_is_of(options.defense, maker) for maker in makers):
            _check_known("defense", options.defense, {maker.rpartition(".")[2] for maker in makers})
    return [
        folder
        for folder in folders
        if (not options.stage or folder.parent.name in options.stage)
        and (not options.defense or _is_of(options.defense, _maker(folder)))
        and _seconds_old(folder) >= (options.older_than or 0)
    ]


def _check_known(kind: str, name: str, known: set[str]) -> None:
    if name not in known:
        there = f"; there is {', '.join(sorted(known))}" if known else ""
        raise RelockError(f"--{kind}={name}: the store holds nothing of this {kind}{there}")


def _is_of(defense: str, maker: str) -> bool:
    """Whether a class is a defense of this name, its package's or its own."""
    return defense.lower() in maker.lower().split(".")


def _maker(folder: Path) -> str:
    """The class of the defense that made a stage; "" of other stages and of damaged ones."""
    if folder.parent.name not in ("prepare", "apply"):
        return ""
    try:
        settings = read_manifest(folder)["settings"]
    except (OSError, ValueError):
        return ""
    return str(settings.get("defense") or settings.get("_target_"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds_old(folder: Path) -> float:
    """How long ago the stage was made; by its folder's time where the manifest is damaged."""
    try:
        created = timegm(time.strptime(read_manifest(folder)["created"], "%Y-%m-%dT%H:%M:%SZ"))
    except (OSError, ValueError):
        created = int(folder.stat().st_mtime)
    return time.time() - created


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    raise SystemExit(main())
