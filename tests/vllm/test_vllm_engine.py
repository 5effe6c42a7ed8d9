"""What a real vLLM serves is what transformers computes, for every way a model reaches it."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation.backends.auto import AutoBackend
from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import engine as engines
from evaluation.backends.vllm.engine import VLLMEngine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.export import export_with_biases
from modeling.heads import head_layout, output_biases
from modeling.loading import load_model, load_tokenizer
from settings import ModelError
from tests.vllm.conftest import (
    ALIGNED,
    BACKEND,
    BASE,
    PROMPTS,
    WEIGHTS,
    rewritten,
    save_classifier,
    transformers_engine,
)

pytestmark = pytest.mark.vllm

LIMIT = 32
TOLERANCE = 1e-4


def opened(checkpoint: Checkpoint, reference: Checkpoint | None = None) -> VLLMEngine:
    return BACKEND.open(checkpoint, PromptStyle(), reference)


def encoded(prompts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(BASE)
    return [PromptStyle().encode_prompt(tokenizer, prompt) for prompt in prompts]


def pids() -> list[int]:
    return [running.worker.pid for running in engines._resting]


@pytest.mark.parametrize("checkpoint", [BASE, ALIGNED], ids=["full", "adapter"])
def test_answers_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    engine = opened(checkpoint)
    answers = engine.generate(PROMPTS, LIMIT)
    starts = ["Sure thing!", "", "I", "No"] * (len(PROMPTS) // 4)
    begun = engine.generate(PROMPTS, LIMIT, "Be safe.", starts)
    engine.close()
    theirs = transformers_engine(checkpoint)
    assert answers == theirs.generate(PROMPTS, LIMIT)
    assert begun == theirs.generate(PROMPTS, LIMIT, "Be safe.", starts)
    assert len({answer.text for answer in answers}) > len(PROMPTS) // 4


def test_log_probabilities_are_those_of_transformers() -> None:
    engine, theirs = opened(ALIGNED), transformers_engine(ALIGNED)
    rows = [*encoded(PROMPTS[:12]), [1], [1, 50], [1] + [40, 50, 60] * 85]
    for ours, wanted in zip(engine.logprobs(rows), theirs.logprobs(rows), strict=True):
        assert ours == pytest.approx(wanted, abs=TOLERANCE)
    candidates = [50, 2, 317, 50]
    ours = engine.next_logprobs(rows[:-1], candidates)
    for line, wanted in zip(ours, theirs.next_logprobs(rows[:-1], candidates), strict=True):
        assert line == pytest.approx(wanted, abs=TOLERANCE)
    assert engine.complete(rows[:12], 8) == theirs.complete(rows[:12], 8)
    engine.close()


def test_a_row_that_fills_the_context_is_scored_and_a_longer_one_refused() -> None:
    engine = opened(BASE)
    (scores,) = engine.logprobs([[1] * 256])
    assert len(scores) == 255
    with pytest.raises(ModelError, match="context holds 256"):
        engine.logprobs([[1] * 257])
    with pytest.raises(ModelError, match="context holds 256"):
        engine.generate(["word " * 300], LIMIT)
    engine.close()
    with pytest.raises(ModelError, match="closed"):
        engine.generate(PROMPTS, LIMIT)


def test_a_warm_engine_serves_the_next_checkpoint_of_its_shape(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, value in weights.items():
            if "proj" in name:
                value += 0.02 * torch.randn(value.shape, generator=generator)

    other = rewritten(tmp_path, change)
    first = opened(BASE)
    before = first.generate(PROMPTS, LIMIT)
    first.close()
    warm = set(pids())
    second = opened(other, reference=BASE)
    answers = second.generate(PROMPTS, LIMIT)
    second.close()
    assert set(pids()) == warm
    assert answers != before
    assert answers == transformers_engine(other).generate(PROMPTS, LIMIT)
    again = opened(BASE)
    assert again.generate(PROMPTS, LIMIT) == before
    again.close()
    assert set(pids()) == warm


@pytest.mark.slow
def test_what_is_said_does_not_depend_on_what_was_warm(tmp_path: Path) -> None:
    """Of a full model, an engine with room for an adapter says to the bit what one without does."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] *= 1.1

    checkpoints = BASE, rewritten(tmp_path, change)
    rows = encoded(PROMPTS)
    engines.shutdown()
    said, processes = [], []
    for warm in (BASE, ALIGNED):
        opened(warm).close()
        for checkpoint in checkpoints:
            engine = opened(checkpoint)
            said.append((engine.logprobs(rows), engine.complete(rows, LIMIT)))
            engine.close()
        processes.append(pids())
        engines.shutdown()
    assert said[:2] == said[2:]
    assert said[0] != said[1]
    assert list(map(len, processes)) == [1, 1]


