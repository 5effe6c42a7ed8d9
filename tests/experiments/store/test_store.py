"""The stage store under what really happens to it: kills, races, full disks, damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.config.experiment import CONF, register_resolvers
from experiments.store import MANIFEST, Stage, Store
from experiments.store.__main__ import _parser, main
from settings import RelockError

STAGE = Stage("attack", 1, {"ratio": 0.05}, ("abc",))


def write_answer(folder: Path) -> dict[str, int]:
    (folder / "deep").mkdir()
    (folder / "deep" / "answer.txt").write_text("42")
    return {"rows": 1}


def never(folder: Path) -> None:
    raise AssertionError("the stage was made again")


def files(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )


def test_a_stage_is_made_once_and_then_reused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.run(STAGE, write_answer)
    found = store.run(STAGE, never)
    assert (made.reused, found.reused) == (False, True)
    assert found.report == {"rows": 1}
    assert (found.folder / "deep" / "answer.txt").read_text() == "42"


@given(
    settings=st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.none()),
    inputs=st.lists(st.text(), max_size=3),
)
def test_key_follows_name_version_settings_and_inputs_alone(
    settings: dict[str, object], inputs: list[str]
) -> None:
    stage = Stage("attack", 1, settings, tuple(inputs))
    backwards = dict(reversed(settings.items()))
    assert stage.key == Stage("attack", 1, backwards, tuple(inputs)).key
    others = [
        Stage("apply", 1, settings, tuple(inputs)),
        Stage("attack", 2, settings, tuple(inputs)),
        Stage("attack", 1, {**settings, "another": 1, "more": 2}, tuple(inputs)),
        Stage("attack", 1, settings, (*inputs, "more")),
    ]
    assert len({stage.key, *(other.key for other in others)}) == 5


def test_a_failing_stage_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_answer(folder)
        raise ValueError("halfway")

    store = Store(tmp_path)
    with pytest.raises(ValueError, match="halfway"):
        store.run(STAGE, fail)
    assert files(tmp_path) == []
    assert not store.run(STAGE, write_answer).reused


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        write_answer(folder)
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    with pytest.raises(RelockError, match=r"stage attack: the disk of .* is full; free some space"):
        Store(tmp_path).run(STAGE, fill)
    assert files(tmp_path) == []


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from experiments.store import Stage, Store

    def make(folder):
        (folder / "half.txt").write_text("half")
        print("making", flush=True)
        signal.pause()

    Store(sys.argv[1]).run(Stage("attack", 1, {"ratio": 0.05}, ("abc",)), make)
"""


@pytest.mark.parametrize("mended_by", ["run", "prune"])
def test_sigkill_in_a_stage_does_no_damage(tmp_path: Path, mended_by: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "making\n"
        process.send_signal(signal.SIGKILL)
    assert any(name.endswith("half.txt") for name in files(tmp_path))
    store = Store(tmp_path)
    assert list(store.entries()) == []
    if mended_by == "run":
        assert not store.run(STAGE, write_answer).reused
    else:
        main(["--root", str(tmp_path), "prune", "--leftovers", "--yes"])
    assert not any(name.endswith("half.txt") for name in files(tmp_path))


RACE = """
    import sys, time
    from pathlib import Path
    from experiments.store import Stage, Store

    def make(folder):
        with open(sys.argv[2], "a") as log:
            log.write("made\\n")
        time.sleep(0.5)

    Store(sys.argv[1]).run(Stage("attack", 1, {}), make)
"""


def test_processes_that_want_the_same_stage_make_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path / "store"), str(log)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    folder = store.run(STAGE, write_answer).folder
    if damage == "truncate":
        (folder / "deep" / "answer.txt").write_text("4")
    elif damage == "remove":
        (folder / "deep" / "answer.txt").unlink()
    else:
        (folder / MANIFEST).write_text("{")
    result = store.run(STAGE, write_answer)
    assert not result.reused
    assert (result.folder / "deep" / "answer.txt").read_text() == "42"


def test_verify_finds_a_changed_byte_and_prune_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    folder = store.run(STAGE, write_answer).folder
    store.run(Stage("judge", 1, {}), write_answer)
    assert main(["--root", str(tmp_path), "verify"]) == 0
    (folder / "deep" / "answer.txt").write_text("24")
    assert main(["--root", str(tmp_path), "verify"]) == 1
    assert main(["--root", str(tmp_path), "prune", "--damaged", "--yes"]) == 0
    assert [entry.name for entry in store.entries()] == ["judge"]
    assert "removed 1 stages" in capsys.readouterr().out


def test_a_store_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("list", "verify", "prune"):
        assert main(["--root", str(tmp_path / "stor"), command]) == 1
        assert "is no folder; give the store's with --root" in capsys.readouterr().err


