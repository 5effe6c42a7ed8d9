"""What `repair` prints: how far it is, what it did, and what an artefact holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from defenses.safetylock.lock import METADATA, Lock, find_lock, load_lock
from experiments.repairing.artefact import Artefact
from settings import SettingError
from settings.progress import EVERY_SECONDS


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says what has begun and, now and then, that it goes on; with seconds where it takes long."""
    start, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY_SECONDS):
            print(f"{what}: {time.monotonic() - start:.0f} s so far", flush=True)

    print(f"{what} ...", flush=True)
    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def cost(report: Mapping[str, Any]) -> str:
    """Seconds and peak memory of a stage."""
    known = report["cost"]
    return f"{known['seconds']:.2f} s, peak memory {known['peak_bytes'] / 1e6:,.0f} MB"


def edited(report: Mapping[str, Any]) -> str:
    """What was edited, and how the result was verified."""
    count, total = report["parameters_edited"], report["parameters_total"]
    descent, verified = report.get("descent"), report["verified"]
    moved = verified["max_difference"]
    parts = [
        f"{100 * descent['difference']:.2g} % from the aligned model" if descent else "",
        f"{count:,} of {total:,} parameters edited ({100 * count / total:.3g} %) in "
        f"{len(report['modules'])} modules",
        f"verified: logits are the hooked model's up to {moved:.2g}"
        if "rms_effect" in verified
        else f"verified: logits move by up to {moved:.3g}",
    ]
    return ", ".join(filter(None, parts))


def describe(artefact: Artefact, k: int | None) -> list[str]:
    """What an artefact holds, line by line; of a lock also where its heads lie.

    Raises:
        SettingError: The lock has fewer heads than `k`.
    """
    lines: list[str] = []
    if artefact.record:
        made, record = artefact.made, artefact.record
        base, aligned = record["inputs"]
        model = made["model"]
        lines = [
            f"{made['method']}, version {record['version']}, prepared {record['created']} "
            f"({cost(record['report'])})",
            f"base {model['base']}: {base}",
            f"aligned {model['aligned']}: {aligned}",
            "calibration " + _pairs(made["calibration"]),
            "settings " + _pairs(made["defense"]),
            "diagnostics " + _pairs(record["report"]["diagnostics"]),
        ]
    if not artefact.record or (artefact.folder / "lock" / METADATA).is_file():
        lines += _lock(load_lock(find_lock(artefact.folder, "ARTEFACT"), "ARTEFACT"), artefact, k)
    return lines


def _pairs(values: Mapping[str, Any]) -> str:
    """Plain values as "name=value"; longer ones are for the files."""
    plain = (int, float, str, type(None))
    return ", ".join(f"{k}={v}" for k, v in values.items() if isinstance(v, plain)) or "none"


def _lock(lock: Lock, artefact: Artefact, k: int | None) -> list[str]:
    layout, total = lock.layout, lock.layout.layers * lock.layout.heads
    chosen = k or lock.k
    if chosen is None:
        chosen = artefact.defense([]).heads(layout)  # type: ignore[attr-defined]
    if chosen > total:
        raise SettingError(f"--k={chosen} is more than the lock's {total} heads; lower it")
    heads, known = lock.heads(chosen), lock.accuracy is not None
    lines = [
        f"lock for {layout.model_type}, {layout.layers} layers x {layout.heads} heads of "
        f"{layout.head_dim}, hidden size {layout.hidden}",
        "from " + ", ".join(f"{name} {value}" for name, value in lock.origin.items() if value),
        f"K={chosen}, alpha={lock.alpha}" if lock.alpha else f"K={chosen}",
    ]
    if known:
        stability = lock.stability(chosen)
        lines.append(
            f"Jaccard index of the head sets of {stability['seeds']} splits: "
            f"{stability['jaccard']:.2f}"
        )
    for entry in lock.describe(heads):
        told = f", probe accuracy {entry['accuracy']:.3f}" if known else ""
        lines.append(
            f"layer {entry['layer']:3} head {entry['head']:3}: sigma {entry['sigma']:.4g}{told}"
        )
    return [*lines, *drawn(heads, layout.layers, layout.heads)]


def drawn(heads: Sequence[tuple[int, int]], layers: int, width: int) -> list[str]:
    """Layers from the last to the first, a mark at each chosen head."""
    chosen = set(heads)
    rows = [
        f"{layer:5} {''.join('#' if (layer, head) in chosen else '.' for head in range(width))}"
        for layer in reversed(range(layers))
    ]
    return ["layer, its heads from left to right:", *rows]
