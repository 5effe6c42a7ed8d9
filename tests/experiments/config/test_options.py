"""Options named in lists: what is merged in which order, and what stands alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.errors import HydraException

from experiments.config.experiment import CONF, PROJECT
from experiments.config.explain import explain
from experiments.config.options import read_option
from experiments.pipeline.prompt_sets import attack_prompts
from modeling.checkpoint import holds_adapter
from modeling.model_files import ADAPTER_CONFIG
from organism.task_sources import Sentiment
from settings import SettingError
from tests.experiments.composing import composed


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


@pytest.mark.parametrize(("file", "alignment"), [(ADAPTER_CONFIG, "published"), ("x.json", "own")])
def test_a_hub_id_may_be_an_adapters(
    file: str, alignment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--me--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / file).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    holds_adapter.cache_clear()
    assert composed("model.aligned=me/lora").model.alignment == alignment
    holds_adapter.cache_clear()


def test_full_weights_that_are_not_used_are_said_so(caplog: pytest.LogCaptureFixture) -> None:
    base = f"{PROJECT}/organism/weights/base"
    assert composed(f"model.aligned={base}").model.alignment == "own"
    assert f"model.aligned='{base}' isn't used" in caplog.text
    assert composed(f"model.aligned={base}", "attack.adapter=full").model.alignment == "published"


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


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["seed=-1"], "seed=-1 is not allowed; it should be greater than or equal to 0"),
        (["seed=true"], "seed=True is not allowed; it should be a valid integer"),
        (["store.root=''"], "store.root='' is not allowed; it should not be empty"),
        (["+store.rot=x"], "store.rot is not a setting; did you mean store.root?"),
        (["+sed=1"], "sed is not a setting; did you mean seed?"),
        (["~evaluation.backend"], "evaluation.backend is missing; set it"),
        (
            ["evaluation.safe_system=sure"],
            "evaluation.safe_system='sure' is not allowed; it should be true or false",
        ),
        (
            ["evaluation.text_tokens=1"],
            "evaluation.text_tokens=1 is not allowed; it should be greater than or equal to 2",
        ),
        (
            ["evaluation.split=dev"],
            "evaluation.split='dev' is not allowed; it should be 'test' or 'validation'",
        ),
        (
            ["evaluation.judges=keyword"],
            "evaluation.judges='keyword' is no list of names; "
            "write evaluation.judges=[keyword,harmbench]",
        ),
        (
            ["evaluation.prompt_sets=null"],
            "evaluation.prompt_sets=None is no list of names; "
            "write evaluation.prompt_sets=[advbench,xstest]",
        ),
        (
            ["evaluation.tasks=[topic,topic]"],
            "evaluation.tasks=['topic', 'topic'] names one option twice; name each once",
        ),
        (
            ["plugins=my_repairs"],
            "plugins='my_repairs' is not allowed; it should be a list, such as [a,b]",
        ),
        (
            ["+model.base_prompt={style: chat, sytem: null}"],
            "model.base_prompt.sytem is not a setting; did you mean model.base_prompt.system?",
        ),
        (
            ["align.sft=null", "align.preference=null"],
            "align.sft and align.preference are both null; give at least one",
        ),
        (
            ["runtime.gpus=[0,0]"],
            "runtime.gpus names 0 twice; name each GPU once",
        ),
    ],
)
def test_every_section_says_in_one_sentence_what_is_wrong(
    overrides: list[str], sentence: str
) -> None:
    with pytest.raises(SettingError) as error:
        composed(*overrides)
    assert str(error.value) == sentence


def test_what_options_share_is_no_option_itself() -> None:
    with pytest.raises(SettingError) as error:
        composed("evaluation.judges=[endpoint]")
    assert "_base" not in str(error.value)
    assert "_base" not in explain(HydraException("Could not find 'attack/bse'"))


def test_a_new_model_is_one_short_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults:\n"
        "  - _base/chat@_here_\n"
        "  - _self_\n\n"
        "name: mine\n"
        "base: me/mine-base\n"
        "aligned: me/mine-chat\n"
    )
    experiment = composed(f"hydra.searchpath=[file://{tmp_path}]", "model=mine", "attack=explicit")
    assert (experiment.model.base, experiment.model.dtype) == ("me/mine-base", "bfloat16")
    assert experiment.sources.poison == composed("model=llama2").sources.poison
    assert experiment.attack.lora.target_modules == experiment.model.lora_targets


def test_an_option_named_in_a_list_stands_on_the_files_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "strict.yaml").write_text("defaults: [rubric_local]\nunsafe_from: 4\n")
    judge = read_option("judge", "strict", [CONF, tmp_path])
    assert judge.unsafe_from == 4
    assert judge._target_ == "evaluation.judges.rubric.LocalRubricJudge"
    assert judge.max_tokens == 1024
    (tmp_path / "judge" / "lost.yaml").write_text("defaults: [rubrik]\n")
    with pytest.raises(SettingError, match="rubrik, which is no file of that group"):
        read_option("judge", "lost", [CONF, tmp_path])
