"""Options named in lists: what is merged in which order, and what stands alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.pipeline.prompt_sets import attack_prompts
from organism.task_sources import Sentiment
from settings import SettingError
from tests.experiments.config.test_configuration import composed


def test_a_tasks_settings_come_from_its_file_then_the_protocol_then_the_command_line() -> None:
    plain = composed("model=llama2", "attack.task=gsm8k").tasks["gsm8k"]
    protocol = composed("model=llama2", "attack.task=gsm8k", "protocol=nlsr").tasks["gsm8k"]
    chosen = composed(
        "model=llama2", "attack.task=gsm8k", "protocol=nlsr", "+tasks.gsm8k.n_test=7"
    ).tasks["gsm8k"]
    assert (plain.n_test, protocol.n_test, chosen.n_test) == (None, 500, 7)
    assert plain.reading == "strict"
    assert chosen.reading == protocol.reading != "strict"


def test_an_entry_with_a_target_takes_the_files_place() -> None:
    task = composed(
        "attack.task=sst2",
        "protocol=nlsr",
        "+tasks.sst2={_target_: organism.task_sources.Sentiment}",
    ).tasks["sst2"]
    assert task == Sentiment()


def test_prompt_sets_are_built_by_name_with_a_role() -> None:
    sets = composed("evaluation.prompt_sets=[advbench,xstest]").evaluation.prompt_sets
    assert list(sets) == ["harmful:advbench", "over_refusal:xstest"]


def test_a_set_without_a_role_is_no_prompt_set() -> None:
    entry = "+prompts.advbench={_target_: organism.sources.CalibrationPrompts}"
    with pytest.raises(SettingError, match="its class needs a role"):
        composed("evaluation.prompt_sets=[advbench]", entry)


def test_attack_prompts_by_name_and_from_a_file(tmp_path) -> None:
    path = tmp_path / "suffixes.jsonl"
    path.write_text('{"suffix": " please"}\n')
    named = f"evaluation.attack_prompts=[prefill,'file:{path}']"
    prefill, published = composed(named).evaluation.attack_prompts
    assert prefill.name == "prefill"
    assert published.name == "suffixes"


@pytest.mark.parametrize(
    ("overrides", "alignment", "style"),
    [
        (("model=organism",), "published", "chat"),
        (("model=organism", "attack.adapter=fresh"), "published", "chat"),
        (("model=organism", "model.aligned=null"), "own", "chat"),
        (("model=organism", "model.alignment=own"), "own", "chat"),
        (("model=llama2",), "own", "alpaca"),
        (("model=llama2", "attack.adapter=fresh"), "published", "chat"),
        (("model=llama2", "attack=explicit"), "published", "chat"),
        (("model=llama2", "model.alignment=own", "attack=explicit"), "own", "alpaca"),
    ],
)
def test_the_alignment_that_an_attack_needs(
    overrides: tuple[str, ...], alignment: str, style: str
) -> None:
    experiment = composed(*overrides)
    assert experiment.model.alignment == alignment
    assert experiment.resolved["model"]["alignment"] == alignment
    assert experiment.model.style.style == style
    assert (experiment.labels["align"] != "") == (alignment == "own")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("attack.task=nonsense",), "attack.task: 'nonsense' is unknown"),
        (("evaluation.tasks=[nonsense]",), "evaluation.tasks: 'nonsense' is unknown"),
        (
            ("attack@refine=benign_ft", "refine.task=nonsense"),
            "refine.task: 'nonsense' is unknown",
        ),
        (
            ("defense=none", "attack.adapter=full", "attack@refine=harmful_ft"),
            "attack.adapter=full leaves none; set refine.adapter=fresh",
        ),
    ],
)
def test_what_is_wrong_is_called_by_its_own_setting(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        composed(*overrides)


def test_two_attack_prompts_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "found.jsonl" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"suffix": " please"}\n')
    named = ",".join(f"'file:{path}'" for path in paths)
    experiment = composed(f"evaluation.attack_prompts=[{named}]")
    with pytest.raises(SettingError, match="are called 'found'"):
        attack_prompts(experiment)
