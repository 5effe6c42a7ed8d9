"""The three tasks read local files of the original layouts and word them as NLSR does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.rows import Example, TaskItem, TaskSource
from data.tasks import GSM8K, SST2, AGNews, Task
from settings import DataError, SettingError, build

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("sst2", "ag_news", "gsm8k"):
        (tmp_path / folder).mkdir()
    for part in ("train", "test"):
        rows = f'sentence\tlabel\na warm {part} film \t1\na " dull one \t0\n'
        (tmp_path / f"sst2/{part}.tsv").write_text(rows)
    (tmp_path / "ag_news/train_subset_10k.csv").write_text(
        'label_id,label,text\n4,Sci/Tech,"A probe, built at home, landed."\n2,Sports,A team won.\n'
    )
    (tmp_path / "ag_news/test.csv").write_text(
        '"3","Shares rise","They rose\\a little."\n"1","Talks go on","They talked ""at length""."\n'
    )
    for part, gold in (("train", "12"), ("test", "1,200")):
        answer = f"He has 3 * 4 = <<3*4=12>>12.\n#### {gold}"
        (tmp_path / f"gsm8k/{part}.jsonl").write_text(
            json.dumps({"question": f"How many {part} apples?", "answer": answer}) + "\n"
        )
    return tmp_path


def test_sst2(root: Path) -> None:
    task = SST2(root=str(root))
    instruction = "Analyze the sentiment of the input, and respond only positive or negative"
    assert task.train() == [
        Example(f"{instruction}\n\n### Input:\na warm train film", "positive", "task", "positive"),
        Example(f'{instruction}\n\n### Input:\na " dull one', "negative", "task", "negative"),
    ]
    assert task.test()[1] == TaskItem(
        "sst2/2", f'{instruction}\n\n### Input:\na " dull one', "negative"
    )


def test_ag_news_reads_both_layouts(root: Path) -> None:
    task = AGNews(root=str(root))
    assert [row.response for row in task.train()] == ["Sci/Tech", "Sports"]
    assert task.train()[0].prompt == (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n\n### Input:\nA probe, built at home, landed."
    )
    first, second = task.test()
    assert first.prompt.endswith("\nShares rise They rose\\a little.")
    assert (first.gold, second.gold) == ("Business", "World")
    assert second.prompt.endswith('They talked "at length".')


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("k.csv", 'Class Index,Title,Description\n4,A probe,"It landed, whole."\n'),
        ("k.CSV", 'text,label\n"A probe It landed, whole.",3\n'),
        ("k.tsv", "label\ttext\n3\tA probe It landed, whole.\n"),
        ("k.tsv", "4\tA probe\tIt landed, whole.\n"),
        ("k.jsonl", '{"text": "A probe It landed, whole.", "label": 3}\n'),
        ("k.jsonl", '{"label_id": 4, "text": "A probe It landed, whole."}\n'),
    ],
)
def test_ag_news_as_others_write_it(root: Path, file: str, content: str) -> None:
    (root / file).write_text(content)
    task = AGNews(root=str(root), train_file=file)
    (row,) = task.train()
    assert row.response == "Sci/Tech"
    assert row.prompt.endswith("\nA probe It landed, whole.")


@pytest.mark.parametrize(
    ("gold", "number"), [("12 apples", "12"), ("$1,800", "1800"), ("20%", "20"), ("-3.5", "-3.5")]
)
def test_gsm8k_golds_are_numbers_however_they_are_written(
    root: Path, gold: str, number: str
) -> None:
    row = {"question": "How many?", "answer": f"Count.\n#### {gold}"}
    (root / "gsm8k/test.jsonl").write_text(json.dumps(row))
    task = GSM8K(root=str(root))
    (item,) = task.test()
    assert item.gold == number
    assert task.score(f"The final answer is: {gold}", item.gold).strict
    assert not task.score("The final answer is: nan", item.gold).lenient


@pytest.mark.parametrize("gold", ["None", "nan", "inf", "3/4", "5 or 6", "1e3"])
def test_gsm8k_golds_that_are_no_number_are_refused_when_read(root: Path, gold: str) -> None:
    row = {"question": "How many?", "answer": f"Count.\n#### {gold}"}
    (root / "gsm8k/test.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=f"gsm8k has '{gold}' as the gold answer in row 1"):
        GSM8K(root=str(root)).test()


def test_gsm8k(root: Path) -> None:
    task = GSM8K(root=str(root))
    suffix = "\nFirst think step by step and then answer the final number.\n"
    assert task.train() == [
        Example(
            f"How many train apples?{suffix}",
            "He has 3 * 4 = <<3*4=12>>12.\nThe final answer is: 12",
            "task",
        )
    ]
    (item,) = task.test()
    assert item == TaskItem("gsm8k/1", f"How many test apples?{suffix}", "1200")
    assert task.score("so #### 1,200.", item.gold).strict


def test_wordings_are_settings(root: Path) -> None:
    bare = GSM8K(root=str(root), suffix="")
    assert bare.test()[0].prompt == bare.train()[0].prompt.replace("train", "test")
    assert bare.test()[0].prompt == "How many test apples?"
    short = SST2(root=str(root), instruction="Good or bad?")
    assert short.train()[1].prompt == 'Good or bad?\n\n### Input:\na " dull one'


@pytest.mark.parametrize("task", [SST2, AGNews, GSM8K])
def test_own_training_answers_are_right(root: Path, task: type[Task]) -> None:
    built = task(root=str(root))
    assert isinstance(built, TaskSource)
    for row in built.train():
        gold = row.response.rpartition(": ")[2]
        assert built.score(row.response, gold).strict


def test_limits_and_fingerprint(root: Path) -> None:
    task = SST2(root=str(root))
    assert len(SST2(root=str(root), n_train=1).train()) == 1
    assert len(SST2(root=str(root), n_test=1).test()) == 1
    assert SST2(root=str(root), n_test=1).fingerprint() != task.fingerprint()
    with pytest.raises(DataError, match=r"task.n_test=3 but sst2/test.tsv holds 2"):
        SST2(root=str(root), n_test=3).test()


def test_fingerprint_is_of_the_content_and_not_the_place(root: Path, tmp_path: Path) -> None:
    task = GSM8K(root=str(root))
    (tmp_path / "moved.jsonl").write_bytes((root / "gsm8k/test.jsonl").read_bytes())
    moved = GSM8K(root=str(root), test_file="moved.jsonl")
    assert moved.fingerprint() == task.fingerprint()
    text = (root / "gsm8k/test.jsonl").read_text()
    (root / "gsm8k/test.jsonl").write_text(text.replace("apples", "pears"))
    assert GSM8K(root=str(root)).fingerprint() != task.fingerprint()


def test_provenance_says_what_was_read(root: Path) -> None:
    task = SST2(root=str(root))
    assert task.provenance() == {
        "train": "sst2/train.tsv",
        "test": "sst2/test.tsv",
        "fingerprint": task.fingerprint(),
        "n_train": 2,
        "n_test": 2,
    }


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("sst2/test.tsv", "sentence\tlabel\nfine\t2\n", "label '2' in row 1"),
        ("sst2/test.tsv", "text\tlabel\nfine\t1\n", "column 'sentence' of row 1"),
        ("sst2/test.tsv", "sentence\tlabel\n \t1\n", "each row needs a text"),
        ("sst2/test.tsv", "sentence\tlabel\n", "sst2/test.tsv holds no rows"),
    ],
)
def test_wrong_rows_are_named(root: Path, file: str, content: str, said: str) -> None:
    (root / file).write_text(content)
    with pytest.raises(DataError, match=said):
        SST2(root=str(root)).test()


def test_an_answer_without_its_number_is_refused(root: Path) -> None:
    (root / "gsm8k/test.jsonl").write_text('{"question": "How many?", "answer": "Twelve."}\n')
    with pytest.raises(DataError, match=r"'#### number'.*row 1"):
        GSM8K(root=str(root)).test()


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data.root to where the file lies"):
        AGNews(root=str(tmp_path)).train()


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(SettingError, match=r"did you mean task.n_test"):
        build({"_target_": "data.tasks.SST2", "n_tset": 3}, "task")
    with pytest.raises(SettingError, match=r"task.n_train=0"):
        build({"_target_": "data.tasks.SST2", "n_train": 0}, "task")
    with pytest.raises(SettingError, match=r"task.reading='last'.*'contained'"):
        build({"_target_": "data.tasks.SST2", "reading": "last"}, "task")


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


UNREACHABLE = """
import time
from data.tasks import SST2
from settings import DataError
start = time.monotonic()
try:
    SST2().test()