def test_prune_asks_first_and_minds_age_and_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    for name, age in (("attack", 3), ("judge", 0)):
        manifest = store.run(Stage(name, 1, {}), write_answer).folder / MANIFEST
        content = json.loads(manifest.read_text())
        created = time.gmtime(time.time() - age * 86400)
        content["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", created)
        del content["sha256"]  # As stores of earlier versions are.
        manifest.write_text(json.dumps(content))
    root = ["--root", str(tmp_path)]
    main([*root, "prune", "--older-than", "2d"])
    assert "would remove 1 stages" in capsys.readouterr().out
    assert len(list(store.entries())) == 2
    main([*root, "prune", "--older-than", "2d", "--yes"])
    assert [entry.name for entry in store.entries()] == ["judge"]
    main([*root, "list"])
    assert "1 stages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "what to remove: --stage, --defense, --older-than, --damaged, --leftovers, or --all"),
        (["--stage", "aply"], "--stage=aply: the store holds nothing of this stage; there is app"),
        (["--defense", "nslr"], "nothing of this defense; there is NLSR"),
    ],
)
def test_prune_removes_nothing_where_nothing_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    store = Store(tmp_path)
    store.run(Stage("apply", 1, {"_target_": "defenses.nlsr.NLSR"}), write_answer)
    root = ["--root", str(tmp_path)]
    assert main([*root, "prune", *options, "--yes"]) == 1
    assert said in capsys.readouterr().err
    assert main([*root, "prune", "--leftovers", "--yes"]) == 0
    assert len(list(store.entries())) == 1
    assert main([*root, "prune", "--all", "--yes"]) == 0
    assert not list(store.entries())


def test_a_repairs_folder_in_the_root_is_no_stage(tmp_path: Path) -> None:
    made = Store(tmp_path / "store").run(STAGE, write_answer).folder
    (tmp_path / "repairs").mkdir()
    made.rename(tmp_path / "repairs" / "reference")
    assert not list(Store(tmp_path).entries())
    assert main(["--root", str(tmp_path), "prune", "--all", "--yes"]) == 0
    assert (tmp_path / "repairs" / "reference" / MANIFEST).is_file()


def test_want_of_memory_names_what_needs_less(tmp_path: Path) -> None:
    def greedy(folder: Path) -> None:
        import torch

        torch.empty(2**50)

    said = r"memory gave out in stage prepare; lower defense\.batch_size"
    with pytest.raises(RelockError, match=said):
        Store(tmp_path).run(Stage("prepare", 1, {}), greedy)
    assert not list(Store(tmp_path).entries())


def test_a_store_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RelockError, match=r"store\.root=.* is no folder that can be written"):
        Store(tmp_path / "file" / "store").run(STAGE, write_answer)


def test_a_store_that_may_only_be_read_serves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.run(STAGE, write_answer)
    shutil.rmtree(tmp_path / ".locks")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    before = sorted(tmp_path.rglob("*"))
    assert store.run(STAGE, never).reused
    assert sorted(tmp_path.rglob("*")) == before
    other = Stage("judge", 1, {})
    with pytest.raises(RelockError, match=f"doesn't hold stage judge {other.key} of this run"):
        store.run(other, write_answer)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_group_may_use_what_one_of_it_has_made(tmp_path: Path) -> None:
    def write_private(folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")
        (folder / "model.safetensors").chmod(0o600)

    before = os.umask(0o002)
    try:
        made = Store(tmp_path / "store").run(STAGE, write_private)
    finally:
        os.umask(before)
    (lock,) = (tmp_path / "store" / ".locks").iterdir()
    for path in (made.folder / "model.safetensors", made.folder / MANIFEST, lock):
        assert path.stat().st_mode & 0o777 == 0o664, path
    assert made.folder.stat().st_mode & 0o777 == 0o775
    assert Store(tmp_path / "store").run(STAGE, never).reused


def test_what_another_user_owns_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: object, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / ".locks").mkdir()
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(RelockError, match=r"is another user's and .* umask 002.* chmod -R g\+rwX"):
        Store(tmp_path).run(STAGE, write_answer)
    with pytest.raises(RelockError, match="is another user's"):
        Store(tmp_path).remove(STAGE.name, STAGE.key)


def test_the_list_tells_stages_apart_and_prune_takes_one_defenses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    nlsr = {"_target_": "defenses.nlsr.NLSR", "sparsity": 0.8, "alpha": 1.0}
    for stage in (
        Stage("apply", 1, nlsr),
        Stage("apply", 1, nlsr | {"sparsity": 0.5}),
        Stage("apply", 1, {"_target_": "defenses.reset.Reset"}),
        Stage("prepare", 1, {"defense": "defenses.nlsr.NLSR", "settings": {}}),
        Stage("judge", 1, {"judge": "evaluation.judges.keyword.KeywordJudge", "settings": {}}),
    ):
        store.run(stage, write_answer)
    root = ["--root", str(tmp_path)]
    main([*root, "list"])
    out = capsys.readouterr().out
    assert "NLSR sparsity=0.8" in out
    assert "NLSR sparsity=0.5" in out
    assert "KeywordJudge" in out
    assert "_target_" not in out
    main([*root, "prune", "--defense", "nlsr", "--stage", "apply"])
    assert "would remove 2 stages" in capsys.readouterr().out
    main([*root, "prune", "--defense", "NLSR", "--yes"])
    assert [entry.name for entry in store.entries()] == ["apply", "judge"]


def test_the_store_is_looked_for_where_runs_write_to(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.load(CONF / "config.yaml")
    register_resolvers()
    assert str(_parser().parse_args(["list"]).root) == str(config.store.root)
