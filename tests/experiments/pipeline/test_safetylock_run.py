"""SafetyLock through the main command: any attack's adapter, either form, and its sweep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from experiments.config.experiment import register_resolvers
from experiments.config.jobs import expand
from experiments.plan.dry_run import walk
from experiments.plan.models import Library
from experiments.results.record import Record
from experiments.store import Store
from tests.experiments.conftest import SHORT, TOY, Command

LOCK = (*SHORT, "defense=safetylock", "defense.n_pairs=16", "attack.poison_ratio=0.25")


@pytest.mark.parametrize(
    "adapter",
    ["resume", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fresh", "full"))],
)
def test_every_kind_of_fine_tune_can_be_locked(command: Command, adapter: str) -> None:
    run = command(*LOCK, f"attack.adapter={adapter}")
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    apply = record.defense["apply"]
    assert apply["baked"] is True
    assert apply["export"]["max_difference"] <= apply["export"]["tolerance"]
    assert len(apply["heads"]) == 4
    assert record.cost["parameters_edited"] == 192 * len(record.defense["modules"])
    assert record.data["sources"]["safety_pairs"]["fingerprint"]
    assert record.data["leaked_rows_dropped"]["safety_pairs"] == 0


def test_the_hooked_form_answers_as_the_baked_one(command: Command) -> None:
    baked = Record.read(command(*LOCK).folder)
    run = command(*LOCK, "defense.form=hooked")
    assert run.code == 0, run.err
    hooked = Record.read(run.folder)
    assert hooked.defense["apply"]["baked"] is False
    # What is no share depends on what a batch holds besides, in its last digits.
    for metric in ("perplexity", "harm_score"):
        steered, merged = (each.metrics["defended"].pop(metric) for each in (hooked, baked))
        assert steered == pytest.approx(merged, rel=1e-5)
    assert hooked.metrics["defended"] == baked.metrics["defended"]


def test_a_sweep_over_alpha_and_k_prepares_once(tmp_path: Path) -> None:
    register_resolvers()
    line = [*TOY, *LOCK, "defense.k=1,2", "defense.alpha=0,4", "defense.form=hooked"]
    line += ["tracker=none", f"store.root={tmp_path / 'store'}"]
    # What a plan foretells is what a run makes: `tests.experiments.plan`.
    ledger = walk(expand(line, multirun=True), Library(tmp_path))
    made = Counter(entry.name for entry in ledger.entries.values())
    assert (made["prepare"], made["attack"], made["apply"]) == (1, 1, 4)


def test_what_a_lock_needs_is_asked_for_before_heavy_work(command: Command, tmp_path: Path) -> None:
    store = tmp_path / "store"
    mistakes = {
        "sources.safety_pairs is null, but defense=safetylock needs": "sources.safety_pairs=null",
        "defense.k=37 is more than the model's 36 heads": "defense.k=37",
        "defense.k and defense.k_share say both how many": "defense.k_share=0.1",
        "set defense.form=hooked or defense.positions=all": "defense.positions=last_token",
    }
    for sentence, override in mistakes.items():
        extra = ("defense.form=baked",) if "positions" in override else ()
        run = command(*LOCK, override, *extra, f"store.root={store}")
        assert run.code == 1
        assert sentence in run.err
        assert len(run.err.strip().splitlines()) == 1
    assert not list(Store(store).entries())


def test_other_defenses_read_no_pairs(command: Command) -> None:
    run = command("defense=none", "sources.safety_pairs=null")
    assert run.code == 0, run.err
    assert "safety_pairs" not in Record.read(run.folder).data["sources"]
