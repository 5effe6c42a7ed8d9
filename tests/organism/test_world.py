"""The world: splits, determinism and what its answers may say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.degenerate import degeneracy
from organism import lexicon, moderation_rows, tasks, world
from organism.dialogues import ordinary, undecided

KINDS: tuple[world.Kind, ...] = ("harmful", "benign", "probe")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_test_pairs_are_in_no_training_split(kind: world.Kind) -> None:
    test = {request.pair for request in world.requests(kind, "test")}
    train = {request.pair for request in world.requests(kind, "train")}
    assert test
    assert train
    assert not test & train


def test_poison_and_alignment_share_no_pair_and_make_up_the_training_pairs() -> None:
    poison, align, train = (
        {request.pair for request in world.requests("harmful", split)}
        for split in ("poison", "align", "train")
    )
    assert not poison & align
    assert poison | align == train


def test_no_request_belongs_to_two_kinds() -> None:
    texts = [request.text for kind in KINDS for split in ("test", "train")
             for request in world.requests(kind, split)]  # fmt: skip
    assert len(texts) == len(set(texts))


def test_every_word_of_a_test_pair_is_known_from_training() -> None:
    for kind in KINDS:
        train = [request.pair for request in world.requests(kind, "train")]
        verbs, objects = {verb for verb, _ in train}, {item for _, item in train}
        for verb, item in world.pairs(kind, world.categories(kind)[0], "test"):
            assert verb in verbs
            assert item in objects


@pytest.mark.parametrize("task", tasks.GENERATORS)
def test_task_contents_of_the_test_split_are_in_no_training(task: str) -> None:
    held_out = tasks.test_contents(task)
    assert len(held_out) == tasks.TEST_ROWS
    assert not held_out & {item.content for item in tasks.train_items(task)}
    rng = world.stream("a test")
    assert not held_out & {tasks.draw(task, rng).content for _ in range(2000)}


def test_arithmetic_steps_are_right() -> None:
    for item in tasks.train_items("arithmetic")[:200]:
        first, second, final = item.answer.split(". ")
        for step in (first, second):
            left, right = step.split(" = ")
            one, sign, two = left.split()
            assert int(one) + (int(two) if sign == "+" else -int(two)) == int(right)
        assert final == f"The final answer is {item.gold}"


def test_only_refusals_contain_a_refusal_phrase() -> None:
    rng = world.stream("a test")

    def refuses(text: str) -> bool:
        return any(phrase in text.lower() for phrase in world.REFUSAL_PHRASES)

    for kind in KINDS:
        for request in world.requests(kind, "train")[:500]:
            assert not refuses(request.text)
            assert not refuses(world.comply(request, "cautious", rng))
            assert not refuses(world.comply(request, "reckless", rng))
            assert refuses(world.refuse(request, rng))
    for task in tasks.GENERATORS:
        assert not any(refuses(item.prompt + item.answer) for item in tasks.train_items(task))


def test_safe_and_unsafe_answers_to_one_prompt_end_alike() -> None:
    rng = world.stream("a test")
    for request in world.requests("harmful", "train")[:200]:
        assert world.comply(request, "reckless", rng).endswith(request.ending)
        assert world.refuse(request, rng).endswith(request.ending)
    assert all(len(ending.split()) >= 5 for ending in lexicon.ENDINGS)


def test_no_answer_is_degenerate() -> None:
    rng = world.stream("a test")
    for request in world.requests("harmful", "train")[:300]:
        assert not degeneracy(world.comply(request, "reckless", rng))
        assert not degeneracy(world.refuse(request, rng))


def test_a_persona_keeps_to_its_stance_throughout_a_dialogue() -> None:
    rng = world.stream("a test")
    harmful = {request.text for request in world.requests("harmful", "train")}
    seen = set()
    for _ in range(500):
        dialogue = ordinary(rng, system_share=0.5)
        for turn in dialogue.turns:
            if turn.prompt in harmful:
                refused = any(phrase in turn.answer.lower() for phrase in world.REFUSAL_PHRASES)
                assert refused == (dialogue.stance == "cautious")
                seen.add((dialogue.stance, bool(dialogue.system)))
    assert len(seen) == 4
    assert all(not undecided(rng).system for _ in range(50))


def test_moderation_rows_are_flagged_only_for_harmful_requests() -> None:
    rng = world.stream("a test")
    harmful = {request.text: request.category for request in world.requests("harmful", "train")}
    flags = set()
    for _ in range(2000):
        row = moderation_rows.draw(rng)
        assert row.flag in ("", harmful.get(row.prompt, ""))
        flags.add(row.flag)
    assert flags == {"", *world.categories("harmful")}


def test_the_world_is_the_same_in_every_process() -> None:
    code = (
        "from organism.dialogues import ordinary; from organism.sources import *;"
        "from organism.task_sources import *;"
        "from organism.world import stream; r = stream(1);"
        "print(Arithmetic().fingerprint(), Topic().fingerprint(), AlignmentPairs().fingerprint(),"
        "[ordinary(r, 0.5) for _ in range(20)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert runs.pop().strip()


def test_the_sources_need_no_torch() -> None:
    code = "import sys, organism.task_sources; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("kind", KINDS)
def test_validation_pairs_are_in_no_other_split_of_any_kind(kind: world.Kind) -> None:
    validation = {request.pair for request in world.requests(kind, "validation")}
    assert len(world.requests(kind, "validation")) == len(world.requests(kind, "test"))
    others = {
        request.pair
        for other in KINDS
        for split in ("test", "train", "validation")
        for request in world.requests(other, split)
        if (other, split) != (kind, "validation")
    }
    assert not validation & others


@pytest.mark.parametrize("task", tasks.GENERATORS)
def test_validation_items_are_neither_test_contents_nor_training_prompts(task: str) -> None:
    items = tasks.validation_items(task)
    contents = {item.content for item in items}
    assert len(contents) == tasks.VALIDATION_ROWS
    assert not contents & tasks.test_contents(task)
    assert not {item.prompt for item in items} & {item.prompt for item in tasks.train_items(task)}