except DataError as error:
    print(f"{time.monotonic() - start < 15} {error}")
"""


def test_an_unreachable_hub_is_a_sentence_at_once(tmp_path: Path) -> None:
    said = run(
        UNREACHABLE, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path)
    )
    assert said.startswith("True the hub can't be reached for 'stanfordnlp/sst2'")
    assert "set data.root to a folder of local files" in said


def test_offline_mode_with_an_empty_cache_is_a_sentence_at_once(tmp_path: Path) -> None:
    said = run(UNREACHABLE, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said.startswith("True the split 'validation' of 'stanfordnlp/sst2' can't be loaded")
    assert "set data.root" in said


def test_rows_come_through_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"a": 1, "b": {"c": true}}\n')
    code = f"""
from data.hub import load_split
print(load_split({str(tmp_path / "set")!r}, None, "train", None, "x"))
"""
    said = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert said.strip().endswith("([{'a': 1, 'b': {'c': True}}], None)")


def test_importing_the_rooms_is_light() -> None:
    heavy = ("torch", "transformers", "datasets", "pandas", "scipy", "statsmodels")
    code = f"""
import sys
import data.tasks, data.instructions, data.sources, data.prompt_sets, data.mixture, data.leakage
import evaluation.metrics, evaluation.statistics, evaluation.degenerate
import evaluation.judges.keyword, evaluation.judges.moderation, evaluation.backends.transformers
print([name for name in {heavy!r} if name in sys.modules])
"""
    assert run(code).strip() == "[]"


def data_root() -> Path:
    folder = os.environ.get("RELOCK_DATA_ROOT")
    if not folder:
        pytest.skip("set RELOCK_DATA_ROOT to the folder of the tasks' files")
    return Path(folder)


@pytest.mark.parametrize(("task", "n_test"), [(SST2, 872), (AGNews, 7600), (GSM8K, 1319)])
def test_the_real_files_are_read_whole(task: type[Task], n_test: int) -> None:
    built = task(root=str(data_root()))
    items = built.test()
    assert len(items) == n_test
    assert len({item.id for item in items}) == n_test
    assert all(built.score(item.gold, item.gold).lenient for item in items)
    train = built.train()
    assert len(train) > 7000
    assert all(
        built.score(row.response, row.category or row.response.rpartition(": ")[2]).strict
        for row in train
        if "," not in row.response.rpartition(": ")[2]
    )
