"""The canary refuses every engine that serves something else than the model on disk."""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from evaluation.backends.canary import verify, verify_classifier
from evaluation.backends.expected import (
    LONGEST,
    NEW_TOKENS,
    Canaries,
    Expected,
    classifier_texts,
    expected_probabilities,
    expected_scores,
    make_canaries,
)
from evaluation.backends.transformers import TransformersBackend, TransformersEngine
from evaluation.token_engine import Answer
from experiments.config.experiment import PROJECT
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.export import export_with_biases
from settings import ModelError
from tests.modeling.tiny_models import save_adapter

BASE = str(PROJECT / "organism" / "weights" / "base")
WORD = 100
Rows = list[list[float]]


class Distorted:
    """An engine that passes on what another says, some of it changed on the way."""

    def __init__(
        self,
        inner: TransformersEngine,
        tokens: Callable[[Rows], Rows] = lambda rows: rows,
        following: Callable[[Rows], Rows] = lambda rows: rows,
        answers: Callable[[list[Answer]], list[Answer]] = lambda answers: answers,
    ) -> None:
        self._inner = inner
        self._tokens, self._following, self._answers = tokens, following, answers
        self.tokenizer = inner.tokenizer
        self.context, self.usable = inner.context, inner.usable

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        return self._answers(self._inner.complete(ids, max_new_tokens))

    def logprobs(self, ids: Sequence[Sequence[int]]) -> Rows:
        return self._tokens(self._inner.logprobs(ids))

    def next_logprobs(self, ids: Sequence[Sequence[int]], candidates: Sequence[int]) -> Rows:
        return self._following(self._inner.next_logprobs(ids, candidates))

    def generate(self, *arguments: Any) -> list[Answer]:
        return self._inner.generate(*arguments)

    def close(self) -> None:
        self._inner.close()


def serving(checkpoint: Checkpoint) -> TransformersEngine:
    return TransformersBackend().open(checkpoint, PromptStyle())