def test_adapters_of_one_base_share_an_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=12, lora_alpha=32, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 4},
        init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    get_peft_model(load_model(BASE), config).save_pretrained(tmp_path)
    other = Checkpoint(BASE.base, str(tmp_path))
    first = opened(ALIGNED)
    before = first.generate(PROMPTS[:16], LIMIT)
    first.close()
    warm = pids()[-1]
    engine = opened(other, reference=BASE)
    answers = engine.generate(PROMPTS[:16], LIMIT)
    engine.close()
    assert pids()[-1] == warm
    assert answers == transformers_engine(other).generate(PROMPTS[:16], LIMIT)
    assert answers != before


@pytest.mark.slow
def test_an_adapter_that_vllm_refuses_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["v_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(load_model(BASE), config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(BASE.base, str(tmp_path))
    engine = opened(checkpoint, reference=BASE)
    answers = engine.generate(PROMPTS[:16], LIMIT)
    engine.close()
    assert answers == transformers_engine(checkpoint).generate(PROMPTS[:16], LIMIT)
    assert answers != transformers_engine(BASE).generate(PROMPTS[:16], LIMIT)


def test_baked_biases_are_served(tmp_path: Path) -> None:
    layout = head_layout(ALIGNED)
    generator = torch.Generator().manual_seed(0)
    deltas = {
        layer: torch.randn(layout.heads * layout.head_dim, generator=generator) for layer in (1, 4)
    }
    export_with_biases(ALIGNED, output_biases(ALIGNED, deltas), tmp_path / "baked")
    baked = Checkpoint(str(tmp_path / "baked"))
    engine = opened(baked, reference=ALIGNED)
    answers = engine.generate(PROMPTS, LIMIT)
    engine.close()
    assert answers == transformers_engine(baked).generate(PROMPTS, LIMIT)
    assert answers != transformers_engine(ALIGNED).generate(PROMPTS, LIMIT)


def test_logits_that_are_not_finite_give_no_answers(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] = math.nan

    engine = opened(rewritten(tmp_path, change))
    answers = engine.generate(PROMPTS[:4], LIMIT)
    engine.close()
    assert {(answer.text, answer.tokens) for answer in answers} == {("", 0)}


def test_classifiers_score_each_label_on_its_own(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, 0)
    rows = encoded(PROMPTS[:12])
    theirs = TransformersBackend().classifier(folder, "float32")
    ours = BACKEND.classifier(folder, "float32")
    assert ours.labels == theirs.labels
    for line, wanted in zip(ours.probabilities(rows), theirs.probabilities(rows), strict=True):
        assert line == pytest.approx(wanted, abs=TOLERANCE)
    ours.close()


def test_what_vllm_has_no_attention_for_goes_to_transformers() -> None:
    moderation = str(WEIGHTS / "moderation")
    with pytest.raises(ModelError, match="heads of size 16"):
        BACKEND.classifier(moderation, "float32")
    auto = AutoBackend(vllm=BACKEND)
    classifier = auto.classifier(moderation, "float32")
    assert len(classifier.probabilities([[1, 5, 6]])[0]) == len(classifier.labels)
    assert auto.chosen(BASE) is BACKEND
    assert auto.chosen(Checkpoint(BASE.base, steering="vectors")) == auto.transformers


def test_a_killed_worker_is_a_sentence_and_the_next_open_starts_anew() -> None:
    engine = opened(BASE)
    assert engine._running is not None
    os.kill(engine._running.worker.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match=r"vLLM process was killed \(signal 9\)"):
        engine.generate(PROMPTS, LIMIT)
    engine.close()
    again = opened(BASE)
    assert len(again.generate(PROMPTS[:2], 4)) == 2
    again.close()


def test_ending_leaves_no_process() -> None:
    opened(BASE).close()
    started = pids()
    engines.shutdown()
    time.sleep(0.1)
    assert started
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
