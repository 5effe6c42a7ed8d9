"""A plugin's mistakes are one sentence at the start of a job, before any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from attacks.base import Attack
from attacks.benign_ft import BenignFT
from data.prompt_sets import PublishedPrompts
from data.rows import Prompt, Role
from defenses.base import Calibration, Defense, Edit, Models
from defenses.none import NoDefense
from evaluation.base import Judge
from experiments.results.record import Record
from experiments.store import Store
from modeling.checkpoint import Checkpoint
from settings import Settings, target
from tests.experiments.composing import refused
from tests.experiments.conftest import SHORT, Command


class WithoutApply(Defense):
    """Prepares and never repairs."""

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        return {}


class WithoutPrepare(Defense):
    """Repairs what it never prepared for."""

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        return Edit(attacked, 0, 1)


class Misspelt(NoDefense):
    """Asks for rows that no calibration has."""

    needs: ClassVar[frozenset[str]] = frozenset({"promts"})


class Unlisted(NoDefense):
    """Names what it needs in a string."""

    needs: ClassVar[str] = "prompts"


@pytest.mark.parametrize(
    ("defense", "said"),
    [
        (WithoutApply, "has no method `apply`; write one that repairs the attacked model and"),
        (WithoutPrepare, "has no method `prepare`; write one, or inherit from"),
        (Misspelt, ".needs names 'promts'; did you mean prompts?"),
        (Unlisted, ".needs is 'prompts'; write a set of names, such as frozenset({'prompts'})"),
    ],
)
def test_a_class_that_lacks_a_part_is_refused(defense: type[Defense], said: str) -> None:
    chosen = ("plugins=[tests]", "defense=none", f"defense._target_={target(defense)}")
    sentence = refused(*chosen)
    assert sentence.startswith(target(defense))
    assert said in sentence


def test_a_part_of_a_stack_that_lacks_something_is_refused_too() -> None:
    chosen = ("plugins=[tests]", "defense=stack", "defense.order=[none,reset]")
    part = f"+defense.settings.none._target_={target(WithoutApply)}"
    assert "WithoutApply has no method `apply`" in refused(*chosen, part)


def test_a_class_that_lacks_a_part_makes_no_stage(command: Command, tmp_path: Path) -> None:
    chosen = ("plugins=[tests]", "defense=none", f"defense._target_={target(WithoutApply)}")
    run = command(*chosen, f"store.root={tmp_path / 'store'}")
    assert run.code == 1
    assert run.err == f"error: {refused(*chosen)}\n"
    assert not list(Store(tmp_path / "store").entries())


def test_a_module_of_a_plugin_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "broken_repairs_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "clip.py").write_text("class Clip(Defense:\n    pass\n")
    chosen = (f"plugins=[{package.name}]", f"defense._target_={package.name}.clip.Clip")
    sentence = refused("defense=none", *chosen)
    assert sentence.startswith(f"defense._target_='{package.name}.clip.Clip' can't be imported: ")
    assert f"({package / 'clip.py'}, line 1)" in sentence


class WritesNothing(BenignFT):
    """Trains nothing and says that it did."""

    def run(self, *arguments: Any) -> dict[str, Any]:
        return {}


class WithoutRun(BenignFT):
    """Never attacks."""

    run = Attack.run


class WithoutScore(Judge):
    """Never judges."""


class WithoutTrack(Settings):
    """Never tracks."""


class Fails(Settings):
    """Has lost its server."""

    def track(self, *arguments: Any) -> str:
        raise OSError("no server")


class Twice(PublishedPrompts):
    """Two prompts with one id."""

    name: str = "twice"
    role: Role = "harmful"
    file: str = ""
    hub: str = ""
    text: tuple[str, ...] = ("prompt",)

    def prompts(self) -> list[Prompt]:
        return [Prompt("1", "What?"), Prompt("1", "Who?")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("attack=benign_ft", f"attack._target_={target(WritesNothing)}"),
            "WritesNothing.run was to write, out='",
        ),
        (
            ("attack=benign_ft", f"attack._target_={target(WithoutRun)}"),
            "WithoutRun has no method `run`; write one that writes the attacked model",
        ),
        (
            ("~evaluation.harm_judge", f"+evaluation.harm_judge._target_={target(WithoutScore)}"),
            "WithoutScore has no method `score`; write one that gives a Verdict per answer",
        ),
        (("~tracker", f"+tracker._target_={target(WithoutTrack)}"), "has no method `track`"),
        (
            ("evaluation.prompt_sets=[advbench]", f"+prompts.advbench._target_={target(Twice)}"),
            "the set of prompts 'advbench' has a prompt with the id '1'; give each an id of",
        ),
    ],
)
def test_what_a_plugin_leaves_out_is_one_sentence(
    command: Command, overrides: tuple[str, ...], said: str
) -> None:
    for _ in range(2):
        run = command(*SHORT, "plugins=[tests]", "defense=none", *overrides, "seed=17")
        assert run.code == 1
        assert said in run.err
        assert "Traceback" not in run.err


def test_a_run_outlives_its_tracker(command: Command) -> None:
    chosen = ("~tracker", f"+tracker._target_={target(Fails)}")
    run = command(*SHORT, "plugins=[tests]", "defense=none", *chosen)
    assert run.code == 0
    assert "the tracker failed (OSError: no server); all is recorded" in run.out + run.err
    assert Record.read(run.folder).metrics