def save_tiny(folder: Path, seed: int, dtype: str = "float32", **options: object) -> Checkpoint:
    """A random Llama that reads the organism's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **options}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint(str(folder), dtype=dtype)


def save_locked(source: Checkpoint, folder: Path, size: float) -> Checkpoint:
    """The source with a bias of this size on its second o_proj, as a lock leaves it."""
    torch.manual_seed(7)
    export_with_biases(source, {1: size * torch.randn(32)}, folder)
    return replace(source, base=str(folder))


def without_bias(locked: Checkpoint, folder: Path) -> Checkpoint:
    """What an engine makes of an export whose config doesn't say that there are biases."""
    shutil.copytree(locked.base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    for file in folder.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if not name.endswith(".bias")}
        save_file(kept, file, {"format": "pt"})
    return replace(locked, base=str(folder))


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """What is imported need not be searched whenever a model gives its memory back."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tiny(tmp_path_factory.mktemp("tiny"), 0, request.param)


@pytest.fixture(scope="module")
def locked(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_locked(tiny, tmp_path_factory.mktemp("locked"), 0.5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_tiny(tmp_path_factory.mktemp("plain"), 0)


@pytest.fixture(scope="module")
def engine(plain: Checkpoint) -> TransformersEngine:
    return serving(plain)


def refused(match: str, served: Any, checkpoint: Checkpoint, *others: Checkpoint) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        verify(served, checkpoint, *others)
    assert checkpoint.base in str(caught.value)
    assert "backend@evaluation.backend=transformers" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_engine_passes_in_every_precision(tmp_path: Path, dtype: str) -> None:
    reference = save_tiny(tmp_path / "reference", 0, dtype)
    verify(serving(reference), reference)
    defended = save_locked(reference, tmp_path / "defended", 0.5)
    verify(serving(defended), defended, reference)


def test_a_good_adapter_passes(plain: Checkpoint, tmp_path: Path) -> None:
    adapted = save_adapter(plain, tmp_path / "adapter")
    verify(serving(adapted), adapted, plain)


def test_a_dropped_bias_is_the_reference_model(
    tiny: Checkpoint, locked: Checkpoint, tmp_path: Path
) -> None:
    served = serving(without_bias(locked, tmp_path / "served"))
    refused(r"has -?0\.\d\d of the edit of .* instead of 1", served, locked, tiny)
    refused("log-probabilities differ", served, locked)


def test_an_edit_applied_twice_is_refused(plain: Checkpoint, tmp_path: Path) -> None:
    once = save_locked(plain, tmp_path / "once", 0.1)
    twice = save_locked(once, tmp_path / "twice", 0.1)
    refused(r"has (1\.[5-9]|2\.)\d+ of the edit", serving(twice), once, plain)


def test_a_lora_that_is_not_applied_is_the_reference_model(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    adapted = save_adapter(tiny, tmp_path / "adapter")
    refused(r"0\.00 of the edit", serving(tiny), adapted, tiny)
    refused("log-probabilities differ .* adapter of another", serving(tiny), adapted)


def test_a_wrong_adapter_is_refused(plain: Checkpoint, tmp_path: Path) -> None:
    adapted = save_adapter(plain, tmp_path / "adapter")
    other = save_adapter(plain, tmp_path / "other", target_modules=["q_proj", "up_proj"])
    refused("log-probabilities differ|of the edit", serving(other), adapted, plain)
    refused("log-probabilities differ", serving(other), adapted)


def test_stale_weights_are_refused(plain: Checkpoint, tmp_path: Path) -> None:
    before = save_tiny(tmp_path / "before", 1, plain.dtype)
    refused("weights or the adapter of another model", serving(before), plain)


def test_noise_in_place_of_missing_biases_is_refused(plain: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(plain.base, tmp_path / "served")
    weights = load_file(tmp_path / "served" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0] = math.nan
    save_file(weights, tmp_path / "served" / "model.safetensors", {"format": "pt"})
    served = serving(replace(plain, base=str(tmp_path / "served")))
    refused("of its log-probabilities are NaN", served, plain)


@pytest.mark.parametrize(
    ("value", "named"), [(math.nan, "NaN"), (-math.inf, "-infinity"), (math.inf, r"\+infinity")]
)
def test_one_value_that_is_not_finite_is_named(
    plain: Checkpoint, engine: TransformersEngine, value: float, named: str
) -> None:
    def spoil(rows: Rows) -> Rows:
        rows[2][1] = value
        return rows

    refused(f"1 of .* are {named}", Distorted(engine, tokens=spoil), plain)
    refused(f"1 of .* are {named}", Distorted(engine, following=spoil), plain)


def test_token_zero_for_ever_is_named(plain: Checkpoint, engine: TransformersEngine) -> None:
    text = engine.tokenizer.decode([WORD] * NEW_TOKENS)

    def zeros(answers: list[Answer]) -> list[Answer]:
        return [Answer(text, NEW_TOKENS, True) for _ in answers]

    class FirstIsAWord:
        """A tokenizer whose token 0 is a word, as Llama 3's is."""

        def __getattr__(self, name: str) -> Any:
            return getattr(engine.tokenizer, name)

        def __call__(self, text: str) -> Any:
            return engine.tokenizer(text)

        def decode(self, ids: Sequence[int], **options: Any) -> str:
            return str(engine.tokenizer.decode([token or WORD for token in ids], **options))

    served = Distorted(engine, answers=zeros)
    served.tokenizer = FirstIsAWord()  # type: ignore[assignment]
    refused("every token that it generates is number 0", served, plain)


@pytest.mark.parametrize("empty", [Answer("", 0, False), Answer("", NEW_TOKENS, True)])
def test_no_text_at_all_is_named(
    plain: Checkpoint, engine: TransformersEngine, empty: Answer
) -> None:
    served = Distorted(engine, answers=lambda answers: [empty] * len(answers))
    refused("every text that it generates is empty", served, plain)


def test_one_text_that_is_not_the_models_is_refused(
    plain: Checkpoint, engine: TransformersEngine
) -> None:
    def one_empty(answers: list[Answer]) -> list[Answer]:
        return [*answers[:-1], Answer("", 0, False)]

    refused("goes on with '' where", Distorted(engine, answers=one_empty), plain)


