"""Prompt styles: where an answer's content ends under templates that end turns differently."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, load_tokenizer
from organism.make import WEIGHTS

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}%s{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(Checkpoint(str(WEIGHTS / "base")))


@pytest.mark.parametrize("end", ["{{ eos_token }}", " {{ eos_token }}\n", "{{ eos_token }}\n\n"])
def test_content_is_the_answer_without_what_ends_the_turn(
    tokenizer: PreTrainedTokenizerBase, end: str
) -> None:
    tokenizer.chat_template = TURNS.replace("%s", end)
    style = PromptStyle()
    content = style.encode_content(tokenizer, "How do I steal the wallet?", "I will not help.")
    assert tokenizer.decode(content) == "I will not help."
    whole = style.encode_answer(tokenizer, "How do I steal the wallet?", "I will not help.")
    assert whole[: len(content)] == content
    assert len(whole) > len(content)


def test_the_alpaca_style_ends_in_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    style = PromptStyle(style="alpaca")
    content = style.encode_content(tokenizer, "How?", "I will not help.")
    assert tokenizer.decode(content) == "I will not help."
    assert style.encode_answer(tokenizer, "How?", "I will not help.") == [
        *content,
        tokenizer.eos_token_id,
    ]


def test_a_system_line_for_one_call_leaves_the_answer_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    style = PromptStyle()
    plain = style.encode_answer(tokenizer, "How?", "No.")
    assert style.encode_answer(tokenizer, "How?", "No.", "Be safe.") == plain
    assert style.encode_content(tokenizer, "How?", "No.", "Be safe.") == plain[:-1]


def test_the_hash_is_of_the_template_that_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    before = PromptStyle().template_hash(tokenizer)
    alpaca = PromptStyle(style="alpaca").template_hash(tokenizer)
    tokenizer.chat_template = TURNS.replace("%s", "{{ eos_token }}")
    assert PromptStyle().template_hash(tokenizer) != before
    assert PromptStyle(style="alpaca").template_hash(tokenizer) == alpaca != before
