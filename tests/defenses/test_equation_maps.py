"""A defense's README maps equations to functions: every function that it names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from settings.build import PACKAGES

DEFENSES = Path(__file__).resolve().parents[2] / "defenses"
READMES = sorted(DEFENSES.glob("*/README.md"))
_DOTTED = re.compile(r"`(?P<name>[A-Za-z_]+(?:\.[A-Za-z_]+)+)`")


def _names(readme: Path) -> list[str]:
    """Dotted names of the README's tables, from the project's root."""
    package = importlib.import_module(f"defenses.{readme.parent.name}")
    modules = {path.stem for path in readme.parent.glob("*.py")}
    rows = [line for line in readme.read_text().splitlines() if line.startswith("|")]
    names = []
    for match in _DOTTED.finditer("\n".join(rows)):
        first = match["name"].partition(".")[0]
        if first in PACKAGES:
            names.append(match["name"])
        elif first in modules or hasattr(package, first):
            names.append(f"{package.__name__}.{match['name']}")
    return names


def _resolve(name: str) -> Any:
    """The module, class, function or setting of a dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        owner = _resolve(module)
        return getattr(owner, attribute)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_what_a_readme_names_is_there(readme: Path) -> None:
    names = _names(readme)
    for name in names:
        assert _resolve(name) is not None, name
    assert names or readme.parent.name == "none"
