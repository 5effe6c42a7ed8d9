"""SafetyLock's official variant against its description written out in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedTokenizerFast

from defenses.base import Models
from defenses.safetylock import LOCK, SafetyLock
from defenses.safetylock.activations import encode_pairs, head_outputs
from defenses.safetylock.directions import mass_mean, scores, split
from defenses.safetylock.lock import Lock, load_lock
from modeling.chat import PromptStyle
from modeling.heads import head_layout
from modeling.loading import load_model, load_tokenizer
from tests.defenses.tiny_lora_models import NumberCalibration, number_pairs

PAIRS = number_pairs(16)
# Llama 3's first template in numbers: 38 opens a turn, 34 and 35 are roles, 33 ends a header and
# 32 a turn; the header of the answer to come is always written.
FIRST_LLAMA_3 = (
    "{% for m in messages %}38 {{ {'system': 34, 'user': 35, 'assistant': 36}[m['role']] }} 33 31 "
    "{{ m['content'] }} 32 {% endfor %}38 36 33 31 "
)


@pytest.fixture
def tokenizer(models: Models) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(models.aligned)
    tokenizer.chat_template = FIRST_LLAMA_3
    return tokenizer


def test_an_empty_system_line_is_a_turn_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    style = PromptStyle()
    without = style.messages("5 6", "7")
    assert style.messages("5 6", "7", "") == [{"role": "system", "content": ""}, *without]
    assert PromptStyle(system="").messages("5 6", "7") == style.messages("5 6", "7", "")
    header = [38, 34, 33, 31, 32]
    plain = style.encode_prompt(tokenizer, "5 6")
    assert style.encode_prompt(tokenizer, "5 6", "") == header + plain
    assert PromptStyle(system_role=False).messages("5 6", "7", "") == without
    alpaca = PromptStyle(style="alpaca")
    assert alpaca.render_alpaca("5", "") == alpaca.render_alpaca("5")


@pytest.mark.parametrize("answer", ["2 4 6 8 10 12", "2"])
def test_the_slice_is_taken_off_the_whole_dialogue(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    pair = replace(PAIRS[0], chosen=answer)
    encoded = encode_pairs(
        [pair], tokenizer, PromptStyle(), count=1, last_tokens=5, answer_end="legacy_slice",
        system="", seed=0,
    )  # fmt: skip
    for (prompt, tokens), text in zip(encoded.rows, (answer, pair.rejected), strict=True):
        turns = [("34", ""), ("35", pair.prompt), ("36", text)]
        rendered = "".join(f"38 {role} 33 31 {content} 32 " for role, content in turns)
        whole = [int(word) for word in (rendered + "38 36 33 31").split()]
        assert prompt + tokens == whole[:-5]
    assert encoded.too_short == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"variant": "official"}, ""),
        ({"variant": "official", "empty_system": False}, None),
        ({"variant": "official", "system": "11 12"}, "11 12"),
        ({}, None),
        ({"system": ""}, ""),
        ({"empty_system": True}, ""),
    ],
)
def test_which_system_line_the_pairs_get(
    models: Models, settings: dict[str, object], line: str | None
) -> None:
    defense = SafetyLock(n_pairs=16, last_tokens=2, stability_seeds=0, **settings)  # type: ignore[arg-type]
    _, rows, _ = defense.build(models.aligned, PAIRS, PromptStyle())
    start = {None: [36], "": [38, 36], "11 12": [38, 11, 12, 36]}[line]
    assert all(row[0][: len(start)] == start for row in rows)
    _, styled, _ = defense.build(models.aligned, PAIRS, PromptStyle(system="9"))
    own = [38, 9] if defense.system is None else start
    assert all(row[0][: len(own)] == own for row in styled)


def test_scores_and_directions_are_numpys_and_scikit_learns_in_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 4, 40, 5, 16, generator=generator)
    outputs[:, :, 0::2, :, :3] += torch.linspace(0, 1.5, 8).reshape(2, 4, 1, 1, 1)
    half = outputs.half()
    held = split(40, 5, 0.4, "tokens", 42)
    score, right = scores(half, held, "train_validation_mean", 1.0)
    found = mass_mean(outputs, "float16")
    safe = np.repeat(np.arange(40) % 2 == 0, 5)
    validates = held.flatten().numpy()
    assert (~validates).sum() == 120
    for layer in range(2):
        for head in range(4):
            x = half[layer, head].reshape(200, 16).numpy()
            probe = LogisticRegression(max_iter=1000).fit(x[~validates], safe[~validates])
            parts = [probe.score(x[part], safe[part]) for part in (~validates, validates)]
            assert float(score[layer, head]) == np.float32((parts[0] + parts[1]) / 2)
            assert float(right[layer, head]) == np.float32(parts[1])
            u = np.mean(x[safe], axis=0) - np.mean(x[~safe], axis=0)
            u = u / np.linalg.norm(u)
            assert u.dtype == np.float16
            np.testing.assert_array_equal(found.u[layer, head].numpy(), u)
            assert float(found.sigma[layer, head]) == float(np.std(x @ u))


def test_alpha_sigma_u_rounds_to_half_precision(models: Models, tmp_path: Path) -> None:
    defense = SafetyLock(variant="official", n_pairs=16, last_tokens=2, k=3, stability_seeds=0)
    defense.prepare(models, NumberCalibration([], safety_pairs=PAIRS), tmp_path)
    lock = load_lock(tmp_path / LOCK, "lock")
    deltas = lock.deltas(lock.heads(3), 6.0)
    for layer, head in lock.heads(3):
        u = lock.directions.u[layer, head].numpy().astype(np.float16)
        sigma = np.float16(lock.directions.sigma[layer, head])
        expected = np.float16(np.float16(6) * sigma) * u
        np.testing.assert_array_equal(deltas[layer][lock.layout.columns(head)].numpy(), expected)
    layout = head_layout(models.aligned)
    _, rows, _ = defense.build(models.aligned, PAIRS, PromptStyle())
    outputs = head_outputs(load_model(models.aligned, device="cpu"), layout, rows, 2, 1)
    assert torch.equal(mass_mean(outputs.half(), "float16").u, lock.directions.u)


def test_heads_that_score_as_well_as_the_last_are_in_the_record() -> None:
    scores = torch.tensor([[[0.9, 0.8, 0.7999], [0.7985, 0.9, 0.8]]])
    lock = Lock(None, scores, scores[0], None, {}, {})  # type: ignore[arg-type]
    assert lock.heads(3) == [(0, 0), (1, 1), (0, 1)]
    assert lock.stability(3)["as_good"] == [[0, 2], [1, 2]]
    assert lock.stability(2)["as_good"] == []
