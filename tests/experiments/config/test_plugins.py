"""A plugin's mistakes are one sentence at the start of a job, before any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from defenses.base import Calibration, Defense, Edit, Models
from defenses.none import NoDefense
from experiments.store import Store
from modeling.checkpoint import Checkpoint
from settings import target
from tests.experiments.composing import refused
from tests.experiments.conftest import Command


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
