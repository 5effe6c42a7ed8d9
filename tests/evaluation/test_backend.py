"""Batched generation equals a plain greedy loop, for whatever the batch looks like."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from evaluation.backends.transformers import TransformersBackend, TransformersEngine
from evaluation.degenerate import degeneracy
from evaluation.token_engine import Answer
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError, build
from tests.evaluation.conftest import WORDS, tiny_config

LIMIT = 16
FRONT_SPACED = (
    "{% for m in messages %}{{ ': ' + m['content'] }}{{ ' ' if not loop.last }}{% endfor %}"
    "{{ ' :' if add_generation_prompt }}"
)
_RNG = random.Random(0)
PROMPTS = [" ".join(_RNG.choices(WORDS, k=_RNG.randint(1, 12))) for _ in range(12)]


def engine(folder: Path, batch_size: int = 5, adapter: Path | None = None) -> TransformersEngine:
    checkpoint = Checkpoint(str(folder), None if adapter is None else str(adapter))
    return TransformersBackend(batch_size=batch_size).open(checkpoint, PromptStyle())


def greedy(
    folder: Path, prompt: str, limit: int, system: str | None = None, start: str = ""
) -> Answer:
    """The definition: one prompt, no padding, the arg max of one forward pass per token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = PromptStyle().encode_start(tokenizer, prompt, start, system)
    said = f"{start} " if start else ""
    made: list[int] = []
    while len(made) < limit:
        with torch.no_grad():
            logits = model(torch.tensor([ids + made])).logits
        made.append(int(logits[0, -1].argmax()))
        if made[-1] in {2, 9, 20}:
            text = tokenizer.decode(made[:-1], skip_special_tokens=True)
            return Answer(said + text if text else "", len(made), False)
    return Answer(said + tokenizer.decode(made, skip_special_tokens=True), len(made), True)


