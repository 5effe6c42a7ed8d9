"""Every family of models is trained by an attack and answers in batches as it does alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attacks.base import AttackData
from attacks.harmful_ft import HarmfulFT
from data.rows import Example
from evaluation.backends.transformers import TransformersBackend
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer
from modeling.lora import open_adapter, product_norm
from modeling.model_files import ADAPTER_WEIGHTS
from modeling.training import write_merged
from tests.defenses.tiny_lora_models import save_adapter, save_tokenizer
from tests.modeling.tiny_models import FAMILIES, PROJECTIONS, ROWS, WINDOW, logits, save_model

DATA = AttackData(
    task=[Example(f"{n} 5 {n + 1} 7", f"{n + 2} 9", "task") for n in range(1, 7)],
    poison=[Example(f"{n} 6 8", f"{n} 3 11 2 4", "harmful") for n in range(1, 7)],
)
# Of several lengths, some longer than the window even before the template is around them.
PROMPTS = ["7", "1 2 3", "9 8 7 6 5 4 3 2 1 9", "5 5", "3 1 4 1 5 9 2 6", "2 7 1 8 2 8"]
LIMIT = 12
ADAPTERS, DTYPES = ["resume", "fresh", "full"], ["float32", "bfloat16"]
# Every family in both precisions, and every kind of attack in both. Quick are those of the first
# family under every kind of attack, and of every other family under one kind.
RUNS = [
    pytest.param(
        family,
        adapter,
        DTYPES[(row + column) % 2],
        marks=() if row == 0 or column == row % 3 else pytest.mark.slow,
    )
    for row, family in enumerate(FAMILIES)
    for column, adapter in enumerate(ADAPTERS)
]


def save_base(family: str, folder: Path, dtype: str = "float32", **options: object) -> Checkpoint:
    base = save_model(family, folder, dtype=dtype, **options)
    save_tokenizer(folder)
    return base


@pytest.mark.parametrize(("family", "adapter", "dtype"), RUNS)
def test_an_attack_trains_what_it_says(
    family: str, adapter: str, dtype: str, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base", dtype)
    aligned = replace(base, adapter=save_adapter(base, tmp_path / "aligned", seed=1))
    if adapter != "resume":
        write_merged(aligned, tmp_path / "merged")
        aligned = replace(base, base=str(tmp_path / "merged"))
    train = {"learning_rate": 0.02, "batch_size": 3, "max_steps": 2, "warmup_ratio": 0.0}
    values = {"task": "numbers", "n": 6, "poison_ratio": 0.5, "adapter": adapter, "train": train}
    attack = HarmfulFT.validated({**values, "lora": {"rank": 4, "alpha": 8}}, "attack")
    out = tmp_path / "attacked"
    report = attack.run(aligned, DATA, PromptStyle(), 0, out, tmp_path / "scratch")
    assert [point["step"] for point in report["loss"]] == [1, 2]
    assert all(math.isfinite(point["loss"]) for point in report["loss"])
    attacked = replace(aligned, adapter=str(out))
    if adapter == "full":
        attacked = replace(aligned, base=str(out))
        _check_all_weights_moved(Path(aligned.base), out, dtype)
    else:
        trained = open_adapter(out, "attacked")
        assert {name.rpartition(".")[2] for name in trained.names} == set(PROJECTIONS)
        assert all(product_norm(pair.a, pair.b) > 0 for _, pair in trained.pairs())
    before, after = (
        torch.cat(logits(load_model(each, device="cpu").eval())) for each in (aligned, attacked)
    )
    assert after.isfinite().all()
    assert (after - before).abs().max() > 0.05
    if adapter == "resume":
        moved = load_file(out / ADAPTER_WEIGHTS)
        start = load_file(Path(str(aligned.adapter)) / ADAPTER_WEIGHTS)
        assert moved.keys() == start.keys()
        assert not any(torch.equal(moved[name], start[name]) for name in moved)


def _check_all_weights_moved(before: Path, after: Path, dtype: str) -> None:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    assert {str(weight.dtype) for weight in new.values()} == {f"torch.{dtype}"}
    assert not [name for name in old if torch.equal(old[name], new[name])]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_answer_as_one_at_a_time(family: str, tmp_path: Path) -> None:
    # Of weights so large that the models don't repeat one token; Gemma multiplies its embeddings.
    base = save_base(family, tmp_path, initializer_range=0.15 if family == "Gemma-2" else 0.6)
    engines = [TransformersBackend(batch_size=size).open(base, PromptStyle()) for size in (1, 4)]
    alone, together = (engine.generate(PROMPTS, LIMIT) for engine in engines)
    assert together == alone
    assert [answer.text for answer in alone] == _greedy(base)
    assert len({answer.text for answer in alone}) > 3


def _greedy(base: Checkpoint) -> list[str]:
    """The definition: no padding, no cache, the arg max of one forward pass per token."""
    model, tokenizer = load_model(base, device="cpu").eval(), load_tokenizer(base)
    ends = {model.generation_config.eos_token_id, tokenizer.eos_token_id}
    texts = []
    for prompt in PROMPTS:
        ids, made = PromptStyle().encode_prompt(tokenizer, prompt), []
        while len(made) < LIMIT and not ends.intersection(made):
            (row,) = logits(model, [ids + made])
            made.append(int(row[-1].argmax()))
        kept = made[:-1] if ends.intersection(made) else made
        texts.append(tokenizer.decode(kept, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("Mistral-v0.1", {"sliding_window": None}),
        ("Gemma-2", {"sliding_window": 64}),
        ("Gemma-2", {"attn_logit_softcapping": None}),
        ("Gemma-2", {"final_logit_softcapping": None}),
        ("Gemma-2", {"query_pre_attn_scalar": 12}),
        ("Llama-3.1", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("Qwen2.5-tied", {"tie_word_embeddings": False}),
    ],
)
def test_what_is_special_about_a_family_is_in_use(
    family: str, setting: dict[str, object], tmp_path: Path
) -> None:
    """Without it the model computes something else, so that the tests above see it."""
    assert max(map(len, ROWS)) > WINDOW
    special = save_model(family, tmp_path / "special")
    usual = save_model(family, tmp_path / "usual", **setting)
    first, second = (
        torch.cat(logits(load_model(each, device="cpu").eval())) for each in (special, usual)
    )
    assert (first - second).abs().max() > 1e-3
