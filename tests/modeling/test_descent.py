"""Whether a model may be a fine-tune of another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.checkpoint import Checkpoint
from modeling.descent import check_descent
from modeling.loading import load_model
from settings import ModelError
from tests.defenses.tiny_lora_models import save_base
from tests.defenses.victims import KINDS, shared_case


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tune_of_any_kind_descends_from_its_aligned_model(kind: str) -> None:
    case = shared_case("llama", kind)
    descent = check_descent(case.models.aligned, case.attacked, "the model")
    assert descent.kind == kind.partition("/")[0]
    assert 0.01 < descent.difference < 0.5


def test_another_models_weights_and_tokens_are_refused(tmp_path: Path) -> None:
    models = [save_base(tmp_path / name) for name in ("aligned", "other", "tokens")]
    aligned, other, tokens = models
    model = load_model(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(other.base)
    with pytest.raises(ModelError, match=r"differ by 1[34]. % of their norm"):
        check_descent(aligned, other, "the model")
    file = Path(tokens.base) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "CharDelimiterSplit", "delimiter": "1"}
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"its tokenizer reads a text differently"):
        check_descent(aligned, tokens, "the model")
    with pytest.raises(ModelError, match=r"differ in model.layers.2"):
        check_descent(aligned, save_base(tmp_path / "short", layers=2), "the model")


def test_an_adapter_on_the_weights_before_alignment_is_refused() -> None:
    case = shared_case("llama", "fresh/lora")
    merged = Checkpoint(case.attacked.base)
    with pytest.raises(ModelError, match=r"isn't the aligned model"):
        check_descent(merged, replace(case.attacked, base=case.models.base.base), "the model")
