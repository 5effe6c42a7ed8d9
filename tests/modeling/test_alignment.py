"""Alignment: the ids that each of TRL's trainers gets, what each method moves, what is refused."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.rows import Example
from modeling.alignment import Alignment, Preference, preference_trainer
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer
from modeling.training import LoraSettings, open_for_training, train
from organism.make import WEIGHTS
from organism.sources import AlignmentPairs
from settings import DataError, SettingError

BASE = Checkpoint(str(WEIGHTS / "base"))
PAIRS = [(pair.prompt, pair.chosen, pair.rejected) for pair in AlignmentPairs().pairs()[:8]]
LORA = LoraSettings(rank=4, alpha=8)
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 1.0},
}
STYLES = {
    "chat": PromptStyle(system="Be brief."),
    "alpaca": PromptStyle(style="alpaca"),
    "alpaca of NLSR's scripts": PromptStyle(style="alpaca", bos_in_training=False),
    "alpaca of Booster's": PromptStyle(style="alpaca", newline=True),
}
# A template that ends turns by another token than the tokenizer's EOS, as Llama 3's and Qwen's do.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "<|user|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def preference(method: str, **train: Any) -> Preference:
    values = {"learning_rate": 1e-3, "batch_size": 4, "max_length": 256, **train}
    built: Preference = Preference.validated(
        {"method": method, "train": values, **SETTINGS[method]}, "align.preference"
    )
    return built


def sequences(batch: dict[str, Any], ids: str, mask: str, answer: str) -> list[tuple[Any, Any]]:
    """(prompt ids, answer ids) of a collated batch; `answer` is 1 or not -100 on the answer."""
    found = []
    for row, real, marks in zip(batch[ids], batch[mask], batch[answer], strict=True):
        on = (marks > 0) & (real == 1)
        found.append((row[(real == 1) & ~on].tolist(), row[on].tolist()))
    return found


def fed(method: str, trainer: Any) -> list[tuple[list[int], list[int]]]:
    """Every (prompt ids, answer ids) that reaches the model, from the trainer's own batches."""
    found = []
    for batch in trainer.get_train_dataloader():
        if method in ("dpo", "kto"):
            found += sequences(batch, "input_ids", "attention_mask", "completion_mask")
            continue
        for side in ("chosen", "rejected"):
            found += sequences(
                batch, f"{side}_input_ids", f"{side}_attention_mask", f"{side}_labels"
            )
    return found


@pytest.mark.parametrize("template", [None, TURNS])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", SETTINGS)
def test_trainers_get_the_ids_of_the_prompt_style(
    method: str, style: str, template: str | None, tmp_path: Path
) -> None:
    tokenizer, rendered = load_tokenizer(BASE), STYLES[style]
    if template is not None:
        tokenizer.chat_template = template
    model = open_for_training(BASE, LORA, 0)
    trainer, _ = preference_trainer(
        model, tokenizer, PAIRS, rendered, preference(method), 0, tmp_path
    )
    wanted = [
        (
            rendered.encode_prompt(tokenizer, prompt, training=True),
            rendered.encode_answer(tokenizer, prompt, answer),
        )
        for prompt, *answers in PAIRS
        for answer in answers
    ]
    assert sorted(fed(method, trainer)) == sorted(wanted)


def test_ktos_rows_are_desirable_and_undesirable_and_mismatched(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BASE)
    model = open_for_training(BASE, LORA, 0)
    trainer, _ = preference_trainer(
        model, tokenizer, PAIRS, PromptStyle(), preference("kto"), 0, tmp_path
    )
    chosen = {tuple(PromptStyle().encode_answer(tokenizer, p, c)) for p, c, _ in PAIRS}
    labels = []
    for batch in trainer.get_train_dataloader():
        answers = sequences(batch, "input_ids", "attention_mask", "completion_mask")
        mismatched = sequences(batch, "KL_input_ids", "KL_attention_mask", "KL_completion_mask")
        for (_, answer), label in zip(answers, batch["label"], strict=True):
            assert (tuple(answer) in chosen) == bool(label)
        assert [prompt for prompt, _ in mismatched] == [prompt for prompt, _ in answers]
        assert [a for _, a in mismatched] == [answers[-1][1], *(a for _, a in answers[:-1])]
        labels += [bool(label) for label in batch["label"]]
    assert sum(labels) == len(PAIRS) == len(labels) - sum(labels)
    assert labels != sorted(labels)


def margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of every pair, one sequence at a time."""
    found = []
    for prompt, *answers in PAIRS:
        head, scores = style.encode_prompt(tokenizer, prompt, training=True), []
        for answer in answers:
            tail = style.encode_answer(tokenizer, prompt, answer)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([head + tail])).logits[0]
            chances = logits.log_softmax(-1)[len(head) - 1 : -1]
            scores.append(chances.gather(1, torch.tensor(tail)[:, None]).sum())
        found.append(scores[0] - scores[1])
    return torch.stack(found)


@pytest.mark.parametrize(
    "style", ["chat", pytest.param("alpaca of NLSR's scripts", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_raises_the_chosen_over_the_rejected(
    method: str, style: str, tmp_path: Path
) -> None:
    tokenizer, rendered = load_tokenizer(BASE), STYLES[style]
    model = open_for_training(BASE, LORA, 0)
    before = margins(model, tokenizer, rendered)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trl.experimental.*")
        phase = preference(method, max_steps=5)
        trainer, _ = preference_trainer(model, tokenizer, PAIRS, rendered, phase, 0, tmp_path)
        curve = train(trainer, phase.train)
    assert [point["step"] for point in curve] == [1, 2, 3, 4, 5]
    after = margins(model.eval(), tokenizer, rendered)
    assert after.mean() > before.mean()


@pytest.mark.parametrize("method", SETTINGS)
def test_in_bfloat16_too_answers_are_summed_up_in_float32(method: str, tmp_path: Path) -> None:
    checkpoint = replace(BASE, dtype="bfloat16")
    tokenizer, model = load_tokenizer(checkpoint), open_for_training(checkpoint, LORA, 0)
    trainer, _ = preference_trainer(
        model, tokenizer, PAIRS, PromptStyle(), preference(method), 0, tmp_path
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    assert loss.dtype == torch.float32
    if method in ("orpo", "simpo"):
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        assert chosen.dtype == rejected.dtype == torch.float32


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_the_adapter_as_it_comes_in(method: str, tmp_path: Path) -> None:
    """Not the base model: against itself a model's loss is that of a difference of nothing."""
    tokenizer, model = load_tokenizer(BASE), open_for_training(BASE, LORA, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    trainer, _ = preference_trainer(
        model, tokenizer, PAIRS, PromptStyle(), preference(method), 0, tmp_path
    )
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    assert float(loss.detach()) == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-5)


@pytest.mark.parametrize("method", SETTINGS)
def test_both_phases_leave_one_plain_adapter(method: str, tmp_path: Path) -> None:
    recipe = Alignment.validated(
        {
            "lora": LORA,
            "sft": {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 2},
            "preference": preference(method, max_steps=2),
        },
        "align",
    )
    rows = [Example(prompt, chosen, "refusal").turns for prompt, chosen, _ in PAIRS]
    report = recipe.run(BASE, rows, PAIRS, PromptStyle(), tmp_path / "out", tmp_path / "scratch")
    assert report["sft"]["rows"] == report["preference"]["pairs"] == len(PAIRS)
    assert report["preference"]["method"] == method
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    model: Any = load_model(Checkpoint(BASE.base, str(tmp_path / "out")))
    assert list(model.peft_config) == ["default"]


def test_pairs_that_are_cut_or_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, model = load_tokenizer(BASE), open_for_training(BASE, LORA, 0)
    long = ("a b c d e f g " * 20, "Yes.", "No.")
    settings = preference("dpo", max_length=24)
    with caplog.at_level(logging.WARNING):
        trainer, counts = preference_trainer(
            model, tokenizer, [*PAIRS, long], PromptStyle(), settings, 0, tmp_path
        )
    assert "1 of 9 preference pairs are left out" in caplog.text
    assert "8 of 9 preference pairs are cut at max_length=24 tokens" in caplog.text
    assert counts == {"rows_cut": 8, "rows_left_out": 1}
    for prompt, answer in fed("dpo", trainer):
        assert 0 < len(answer) <= 24 - len(prompt)
    with pytest.raises(DataError, match=r"raise align\.preference\.train\.max_length"):
        preference_trainer(model, tokenizer, [long], PromptStyle(), settings, 0, tmp_path)
    with pytest.raises(DataError, match="no preference pairs"):
        preference_trainer(model, tokenizer, [], PromptStyle(), settings, 0, tmp_path)


TRAIN = {"learning_rate": 1e-4, "batch_size": 4}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "dpo", "beta": 0.1, "gamma": 1.0}, r"align\.preference: gamma is of method="),
        ({"method": "simpo", "beta": 2.0}, r"align\.preference: method=simpo needs a margin"),
        ({"method": "kto", "beta": 0.1, "train": {**TRAIN, "batch_size": 1}}, "one row is too few"),
        (
            {"method": "kto", "beta": 0.1, "train": {**TRAIN, "micro_batch_size": 1}},
            r"set train\.micro_batch_size=null or to 2 or more",
        ),
        ({"method": "ppo", "beta": 0.1}, r"align\.preference\.method='ppo' is not allowed"),
        ({"method": "dpo", "beta": 0.0}, r"align\.preference\.beta=0\.0 is not allowed"),
        ({"method": "dpo"}, r"align\.preference\.beta is missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        Alignment.validated({"preference": {"train": TRAIN, **values}}, "align")


def test_an_alignment_needs_a_phase() -> None:
    with pytest.raises(SettingError, match=r"align\.sft and align\.preference are both null"):
        Alignment.validated({}, "align")
