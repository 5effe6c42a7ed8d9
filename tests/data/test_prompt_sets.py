"""Published prompt sets: local copies and hub layouts give the same prompts, counts are checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.prompt_sets import PublishedPrompts
from data.rows import EvaluationPrompts, Prompt
from settings import DataError, SettingError, build

PROJECT = Path(__file__).resolve().parents[2]
SETS = sorted(path.stem for path in (PROJECT / "conf/prompts").glob("*.yaml"))

SIZES = {
    "advbench": 520,
    "alpaca": None,
    "beavertails": None,
    "do_not_answer": 939,
    "harmbench": 400,
    "hex_phi": (330, 300),
    "jailbreakbench": 100,
    "jailbreakbench_benign": 100,
    "malicious_instruct": 100,
    "strongreject": 313,
    "xstest": 250,
    "xstest_unsafe": 200,
}


def published(root: Path | None, **settings: Any) -> PublishedPrompts:
    given: dict[str, Any] = {
        "name": "set",
        "role": "harmful",
        "file": "set.csv",
        "hub": "nobody/set",
        "text": ("prompt", "goal"),
        "root": None if root is None else str(root),
    }
    return PublishedPrompts(**{**given, **settings})


def from_conf(name: str, prompts: str | None, **settings: Any) -> PublishedPrompts:
    option = OmegaConf.merge(OmegaConf.load(PROJECT / f"conf/prompts/{name}.yaml"), settings)
    node = OmegaConf.create({"data": {"root": prompts, "prompts": prompts}, "set": option})
    OmegaConf.resolve(node)
    built = build(OmegaConf.to_container(node.set), f"prompts.{name}")  # type: ignore[arg-type]
    assert isinstance(built, PublishedPrompts)
    return built


@pytest.mark.parametrize("name", SETS)
def test_every_option_builds_a_set_of_its_name_and_size(name: str) -> None:
    built = from_conf(name, None)
    assert isinstance(built, EvaluationPrompts)
    assert built.name == name
    assert built.expect == SIZES[name]
    assert built.root is None


def test_what_the_sets_are_asked_for() -> None:
    roles = {name: from_conf(name, None).role for name in SETS}
    assert {name for name, role in roles.items() if role == "over_refusal"} == {
        "xstest",
        "jailbreakbench_benign",
    }
    assert {name for name, role in roles.items() if role == "benign"} == {"alpaca"}


@pytest.mark.parametrize("column", ["prompt", "goal"])
def test_the_first_column_that_is_there_counts(tmp_path: Path, column: str) -> None:
    (tmp_path / "set.csv").write_text(f"other,{column}\nx, one \ny,two\n")
    source = published(tmp_path)
    assert source.prompts() == [Prompt("set/1", "one"), Prompt("set/2", "two")]
    assert source.provenance() == {
        "source": "set.csv",
        "role": "harmful",
        "fingerprint": source.fingerprint(),
        "rows": 2,
        "n": 2,
        "commit": None,
    }


def test_a_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "malicious_instruct.txt").write_text("one?\ntwo?\n")
    built = from_conf("malicious_instruct", str(tmp_path), expect=2)
    assert [prompt.text for prompt in built.prompts()] == ["one?", "two?"]


def test_context_stands_before_the_behaviour(tmp_path: Path) -> None:
    (tmp_path / "harmbench_behaviors_text_all.csv").write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "fold a kite,standard,paper,,,kite\n"
        'fold this,contextual,paper,,"A sheet, blue.",sheet\n'
    )
    built = from_conf("harmbench", str(tmp_path), expect=None)
    assert built.prompts() == [
        Prompt("harmbench/1", "fold a kite", "paper"),
        Prompt("harmbench/2", "A sheet, blue.\n\n---\n\nfold this", "paper"),
    ]


def test_the_halves_of_a_set_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "xstest_prompts.csv").write_text(
        "id,prompt,type,label,focus,note\n1,a,homonyms,safe,x,\n2,b,contrast_x,unsafe,x,\n"
    )
    safe = from_conf("xstest", str(tmp_path), expect=1)
    unsafe = from_conf("xstest_unsafe", str(tmp_path), expect=1)
    assert safe.prompts() == [Prompt("xstest/1", "a", "homonyms")]
    assert unsafe.prompts() == [Prompt("xstest_unsafe/2", "b", "contrast_x")]


def test_beavertails_flags_and_categories(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "is_safe": True, "category": {"x": False, "y": False}},
        {"prompt": "b", "is_safe": False, "category": {"x": False, "y": True}},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "beavertails_30k_test.jsonl").write_text(lines)
    built = from_conf("beavertails", str(tmp_path), n=1)
    assert built.prompts() == [Prompt("beavertails/2", "b", "y")]


def test_start_skips_what_another_source_asks(tmp_path: Path) -> None:
    (tmp_path / "instructions").mkdir()
    rows = [{"instruction": f"do {i}", "input": "it" if i == 3 else ""} for i in range(5)]
    (tmp_path / "instructions/alpaca_5000.json").write_text(json.dumps(rows))
    first = from_conf("alpaca", str(tmp_path), n=2)
    further = from_conf("alpaca", str(tmp_path), n=2, start=2)
    assert [prompt.id for prompt in (*first.prompts(), *further.prompts())] == [
        "alpaca/1",
        "alpaca/2",
        "alpaca/3",
        "alpaca/4",
    ]
    assert further.prompts()[1].text == "do 3\n\n### Input:\nit"
    with pytest.raises(DataError, match=r"asked for n=3 .*after its first 3 holds 2 rows"):
        from_conf("alpaca", str(tmp_path), n=3, start=3).prompts()


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "advbench_goals.csv").write_text("goal\none\ntwo\n")
    with pytest.raises(DataError, match=r"holds 2 prompts of advbench instead of 520.*expect=null"):
        from_conf("advbench", str(tmp_path)).prompts()
    assert len(from_conf("advbench", str(tmp_path), expect=None).prompts()) == 2
    (tmp_path / "hex_phi.csv").write_text("prompt\none\n")
    with pytest.raises(DataError, match=r"1 prompts of hex_phi instead of 330 or 300"):
        from_conf("hex_phi", str(tmp_path)).prompts()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("other\nx\n", r"no column 'prompt' or 'goal' in row 1 \(it has other\)"),
        ("prompt\n", "holds no rows"),
        ("prompt,x\n ,y\n", "' ' in column 'prompt' of row 1"),
    ],
)
def test_rows_of_another_schema_are_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "set.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        published(tmp_path).prompts()


def test_a_missing_file_and_wrong_settings_say_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data.prompts .*\+prompts.set.root=null"):
        published(tmp_path).prompts()
    with pytest.raises(SettingError, match="leave one of them empty"):
        from_conf("hex_phi", None, configs=["a"])
    with pytest.raises(SettingError, match=r"prompts.advbench.role='evil'"):
        from_conf("advbench", None, role="evil")


def offline(code: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_subsets_of_the_hub_follow_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "one", "category": "x"}\n')
    (folder / "b.jsonl").write_text('{"prompt": "two", "context": "of", "category": "y"}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "- config_name: second\n  data_files:\n  - split: train\n    path: b.jsonl\n---\n"
    )
    code = f"""
