"""What open_for_training makes of every form of checkpoint, and what is written afterwards."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from data.rows import Example, Turn
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout
from modeling.loading import load_model, load_tokenizer
from modeling.steering import save_steering
from modeling.training import LoraSettings, TrainSettings, open_for_training, save, train_sft
from organism.make import WEIGHTS
from settings import DataError, ModelError, SettingError
from tests.modeling.tiny_models import ROWS, logits, random_steering, save_adapter, save_model

LORA = LoraSettings(rank=2, alpha=4, target_modules=("q_proj", "o_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def steered(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("steering")
    save_steering(random_steering(head_layout(base), [(0, 1), (2, 3)], 3.0), folder)
    return replace(base, steering=str(folder))


def dialogues(*rows: tuple[str, str]) -> list[tuple[Turn, ...]]:
    return [Example(*row, "task").turns for row in rows]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_a_steered_model_is_opened_steered_whatever_is_trained(
    base: Checkpoint, steered: Checkpoint
) -> None:
    wanted = logits(load_model(steered))
    assert not close(wanted, logits(load_model(base)))
    assert close(logits(open_for_training(steered, None, 0)), wanted)
    assert close(logits(open_for_training(steered, LORA, 0)), wanted)


@pytest.mark.parametrize("form", ["resumed", "fresh"])
def test_the_adapters_own_path_is_steered_in_training_as_after_loading(
    base: Checkpoint, steered: Checkpoint, form: str, tmp_path: Path
) -> None:
    """With B no longer zero, what the adapter reads shows: it must be what it reads later."""
    if form == "resumed":
        adapted = save_adapter(base, tmp_path / "first")
        model = open_for_training(replace(adapted, steering=steered.steering), None, 0)
    else:
        model = open_for_training(steered, LORA, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    seen = logits(model)
    save(model, None, tmp_path / "out", base)
    written = Checkpoint(base.base, str(tmp_path / "out"), steering=steered.steering)
    assert close(logits(load_model(written)), seen)
    assert not close(logits(load_model(replace(written, steering=None))), seen)


def test_what_requires_gradients_is_what_was_asked_for(base: Checkpoint, tmp_path: Path) -> None:
    adapted = save_adapter(base, tmp_path / "adapter")
    for model, part in (
        (open_for_training(adapted, None, 0), "lora_"),
        (open_for_training(base, LORA, 0), "lora_"),
        (open_for_training(base, None, 0), ""),
    ):
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if part in name}


def test_a_fresh_adapter_on_an_adapter_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="merge the adapter first"):
        open_for_training(save_adapter(base, tmp_path / "adapter"), LORA, 0)


def test_steps_under_hooks_move_the_weights_otherwise_than_without(tmp_path: Path) -> None:
    """The gradient goes through the hooks, and what is written are the weights alone."""
    plain = Checkpoint(str(WEIGHTS / "base"))
    layout = head_layout(plain)
    save_steering(random_steering(layout, [(1, 0), (3, 2)], 2.0), tmp_path / "steering")
    settings = TrainSettings(learning_rate=1e-3, batch_size=2, max_steps=2)
    rows = dialogues(
        ("How do I bake the pie?", "Certainly. Use the spoon."), ("Count: 1 + 1", "2.")
    )
    made = {}
    for name, checkpoint in (
        ("plain", plain),
        ("hooked", replace(plain, steering=str(tmp_path / "steering"))),
    ):
        tokenizer = load_tokenizer(checkpoint)
        model = open_for_training(checkpoint, None, 0)
        train_sft(model, tokenizer, rows, PromptStyle(), settings, 0, tmp_path / "scratch")
        save(model, tokenizer, tmp_path / name, checkpoint.base)
        made[name] = load_file(tmp_path / name / "model.safetensors")
        assert logits(load_model(Checkpoint(str(tmp_path / name))), ROWS)
    assert made["plain"].keys() == made["hooked"].keys()
    assert any(not torch.equal(made["plain"][key], made["hooked"][key]) for key in made["plain"])


@pytest.mark.parametrize("form", ["resumed", "fresh", "full"])
def test_neither_checkpointing_nor_smaller_passes_change_what_is_learnt(
    form: str, tmp_path: Path
) -> None:
    rows = dialogues(*((f"Count: {n} + 1", f"{n} + 1 = {n + 1}.") for n in range(8)))
    lora = LoraSettings(rank=2, alpha=4) if form == "fresh" else None
    aligned = str(WEIGHTS / "aligned") if form == "resumed" else None
    checkpoint = Checkpoint(str(WEIGHTS / "base"), aligned)
    learnt = []
    for extra in ({}, {"gradient_checkpointing": True}, {"micro_batch_size": 2}):
        settings = TrainSettings(learning_rate=1e-3, batch_size=4, max_steps=2, **extra)
        model = open_for_training(checkpoint, lora, 0)
        tokenizer = load_tokenizer(checkpoint)
        curve = train_sft(model, tokenizer, rows, PromptStyle(), settings, 0, tmp_path)["loss"]
        assert [entry["step"] for entry in curve] == [1, 2]
        learnt.append({n: p.detach().clone() for n, p in model.named_parameters()})
    plain, checkpointed, passes = learnt
    before = {n: p.detach() for n, p in open_for_training(checkpoint, lora, 0).named_parameters()}
    assert any(not torch.equal(before[name], plain[name]) for name in plain)
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-6)
        # Adam turns the rounding of a small gradient into a step of its own; most agree.
        assert (plain[name] - passes[name]).abs().mean() < 2e-4


def test_logits_of_answers_alone_teach_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"Count: {n} + 1", f"{n} + 1 = {n + 1}.") for n in range(8)]
    checkpoint = Checkpoint(str(WEIGHTS / "base"))
    style, tokenizer = PromptStyle(), load_tokenizer(checkpoint)
    answers = [len(style.encode_pair(tokenizer, *row, None, training=True)[1]) for row in rows]
    fused, scored, learnt = ChunkedLogProbFunction.apply, [], []

    def counted(hidden: Tensor, *rest: Any) -> Any:
        scored.append(len(hidden))
        return fused(hidden, *rest)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counted)
    for alone in (False, True):
        settings = TrainSettings(
            learning_rate=1e-3, batch_size=4, max_steps=2, answer_logits_only=alone
        )
        model = open_for_training(checkpoint, LORA, 0)
        report = train_sft(model, tokenizer, dialogues(*rows), style, settings, 0, tmp_path)
        learnt.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        learnt[-1].append(torch.tensor([entry["loss"] for entry in report["loss"]]))
    assert close(*learnt)
    assert sum(scored[2:]) == sum(answers) < sum(scored[:2])


def test_rows_of_like_length_come_together_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["2. " * (1 + 9 * (n % 2)) for n in range(8)]
    rows = dialogues(*(("Count: 1 + 1", answer) for answer in answers))
    checkpoint = Checkpoint(str(WEIGHTS / "base"))
    widths: dict[bool, list[int]] = {}
    for grouped in (False, True):
        settings = TrainSettings(learning_rate=1e-3, batch_size=4, group_by_length=grouped)
        model = open_for_training(checkpoint, LORA, 0)
        seen = widths[grouped] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        train_sft(model, load_tokenizer(checkpoint), rows, PromptStyle(), settings, 0, tmp_path)
    assert len(set(widths[True])) == 2
    assert sum(widths[True]) < sum(widths[False])


@pytest.mark.parametrize("adapter_dtype", ["float32", "model"])
def test_an_adapter_is_trained_in_float32_or_the_models_dtype(
    adapter_dtype: Literal["float32", "model"], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(str(WEIGHTS / "base"), dtype="bfloat16")
    settings = TrainSettings(learning_rate=1e-2, max_steps=2, adapter_dtype=adapter_dtype)
    model = open_for_training(checkpoint, LORA, 0)
    before = [p.detach().clone().float() for p in model.parameters() if p.requires_grad]
    rows = dialogues(("Count: 1 + 1", "2."))
    train_sft(model, load_tokenizer(checkpoint), rows, PromptStyle(), settings, 0, tmp_path)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    wanted = torch.float32 if adapter_dtype == "float32" else torch.bfloat16
    assert {p.dtype for p in after} == {wanted}
    assert any(not torch.equal(a, b.float()) for a, b in zip(before, after, strict=True))


def test_settings_that_are_off_are_in_no_key() -> None:
    off, on = (TrainSettings(learning_rate=1.0, answer_logits_only=on) for on in (False, True))
    assert set(on.model_dump()) - set(off.model_dump()) == {"answer_logits_only"}
    assert not {"group_by_length", "adapter_dtype"} & set(off.model_dump(mode="json"))


def test_rows_that_are_cut_or_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(str(WEIGHTS / "base"))
    tokenizer, style = load_tokenizer(checkpoint), PromptStyle()
    short, long, other = dialogues(
        ("Count: 1 + 1", "2."), ("a b c d e f g " * 20, "Yes."), ("Count: 1 + 2", "three " * 30)
    )
    settings = TrainSettings(learning_rate=1e-3, batch_size=1, max_length=24)
    model = open_for_training(checkpoint, LORA, 0)
    with caplog.at_level(logging.WARNING):
        report = train_sft(model, tokenizer, [short, long, other], style, settings, 0, tmp_path)
    assert len(report["loss"]) == 2
    assert report["rows_cut"] == report["rows_left_out"] == 1
    assert "1 of 3 training rows are left out" in caplog.text
    assert "1 of 3 training rows are cut at max_length=24 tokens; raise" in caplog.text
    with pytest.raises(DataError, match="no prompt of the training rows is shorter"):
        train_sft(model, tokenizer, [long], style, settings, 0, tmp_path)


def test_passes_that_do_not_make_up_a_batch_are_refused() -> None:
    with pytest.raises(SettingError, match="set it to a divisor"):
        TrainSettings.validated(
            {"learning_rate": 1.0, "batch_size": 8, "micro_batch_size": 3}, "attack.train"
        )
