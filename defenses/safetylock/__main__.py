"""`python -m defenses.safetylock`: build, inspect and apply locks, without an experiment."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from defenses.safetylock import SafetyLock
from modeling.checkpoint import Checkpoint
from modeling.shards import new_folder
from settings import RelockError, SettingError

if TYPE_CHECKING:
    from defenses.safetylock.lock import Lock

EXAMPLES = """examples:
  build    --model meta-llama/Meta-Llama-3-8B-Instruct --pairs pairs.jsonl --out lock
  inspect  lock
  apply    lock --model ./customer-model --out ./customer-model-locked

pairs.jsonl: one JSON object per line, with prompt, chosen (safe answer) and rejected (unsafe one).
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it asks; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except RelockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m defenses.safetylock",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="take a lock from an aligned model")
    _add_model(build, "the original aligned model")
    build.add_argument(
        "--pairs", required=True, type=Path, help="JSONL of prompt, chosen, rejected"
    )
    build.add_argument("--out", required=True, type=Path, help="folder to write, must not exist")
    build.add_argument("--style", choices=("chat", "alpaca"), default="chat", help="of prompts")
    build.add_argument(
        "settings",
        nargs="*",
        metavar="defense.NAME=VALUE",
        help="as in conf/defense/safetylock.yaml",
    )
    build.set_defaults(run=_build)

    inspect = commands.add_parser("inspect", help="say what a lock holds")
    inspect.add_argument("lock", type=Path)
    inspect.add_argument("--k", type=int, help="show this many heads (default: the lock's own)")
    inspect.set_defaults(run=_inspect)

    apply = commands.add_parser("apply", help="write a locked copy of a fine-tuned model")
    apply.add_argument("lock", type=Path)
    _add_model(apply, "the fine-tuned model")
    apply.add_argument("--out", required=True, type=Path, help="folder to write, must not exist")
    apply.add_argument("--k", type=int, help="how many heads (default: the lock's own)")
    apply.add_argument("--alpha", type=float, help="strength (default: the lock's own)")
    apply.set_defaults(run=_apply)
    return parser


def _add_model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model", required=True, help=f"{what}: a folder or a hub id")
    parser.add_argument("--adapter", help="a PEFT LoRA folder on top of it")
    parser.add_argument("--revision", help="hub revision of --model")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="precision to run and to write (default: as the model is stored)",
    )


def _build(options: argparse.Namespace) -> None:
    from data.sources import JsonlPairs
    from modeling.chat import PromptStyle
    from modeling.heads import head_layout

    defense = SafetyLock.validated(_settings(options.settings), "defense")
    aligned = _checkpoint(options)
    pairs = JsonlPairs(path=str(options.pairs)).pairs()
    k = defense.heads(head_layout(aligned))
    _require_new(options.out)
    with new_folder(options.out) as folder:
        lock, _, report = defense.build(aligned, pairs, PromptStyle(style=options.style))
        lock = replace(lock, k=k, alpha=defense.alpha)
        lock.save(folder)
    stability = lock.stability(k)
    print(
        f"{options.out}: {k} of {lock.accuracy.numel()} heads, from {report['pairs_used']} pairs; "
        f"head set's Jaccard index over {stability['seeds']} splits "
        f"{stability['jaccard']:.2f}; activations {report['capture_seconds']:.1f} s, "
        f"probes {report['probe_seconds']:.1f} s"
    )


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from defenses.safetylock.lock import load_lock
    from modeling.checkpoint import fingerprint_folder

    lock = load_lock(options.lock, "LOCK")
    console = Console(highlight=False)
    layout, origin = lock.layout, lock.origin
    console.print(
        f"{layout.model_type}, {layout.layers} layers x {layout.heads} heads of "
        f"{layout.head_dim}, hidden size {layout.hidden}"
    )
    console.print(f"taken from model {origin['base']}, adapter {origin['adapter'] or 'none'}")
    console.print(
        f"chat template {origin['chat_template']}, lock {fingerprint_folder(options.lock)}"
    )
    console.print(", ".join(f"{name}={value}" for name, value in lock.settings.items()))
    k = _head_count(options.k, lock)
    stability = lock.stability(k)
    table = Table(title=f"K={k}, alpha={lock.alpha}", title_justify="left")
    for head in ("layer", "head", "sigma", "score", "probe accuracy", "chosen by seeds"):
        table.add_column(head, justify="right")
    for entry, share in zip(lock.describe(lock.heads(k)), stability["frequency"], strict=True):
        figures = (f"{entry['sigma']:.4g}", f"{entry['score']:.4f}", f"{entry['accuracy']:.4f}")
        table.add_row(str(entry["layer"]), str(entry["head"]), *figures, f"{100 * share:.0f} %")
    console.print(table)
    console.print(
        f"Jaccard index of the head sets of {stability['seeds']} seeds: {stability['jaccard']:.2f}"
    )


def _apply(options: argparse.Namespace) -> None:
    from defenses.safetylock.lock import load_lock, lock_model
    from modeling.export import check_exportable

    lock = load_lock(options.lock, "LOCK")
    k = _head_count(options.k, lock)
    alpha = lock.alpha if options.alpha is None else options.alpha
    if alpha is None:
        raise SettingError("the lock says no alpha; give --alpha, e.g. --alpha 6")
    model = _checkpoint(options)
    check_exportable(model, "--model")
    start = time.perf_counter()
    _require_new(options.out)
    with new_folder(options.out) as folder:
        edit = lock_model(lock, model, lock.heads(k), alpha, "all", True, folder)
    report = edit.diagnostics
    print(
        f"{options.out}: {k} heads at alpha {alpha:g}, biases in {len(edit.modules)} layers; "
        f"biases {report['bias_seconds']:.4f} s, whole export with its check "
        f"{time.perf_counter() - start:.1f} s; largest difference of logits to the hooked model "
        f"{report['export']['max_difference']:.2g}"
    )


def _head_count(option: int | None, lock: Lock) -> int:
    """K, from the command line or the lock."""
    k = lock.k if option is None else option
    total = lock.accuracy.numel()
    if k is None:
        raise SettingError("the lock says no K; give --k, e.g. --k 24")
    if not 1 <= k <= total:
        raise SettingError(f"--k={k} is not among 1 to {total}, the model's heads; change it")
    return k


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`defense.NAME=VALUE` arguments, with values read as the main command reads them."""
    for pair in pairs:
        key, sign, _ = pair.partition("=")
        if not sign or not key.startswith("defense."):
            raise SettingError(f"{pair!r} is no setting; write defense.NAME=VALUE")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))
    return dict(values.get("defense", {}))


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    """The model of the command line, checked, in its `--dtype`."""
    from transformers import AutoConfig

    from modeling.checkpoint import resolve
    from modeling.model_files import verify_folder

    folder, _ = resolve(options.model, options.revision, "--model")
    if options.adapter is not None:
        verify_folder(options.adapter, "--adapter")
    dtype = options.dtype or str(AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise SettingError(f"--model says no precision that can be used ({dtype}); give --dtype")
    return Checkpoint(folder, options.adapter, None, dtype)


def _require_new(out: Path) -> None:
    if out.exists():
        raise SettingError(f"--out={str(out)!r} exists; give a folder that doesn't")


if __name__ == "__main__":
    raise SystemExit(main())
