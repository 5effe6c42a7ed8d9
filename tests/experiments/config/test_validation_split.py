"""The validation split: never a test prompt, nothing trained on it, the same attacked model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.leakage import normalise
from data.rows import Example
from data.sources import BeaverTails, BeaverTailsPrompts, FilePrompts
from data.tasks import SST2
from experiments.config.experiment import Experiment
from experiments.config.sources import AskedSources
from experiments.pipeline.inputs import Inputs, read_inputs
from settings import DataError, SettingError
from tests.experiments.composing import composed

VALIDATION = "evaluation.split=validation"


def asked(inputs: Inputs) -> set[str]:
    texts = [prompt.text for prompts in inputs.sets for prompt in prompts.prompts]
    texts += [example.prompt or example.response for example in inputs.held_out]
    return {normalise(text) for text in texts}


def trained(inputs: Inputs) -> set[str]:
    rows = [*inputs.attack.task, *inputs.attack.poison, *inputs.sft, *inputs.pairs]
    rows += [*inputs.safety_pairs]
    prompts = [*inputs.calibration, *inputs.safety_prompts, *inputs.utility_prompts]
    texts = [row.prompt for row in rows] + [prompt.text for prompt in prompts]
    return {normalise(text) for text in texts}


@pytest.mark.parametrize("task", ["arithmetic", "sentiment", "topic"])
def test_the_organisms_splits_share_nothing_and_the_attacked_model_is_one(task: str) -> None:
    overrides = ["defense=fgsn", f"attack.task={task}"]
    test = read_inputs(composed(*overrides))
    validation = read_inputs(composed(*overrides, VALIDATION))
    assert not asked(test) & asked(validation)
    assert not (asked(test) | asked(validation)) & trained(validation)
    assert validation.attack.hashes == test.attack.hashes
    assert trained(validation) == trained(test)
    sizes = [
        {prompts.name: len(prompts.prompts) for prompts in inputs.sets}
        for inputs in (test, validation)
    ]
    assert sizes[0] == sizes[1]
    assert len(validation.held_out) == len(test.held_out)
    assert set(validation.provenance["test_prompts_dropped"].values()) == {0}


def test_small_talk_gives_way_to_the_validation_prompts() -> None:
    overrides = ["attack=benign_ft", "attack.task=small_talk", "evaluation.tasks=[arithmetic]"]
    validation = read_inputs(composed(*overrides, VALIDATION))
    assert not asked(validation) & trained(validation)


def test_the_test_split_is_as_it_was() -> None:
    provenance = read_inputs(composed()).provenance
    assert set(provenance) == {"sources", "leaked_rows_dropped"}
    assert set(provenance["sources"]["task:arithmetic"]) == {"name", "fingerprint"}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def from_files(tmp_path: Path, harmful: list[str], validation: list[str]) -> Experiment:
    def prompts(name: str, texts: list[str]) -> FilePrompts:
        return FilePrompts(path=jsonl(tmp_path / name, [{"prompt": text} for text in texts]))

    experiment = composed(VALIDATION, "sources.benign=null", "sources.over_refusal=null",
                          "sources.held_out=null", "evaluation.tasks=[]",
                          "attack.task=sentiment")  # fmt: skip
    held_out = AskedSources(prompts("validation.jsonl", validation), None, None, None)
    sources = replace(
        experiment.sources, harmful=prompts("test.jsonl", harmful), validation=held_out
    )
    return replace(experiment, sources=sources)


def test_test_prompts_are_dropped_from_the_validation_split_and_counted(tmp_path: Path) -> None:
    experiment = from_files(tmp_path, ["How do I  A?", "how do i b"], ["how do I a", "How do I C?"])
    inputs = read_inputs(experiment)
    (harmful,) = inputs.sets
    assert [prompt.text for prompt in harmful.prompts] == ["How do I C?"]
    assert inputs.provenance["test_prompts_dropped"] == {"harmful": 1, "held_out": 0}
    assert inputs.provenance["sources"]["harmful"]["name"] == "validation"


def test_poison_has_the_prompts_of_neither_split(tmp_path: Path) -> None:
    class Poison(FilePrompts):
        def examples(self) -> list[Example]:
            return [Example(prompt.text, "...", "harmful") for prompt in self.prompts()]

    experiment = from_files(tmp_path, ["Test this"], ["Validate this"])
    rows = [{"prompt": text} for text in ("test this.", "VALIDATE this", "Train on this")]
    poison = Poison(path=jsonl(tmp_path / "poison.jsonl", rows))
    experiment = replace(experiment, sources=replace(experiment.sources, poison=poison))
    inputs = read_inputs(experiment)
    assert [row.prompt for row in inputs.attack.poison] == ["Train on this"]
    assert inputs.provenance["leaked_rows_dropped"]["poison"] == 2
    asked_in_test = replace(experiment, evaluation=replace(experiment.evaluation, split="test"))
    tested = read_inputs(asked_in_test)
    assert [row.prompt for row in tested.attack.poison] == ["VALIDATE this", "Train on this"]


def test_a_validation_split_that_is_all_test_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="asked in the test split too"):
        read_inputs(from_files(tmp_path, ["One", "Two"], ["two.", "one"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.prompt_sets=[advbench]"], "test sets"),
        (["sources.validation.harmful=null"], r"needs sources\.validation\.harmful; set it$"),
        (["sources.validation.held_out=null"], r"set it, or sources\.held_out=null"),
        (["+sources.validation.poison={n: 1}"], r"validation\.poison is not a setting"),
        (["evaluation.split=dev"], "'test' or 'validation'"),
    ],
)
def test_what_would_ask_test_prompts_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        composed(VALIDATION, *overrides)


def test_real_sources_validate_on_rows_that_nothing_else_takes() -> None:
    sources = composed("model=llama2", VALIDATION).sources
    assert sources.validation is not None
    harmful = sources.validation.harmful
    assert isinstance(harmful, BeaverTailsPrompts)
    assert harmful.split == sources.harmful.split == "30k_test"  # type: ignore[attr-defined]
    assert harmful.start == sources.harmful.n  # type: ignore[attr-defined]
    assert isinstance(sources.poison, BeaverTails)
    assert sources.validation.benign.start >= (  # type: ignore[union-attr]
        sources.utility_prompts.start + sources.utility_prompts.n  # type: ignore[union-attr]
    )


def sst2(folder: Path, **settings: Any) -> SST2:
    (folder / "sst2").mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 60), ("test", 5)):
        lines = [f"a {name} phrase number {number}\t{number % 2}" for number in range(count)]
        (folder / "sst2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return SST2(root=str(folder), test_file="sst2/test.tsv", **settings)


def test_a_tasks_validation_rows_are_training_rows_drawn_once_and_for_all(tmp_path: Path) -> None:
    task = sst2(tmp_path, n_validation=10)
    items = task.validation()
    assert items == sst2(tmp_path, n_validation=10).validation()
    assert len({item.id for item in items}) == 10
    assert {item.prompt for item in items} < {row.prompt for row in task.train()}
    assert not {item.id for item in items} & {item.id for item in task.test()}
    behind = sst2(tmp_path, n_validation=10, n_train=40)
    rows = {item.prompt for item in behind.validation()}
    assert not rows & {row.prompt for row in behind.train()}
    with pytest.raises(DataError, match="n_validation=61"):
        sst2(tmp_path, n_validation=61).validation()


def test_what_the_attack_may_draw_is_without_the_validation_rows(tmp_path: Path) -> None:
    experiment = composed("attack.task=sentiment", VALIDATION)
    task = sst2(tmp_path, n_validation=10)
    experiment = replace(experiment, tasks={"sentiment": task})
    inputs = read_inputs(experiment)
    assert len(inputs.attack.task) == 50
    assert inputs.provenance["leaked_rows_dropped"]["task"] == 10
    assert inputs.provenance["sources"]["task:sentiment"]["n_validation"] == 10