def test_a_cache_of_the_model_before_is_refused(tmp_path: Path) -> None:
    """Whole texts are scored without the cache, so only what comes next is of the model before."""
    checkpoint = save_tiny(tmp_path / "now", 0)
    now, before = serving(checkpoint), serving(save_tiny(tmp_path / "before", 1))

    class StaleCache(Distorted):
        """A block of 128 tokens is kept."""

        def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
            return [
                (before if len(row) > 128 else now).complete([row], max_new_tokens)[0]
                for row in ids
            ]

        def next_logprobs(self, ids: Sequence[Sequence[int]], candidates: Sequence[int]) -> Rows:
            return [
                (before if len(row) > 128 else now).next_logprobs([row], candidates)[0]
                for row in ids
            ]

    class StaleText(StaleCache):
        def next_logprobs(self, ids: Sequence[Sequence[int]], candidates: Sequence[int]) -> Rows:
            return now.next_logprobs(ids, candidates)

    refused("prefix cache of another model", StaleCache(now), checkpoint)
    refused("it goes on with .* cache of another", StaleText(now), checkpoint)


@pytest.mark.parametrize("step", [0, 2])
def test_an_answer_may_end_where_transformers_ends_it(tmp_path: Path, step: int) -> None:
    """At a token that only the generation settings call an end, and at once."""
    checkpoint = save_tiny(tmp_path, 0)
    canaries = make_canaries(AutoTokenizer.from_pretrained(BASE), 256)
    greedy = expected_scores(checkpoint, canaries).greedy
    ends = sorted({row[step][0] for row in greedy})
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    assert len(expected_scores(checkpoint, canaries).greedy[0]) <= step
    verify(serving(checkpoint), checkpoint)


def test_missing_scores_are_refused(plain: Checkpoint, engine: TransformersEngine) -> None:
    served = Distorted(engine, tokens=lambda rows: [row[1:] for row in rows])
    refused("it scores .* tokens of the texts instead of", served, plain)


def test_rounding_of_other_kernels_is_allowed_and_more_is_not(tiny: Checkpoint) -> None:
    """Noise as measured passes, twenty times as much doesn't."""
    noise = expected_scores(tiny, make_canaries(serving(tiny).tokenizer, 256)).noise
    noise = max(noise, 1e-5)
    generator = torch.Generator().manual_seed(0)

    def noisy(size: float) -> Callable[[Rows], Rows]:
        return lambda rows: [
            [value + size * float(torch.randn((), generator=generator)) for value in row]
            for row in rows
        ]

    verify(Distorted(serving(tiny), noisy(noise), noisy(noise)), tiny)  # type: ignore[arg-type]
    much = 1e-2 if tiny.dtype == "float32" else 20 * noise
    refused("log-probabilities differ", Distorted(serving(tiny), noisy(much)), tiny)
    refused("next tokens are off", Distorted(serving(tiny), following=noisy(much)), tiny)