@pytest.fixture(scope="module")
def expected(generator_folder: Path) -> list[Answer]:
    return [greedy(generator_folder, prompt, LIMIT) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_answer_as_one_at_a_time(
    generator_folder: Path, expected: list[Answer], batch_size: int
) -> None:
    assert engine(generator_folder, batch_size).generate(PROMPTS, LIMIT) == expected


def test_the_case_is_not_trivial(expected: list[Answer]) -> None:
    assert {answer.truncated for answer in expected} == {True, False}
    assert len({answer.text for answer in expected}) == len(PROMPTS)


def test_order_is_the_callers(generator_folder: Path, expected: list[Answer]) -> None:
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    answers = engine(generator_folder).generate([PROMPTS[i] for i in order], LIMIT)
    assert answers == [expected[i] for i in order]


def test_length_limit(generator_folder: Path, expected: list[Answer]) -> None:
    answers = engine(generator_folder).generate(PROMPTS, 3)
    assert max(answer.tokens for answer in answers) == 3
    for short, long in zip(answers, expected, strict=True):
        assert short.truncated == (long.tokens > 3)
        assert long.text.startswith(short.text)


def test_an_end_token_at_the_limit_is_no_truncation(
    generator_folder: Path, expected: list[Answer]
) -> None:
    index = next(i for i, answer in enumerate(expected) if not answer.truncated)
    limit = expected[index].tokens
    assert engine(generator_folder).generate([PROMPTS[index]], limit) == [expected[index]]


def test_the_tokenizers_own_end_token_ends_an_answer(
    generator_folder: Path, tmp_path: Path, expected: list[Answer]
) -> None:
    shutil.copytree(generator_folder, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(generator_folder)
    tokenizer.eos_token = expected[0].text.split()[0]
    tokenizer.save_pretrained(tmp_path)
    assert engine(tmp_path).generate(PROMPTS[:1], LIMIT) == [Answer("", 1, False)]


def test_system_line_reaches_the_model(generator_folder: Path, expected: list[Answer]) -> None:
    answers = engine(generator_folder).generate(PROMPTS, LIMIT, system="w7 w8")
    assert answers != expected
    assert answers[0] == greedy(generator_folder, PROMPTS[0], LIMIT, "w7 w8")


STARTS = ["w3 w9", "", "w17", "w1 w2 w3 w4 w5 w6"] * 3


def test_answers_go_on_from_their_starts_whatever_the_batch(generator_folder: Path) -> None:
    wanted = [
        greedy(generator_folder, prompt, LIMIT, "w7 w8", start)
        for prompt, start in zip(PROMPTS, STARTS, strict=True)
    ]
    for size in (1, 5):
        answers = engine(generator_folder, size).generate(PROMPTS, LIMIT, "w7 w8", STARTS)
        assert answers == wanted
    assert all(answer.text.startswith(start) for answer, start in zip(wanted, STARTS, strict=True))
    assert {answer.truncated for answer in wanted} == {True, False}


def test_empty_starts_are_no_starts(generator_folder: Path, expected: list[Answer]) -> None:
    starts = [""] * len(PROMPTS)
    assert engine(generator_folder).generate(PROMPTS, LIMIT, starts=starts) == expected


def test_the_limit_counts_what_is_generated_and_not_the_start(generator_folder: Path) -> None:
    long = engine(generator_folder).generate(PROMPTS, LIMIT, starts=STARTS)
    short = engine(generator_folder).generate(PROMPTS, 2, starts=STARTS)
    assert max(answer.tokens for answer in short) == 2
    for cut, whole in zip(short, long, strict=True):
        assert cut.truncated == (whole.tokens > 2)
        assert whole.text.startswith(cut.text)


def test_an_answer_that_adds_nothing_to_its_start_is_empty(
    generator_folder: Path, tmp_path: Path
) -> None:
    start = "w3 w9"
    (answer,) = engine(generator_folder).generate(PROMPTS[:1], LIMIT, starts=[start])
    shutil.copytree(generator_folder, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(generator_folder)
    tokenizer.eos_token = answer.text.removeprefix(start).split()[0]
    tokenizer.save_pretrained(tmp_path)
    (ended,) = engine(tmp_path).generate(PROMPTS[:1], LIMIT, starts=[start])
    assert ended == Answer("", 1, False)
    assert degeneracy(ended.text) == "empty"


def test_a_first_word_keeps_its_space_after_a_start(tmp_path: Path) -> None:
    """With a tokenizer that marks a word's space at its front and drops the first one's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {f"▁{word}": index for index, word in enumerate(["a", "b", ":", "</s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="▁a"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="▁</s>", pad_token="▁</s>", chat_template=FRONT_SPACED
    )
    assert tokenizer.decode([0]) == "a"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(len(words), tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # All logits are equal, so the first token of the vocabulary is always chosen.
    (plain, given) = engine(tmp_path).generate(["b", "b"], 2, starts=["", "b"])
    assert (plain.text, given.text) == ("a a", "b a a")


def test_a_prompt_and_start_that_do_not_fit_are_refused_at_once(generator_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"context holds 128; lower max_new_tokens"):
        engine(generator_folder).generate(["w1"], LIMIT, starts=[" ".join(["w2"] * 120)])


def test_no_prompts_no_answers(generator_folder: Path) -> None:
    assert engine(generator_folder).generate([], LIMIT) == []


def test_sampling_settings_of_a_checkpoint_neither_act_nor_warn(
    generator_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = json.loads((generator_folder / "generation_config.json").read_text())
    assert shipped["repetition_penalty"] == 1.3
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        engine(generator_folder).generate(PROMPTS[:2], LIMIT)
    assert not caplog.records


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_is_used(
    generator_folder: Path, tmp_path: Path, expected: list[Answer], task_type: str | None
) -> None:
    base = AutoModelForCausalLM.from_pretrained(generator_folder)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type=task_type
    )
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(generator_folder / name, tmp_path / "merged")
    answers = engine(generator_folder, adapter=tmp_path / "adapter").generate(PROMPTS, LIMIT)
    assert answers != expected
    assert answers == engine(tmp_path / "merged").generate(PROMPTS, LIMIT)


def test_nan_logits_never_become_text(
    generator_folder: Path,
    tmp_path: Path,
    expected: list[Answer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(generator_folder)
    tokenizer = AutoTokenizer.from_pretrained(generator_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("w5")] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["w1 w5 w2", PROMPTS[5]]
    assert "w5" not in (PROMPTS[5] + expected[5].text).split()
    with caplog.at_level(logging.WARNING):
        broken, whole = engine(tmp_path).generate(prompts, LIMIT)
    assert broken == Answer("", 0, False)
    assert degeneracy(broken.text) == "empty"
    assert whole == expected[5]
    assert "1 of 2 answers" in caplog.text


def test_a_wholly_broken_model_yields_no_text(generator_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(generator_folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(generator_folder).save_pretrained(tmp_path)
    opened, steps = engine(tmp_path), []
    opened._model.register_forward_hook(lambda *_: steps.append(1))
    assert {answer.text for answer in opened.generate(PROMPTS[:5], LIMIT)} == {""}
    assert len(steps) == 1


def test_what_follows_an_end_does_not_spoil_the_answer(
    generator_folder: Path, tmp_path: Path, expected: list[Answer]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(generator_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")  # the padding token
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(generator_folder).save_pretrained(tmp_path)
    short = next(i for i, answer in enumerate(expected) if not answer.truncated)
    length = len(PROMPTS[short].split())
    longer = " ".join(PROMPTS[0].split()[:length])
    answers = engine(tmp_path).generate([PROMPTS[short], longer], LIMIT)
    assert answers == [expected[short], greedy(generator_folder, longer, LIMIT)]
    assert answers[1].tokens > answers[0].tokens + 1


def test_a_prompt_that_does_not_fit_is_refused_at_once(generator_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"context holds 128; lower max_new_tokens"):
        engine(generator_folder).generate(["w1", " ".join(["w2"] * 120)], LIMIT)


def rendered(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [PromptStyle().encode_prompt(tokenizer, prompt) for prompt in PROMPTS]


def distribution(folder: Path, ids: list[int]) -> torch.Tensor:
    """The definition: one row, no padding; log-probabilities (length, vocabulary)."""
    with torch.no_grad():
        return (
            AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids]))
            .logits[0]
            .log_softmax(-1)
        )


def test_token_ids_are_completed_as_prompts_are_answered(
    generator_folder: Path, expected: list[Answer]
) -> None:
    assert engine(generator_folder).complete(rendered(generator_folder), LIMIT) == expected


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_probabilities_of_tokens(generator_folder: Path, batch_size: int) -> None:
    rows = [*rendered(generator_folder), [7]]
    found = engine(generator_folder, batch_size).logprobs(rows)
    for ids, line in zip(rows, found, strict=True):
        table = distribution(generator_folder, ids)
        wanted = [float(table[place, token]) for place, token in enumerate(ids[1:])]
        assert line == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_probabilities_of_candidates(generator_folder: Path, batch_size: int) -> None:
    rows, candidates = rendered(generator_folder), [11, 3, 30]
    found = engine(generator_folder, batch_size).next_logprobs(rows, candidates)
    for ids, line in zip(rows, found, strict=True):
        assert line == pytest.approx(
            distribution(generator_folder, ids)[-1, candidates].tolist(), abs=1e-5
        )


def test_log_probabilities_that_are_no_numbers_are_passed_on(
    generator_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(generator_folder)
    model.lm_head.weight.data.fill_(float("nan"))
    shutil.copytree(generator_folder, tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    broken = engine(tmp_path)
    assert all(math.isnan(value) for value in broken.logprobs([[1, 5, 6]])[0])
    assert math.isnan(broken.next_logprobs([[1, 5, 6]], [4])[0][0])


def test_rows_that_do_not_fit_are_refused_at_once(generator_folder: Path) -> None:
    for call in (
        lambda: engine(generator_folder).logprobs([[5] * 129]),
        lambda: engine(generator_folder).next_logprobs([[5] * 128], [4]),
        lambda: engine(generator_folder).complete([[5] * 120], LIMIT),
    ):
        with pytest.raises(ModelError, match="the model's context holds 128"):
            call()


def test_closing_drops_the_model(generator_folder: Path) -> None:
    opened = engine(generator_folder)
    opened.close()
    with pytest.raises(AttributeError):
        opened.generate(PROMPTS, LIMIT)


def test_settings_are_checked() -> None:
    node = {"_target_": "evaluation.backends.transformers.TransformersBackend", "batch_size": 0}
    with pytest.raises(SettingError, match=r"evaluation.backend.batch_size=0 is not allowed"):
        build(node, "evaluation.backend")
