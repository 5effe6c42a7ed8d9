"""Settings say in one sentence what is wrong; targets come from allowed packages alone."""

from __future__ import annotations

import pytest
from pydantic import Field

from settings import SettingError, Settings, build, first_line


class Inner(Settings):
    rate: float = Field(0.1, gt=0)


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
        (None, "_target_ is missing"),
    ],
)
def test_targets_are_checked(target: str | None, message: str) -> None:
    with pytest.raises(SettingError, match="defense") as error:
        build({"_target_": target}, "defense")
    assert message in str(error.value)


def test_a_plugin_package_is_allowed_by_name() -> None:
    assert build({"_target_": "fractions.Fraction", "numerator": 3}, "x", ["fractions"]) == 3


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
