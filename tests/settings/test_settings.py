"""Settings say in one sentence what is wrong; targets come from allowed packages alone."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from pydantic import Field, InstanceOf

from settings import SettingError, Settings, build, first_line, source
from settings.terminal import print_in_ascii


class Inner(Settings):
    rate: float = Field(0.1, gt=0)


class Worded(Settings):
    """A field of each type whose mistakes pydantic words in its own way."""

    inner: Inner | None = None
    table: dict[str, int] | None = None
    pattern: str = Field("a", pattern="^a{1,3}$")
    short: str = Field("abc", min_length=2, max_length=3)
    names: tuple[str, ...] = Field(("a", "b"), min_length=2)
    numbers: list[int] | None = None
    either: int | tuple[int, ...] | None = None
    built: InstanceOf[Inner] | None = None


class Outer(Settings):
    count: int = Field(1, ge=1)
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 2}, "x.cuont is not a setting; did you mean x.count?"),
        ({"count": 0}, "x.count=0 is not allowed; it should be greater than or equal to 1"),
        ({"count": True}, "x.count=True is not allowed; it should be a valid integer"),
        (
            {"inner": {"rate": float("inf")}},
            "x.inner.rate=inf is not allowed; it should be a finite number",
        ),
        ({"count": "2"}, "x.count='2' is not allowed; it should be a valid integer"),
        ({"inner": {"rat": 1.0}}, "x.inner.rat is not a setting; did you mean x.inner.rate?"),
        (
            {"inner": {"rate": -1.0}},
            "x.inner.rate=-1.0 is not allowed; it should be greater than 0",
        ),
    ],
)
def test_every_mistake_is_one_sentence(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError) as error:
        Outer.validated(values, "x")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("inner", 1, "be a section, such as {NAME: VALUE}"),
        ("table", 1, "be a section, such as {NAME: VALUE}"),
        ("pattern", "b", "match the pattern ^a{1,3}$"),
        ("pattern", "", "not be empty"),
        ("short", "", "not be empty"),
        ("short", "a", "have at least 2 characters"),
        ("short", "abcd", "have at most 3 characters"),
        ("names", (), "not be empty"),
        ("names", ("a",), "have at least 2 items"),
        ("numbers", 1, "be a list, such as [a,b]"),
        ("either", "x", "be a valid integer or a list, such as [a,b]"),
        ("built", 1, "be of the class Inner, built by a _target_"),
    ],
)
def test_what_a_value_should_be_is_said_in_a_users_words(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(SettingError) as error:
        Worded.validated({name: value}, "x")
    assert str(error.value) == f"x.{name}={value!r} is not allowed; it should {expected}"


def test_an_integer_serves_as_a_float_but_not_the_other_way_round() -> None:
    assert Outer.validated({"inner": {"rate": 1}}, "x").inner.rate == 1.0
    with pytest.raises(SettingError):
        Outer.validated({"count": 1.5}, "x")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "outside this project; add 'os' to plugins"),
        ("defenses.nothing.Here", "can't be imported: no module named 'defenses.nothing'"),
        ("defenses.none.Nothing", "defenses.none has no 'Nothing'"),
        ("defenses", "defense._target_='defenses' can't be imported"),
        (None, "_target_ is missing"),
    ],
)
def test_targets_are_checked(target: str | None, message: str) -> None:
    with pytest.raises(SettingError, match="defense") as error:
        build({"_target_": target}, "defense")
    assert message in str(error.value)


def test_a_plugin_package_is_allowed_by_name() -> None:
    assert build({"_target_": "fractions.Fraction", "numerator": 3}, "x", ["fractions"]) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nclass Mine(:\n    pass\n", "SyntaxError: invalid syntax ({file}, line 2)"),
        ("\nimport no_such_module\n", "no module named 'no_such_module' ({file}, line 2)"),
        ("from math import nothing\n", "ImportError: cannot import name 'nothing' from 'math'"),
        ("def f():\n    return y\n\nf()\n", "NameError: name 'y' is not defined ({file}, line 4)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "plugin_of_a_test.py"
    file.write_text(source)
    with pytest.raises(SettingError) as error:
        build({"_target_": "plugin_of_a_test.Mine"}, "defense", ["plugin_of_a_test"])
    begin = "defense._target_='plugin_of_a_test.Mine' can't be imported: "
    assert str(error.value).startswith(begin + said.format(file=file))


def test_nested_targets_are_built_and_lists_become_tuples() -> None:
    node = {
        "_target_": "evaluation.judges.keyword.KeywordJudge",
        "phrases": ["no way"],
    }
    assert build(node, "judge").phrases == ("no way",)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n It is wrong.\nIn many words."), "It is wrong"),
        (OSError(), "OSError"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


PLUGIN = """
from {base} import {name}


class Mine({name}):
    power: int = {power}
"""


def test_the_source_of_a_class_from_outside_is_that_of_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "my_repairs_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def hashed(power: int, other: int = 0) -> dict[str, str]:
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            del sys.modules[name]
        (package / "first.py").write_text(
            PLUGIN.format(base="settings", name="Settings", power=power)
        )
        (package / "second.py").write_text(
            PLUGIN.format(base=f"{package.name}.first", name="Mine", power=other)
        )
        target = f"{package.name}.second.Mine"
        return source(build({"_target_": target}, "x", [package.name]))

    once = hashed(1)
    assert once.keys() == {"source"}
    assert hashed(1) == once
    assert hashed(2) != once
    assert hashed(1, other=2) != once
    assert source(build({"_target_": "defenses.reset.Reset"}, "defense")) == {}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_terminal_is_printed_to(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    print_in_ascii()
    print("1.0\u20132.0 \u2264 Σ Łódź 你 é…", flush=True)
    expected = {"ascii": "1.0-2.0 < ? ?odz ? e~\n", "latin-1": "1.0-2.0 < ? ?ódz ? é~\n"}
    assert written.getvalue().decode(encoding) == expected[encoding]
