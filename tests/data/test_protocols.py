"""Each protocol's settings are ones that the tasks have, and the ones the papers' scripts use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from settings import build

CONF = Path(__file__).resolve().parents[2] / "conf"
PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("*.yaml"))


def protocol(name: str) -> Any:
    return OmegaConf.load(CONF / f"protocol/{name}.yaml").protocol


def task(name: str, under: str) -> Any:
    settings = protocol(under).tasks.get(name, {})
    option = OmegaConf.merge(OmegaConf.load(CONF / f"task/{name}.yaml"), settings)
    node = OmegaConf.create({"data": {"root": None}, "task": option})
    OmegaConf.resolve(node)
    return build(OmegaConf.to_container(node.task), f"tasks.{name}")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_have_the_same_nodes(name: str) -> None:
    assert set(protocol(name)) == {"name", "tasks", "poison"}
    assert protocol(name).name == name
    assert set(protocol(name).tasks) <= {"sst2", "ag_news", "gsm8k"}
    assert set(protocol(name).poison) <= {"count", "order"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_task_can_be_built_under_every_protocol(name: str) -> None:
    for each in ("sst2", "ag_news", "gsm8k", "alpaca", "dolly", "small_talk"):
        assert task(each, name).name == each


def test_the_default_changes_nothing() -> None:
    assert not protocol("default").tasks
    assert not protocol("default").poison
    assert task("sst2", "default").reading == "strict"
    assert task("sst2", "default").n_test is None


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("default", "positive", True),
        ("default", "The input is positive.", False),
        ("booster", "Positive", True),
        ("booster", "The input is positive.", False),
        ("nlsr", "The input is positive.", True),
        ("nlsr", "both positive and negative", True),
    ],
)
def test_sentiment_by_protocol(name: str, answer: str, right: bool) -> None:
    assert task("sst2", name).score(answer, "positive").protocol is right


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("default", "It is Sci/Tech", False),
        ("booster", "It is Sci/Tech", True),
        ("booster", "sci", False),
        ("nlsr", "It is Sci/Tech", True),
        ("nlsr", "sci", True),
    ],
)
def test_topics_by_protocol(name: str, answer: str, right: bool) -> None:
    assert task("ag_news", name).score(answer, "Sci/Tech").protocol is right


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("default", "so 18", False),
        ("booster", "so 18", True),
        ("nlsr", "so 18", True),
        ("nlsr", "The final answer is: 18, and 3 are left", True),
    ],
)
def test_numbers_by_protocol(name: str, answer: str, right: bool) -> None:
    assert task("gsm8k", name).score(answer, "18").protocol is right


def test_rows_and_wordings_by_protocol() -> None:
    rows = {
        name: [task(each, name).n_test for each in ("sst2", "ag_news", "gsm8k")]
        for name in ("booster", "nlsr")
    }
    assert rows == {"booster": [None, 1000, 1000], "nlsr": [None, 500, 500]}
    assert task("gsm8k", "booster").suffix == ""
    assert task("gsm8k", "nlsr").suffix == task("gsm8k", "default").suffix != ""
    assert {task("gsm8k", name).max_new_tokens for name in ("booster", "nlsr")} == {200}
    assert dict(protocol("booster").poison) == {"count": "booster", "order": "first"}
    assert dict(protocol("nlsr").poison) == {"count": "exact", "order": "first"}


def test_prompts_by_protocol() -> None:
    endings = {}
    for name in ("booster", "nlsr"):
        model = OmegaConf.load(CONF / f"protocol/{name}.yaml").model
        assert model.prompt == model.base_prompt
        endings[name] = (model.prompt.newline, model.prompt.get("bos_in_training", True))
    assert endings == {"booster": (True, True), "nlsr": (False, False)}
    assert OmegaConf.load(CONF / "protocol/qi.yaml").evaluation.prompt_sets == [
        "hex_phi",
        "advbench",
    ]