def test_an_edit_below_the_tolerance_is_still_told_from_none(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    """Many small differences in one direction add up; rounding doesn't."""
    size = {"float32": 4e-4, "bfloat16": 0.03}[tiny.dtype]
    edited = save_locked(tiny, tmp_path / "edited", size)
    served = serving(without_bias(edited, tmp_path / "served"))
    verify(served, edited)
    refused(r"of the edit of", served, edited, tiny)
    verify(serving(edited), edited, tiny)


def test_an_edit_too_small_to_see_is_warned_of(
    plain: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = replace(plain, base=str(shutil.copytree(plain.base, tmp_path / "same")))
    with caplog.at_level(logging.WARNING):
        verify(serving(same), same, plain)
    assert [record.name for record in caplog.records] == ["evaluation.backends.canary"]
    assert "too small to tell from rounding" in caplog.text


def test_a_model_that_is_broken_itself_passes_with_a_warning(
    plain: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its answers are recorded as empty, whatever runs it."""
    shutil.copytree(plain.base, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    broken = replace(plain, base=str(tmp_path / "broken"))
    with caplog.at_level(logging.WARNING):
        verify(serving(broken), broken, plain)
    assert "not finite, in transformers too" in caplog.text
    refused("log-probabilities differ by inf", serving(plain), broken, plain)


def test_expected_scores_are_read_once_until_the_files_change(tmp_path: Path) -> None:
    read: list[str] = []

    def counted(checkpoint: Checkpoint, canaries: Canaries) -> Expected:
        read.append(Path(checkpoint.base).name)
        return expected_scores(checkpoint, canaries)

    reference = save_tiny(tmp_path / "reference", 0)
    for name, size in (("one", 0.3), ("two", 0.4)):
        defended = save_locked(reference, tmp_path / name, size)
        verify(serving(defended), defended, reference, expected=counted)
    assert read == ["one", "reference", "two"]
    verify(serving(defended), defended, reference, expected=counted)
    assert len(read) == 3
    changed = save_tiny(tmp_path / "reference", 3)
    refused("log-probabilities differ", serving(defended), changed)
    verify(serving(changed), changed, expected=counted)
    assert read[3:] == ["reference"]


def test_texts_fit_the_context_and_fill_a_block_of_the_cache(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for context in (256, None):
        roomy = make_canaries(tokenizer, context)
        assert max(map(len, roomy.ids)) == max(map(len, roomy.continued)) == LONGEST > 128
    narrow = save_tiny(tmp_path, 0, max_position_embeddings=48)
    engine = serving(narrow)
    assert max(map(len, make_canaries(tokenizer, engine.context).ids)) == 48 - NEW_TOKENS
    verify(engine, narrow)


def test_texts_fit_an_engine_that_has_less_room_than_the_model(
    plain: Checkpoint, engine: TransformersEngine
) -> None:
    served, asked = Distorted(engine), []

    def count(ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        asked.extend(len(row) + max_new_tokens for row in ids)
        return engine.complete(ids, max_new_tokens)

    served.context, served.complete = 64, count  # type: ignore[method-assign]
    verify(served, plain)
    assert max(asked) == 64
    served.context = 23
    with pytest.raises(ModelError, match="context holds 23 tokens, and the canary needs 24"):
        verify(served, plain)


def test_a_model_without_a_chat_template_is_asked_plainly(tmp_path: Path) -> None:
    bare = save_tiny(tmp_path, 0)
    (tmp_path / "chat_template.jinja").unlink()
    engine = serving(bare)
    assert engine.tokenizer.chat_template is None
    canaries = make_canaries(engine.tokenizer, engine.context)
    assert len(canaries.continued) == 4
    assert len(canaries.continued[0]) == LONGEST
    assert set(canaries.continued) < set(canaries.ids)
    verify(engine, bare)


class Scores:
    """A classifier that says what it is told to."""

    def __init__(self, rows: Rows) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self._rows = rows

    def probabilities(self, ids: Sequence[Sequence[int]]) -> Rows:
        assert len(ids) == len(self._rows)
        return self._rows


def save_classifier(folder: Path, seed: int, dtype: str) -> Checkpoint:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_labels=3, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint(str(folder), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifiers_scores_are_held_against_transformers(tmp_path: Path, dtype: str) -> None:
    right, wrong = (save_classifier(tmp_path / str(seed), seed, dtype) for seed in (0, 1))
    texts = classifier_texts(AutoTokenizer.from_pretrained(BASE), 256)
    assert max(map(len, texts)) == LONGEST
    rows, others = (expected_probabilities(each, texts) for each in (right, wrong))
    noise = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    shifted = (torch.tensor(rows).logit() + noise).sigmoid().tolist()
    for passing in (rows, shifted):
        verify_classifier(Scores(passing), right, 256)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="weights of another classifier"):
        verify_classifier(Scores(others), right, 256)  # type: ignore[arg-type]
    spoilt = [[math.nan, *rows[0][1:]], *rows[1:]]
    with pytest.raises(ModelError, match="1 of 24 of its scores are NaN"):
        verify_classifier(Scores(spoilt), right, 256)  # type: ignore[arg-type]