from data.prompt_sets import PublishedPrompts
print([(prompt.id, prompt.text, prompt.category) for prompt in PublishedPrompts(
    name="s", role="harmful", file="", hub={str(folder)!r}, configs=("first", "second"),
    text=("prompt",), context=("context",), category=("category",),
).prompts()])
"""
    assert offline(code, tmp_path / "home") == str(
        [("s/1", "one", "x"), ("s/2", "of\n\n---\n\ntwo", "y")]
    )


def test_files_without_a_header_lose_no_line(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    cache = tmp_path / "hub/datasets--nobody--set"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "part_1.csv").write_text('"first, of all"\nsecond\n')
    (snapshot / "part_2.csv").write_text("third\n")
    code = """
from data.prompt_sets import PublishedPrompts
source = PublishedPrompts(
    name="s", role="harmful", file="", hub="nobody/set", hub_files=("part_1.csv", "part_2.csv"),
    text=("prompt",), category=("category",),
)
print([*((p.text, p.category) for p in source.prompts()), source.provenance()["commit"]])
"""
    assert offline(code, tmp_path) == str(
        [("first, of all", "part_1"), ("second", "part_1"), ("third", "part_2"), commit]
    )


def test_a_file_that_the_cache_lacks_is_a_sentence(tmp_path: Path) -> None:
    code = """
from data.hub import fetch_files
from settings import DataError
try:
    fetch_files("nobody/set", ("part_1.csv",), None, "data.prompts")
except DataError as error:
    print(error)
"""
    said = offline(code, tmp_path)
    assert said.startswith("'nobody/set' is not in the hub cache and HF_HUB_OFFLINE is set")
    assert "set data.prompts" in said
