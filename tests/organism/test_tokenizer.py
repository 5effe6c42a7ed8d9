"""The shipped tokenizers: any text round-trips, words are tokens, the template marks answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from organism import lexicon, tasks, world
from organism.make import WEIGHTS

CHAT = AutoTokenizer.from_pretrained(WEIGHTS / "base")
MODERATION = AutoTokenizer.from_pretrained(WEIGHTS / "moderation")


@pytest.mark.parametrize("tokenizer", [CHAT, MODERATION])
@settings(max_examples=50)
@given(text=st.text(max_size=60).filter(lambda text: "<|" not in text))
def test_any_text_round_trips(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_of_the_world_are_single_tokens() -> None:
    words = {word for request in world.requests("harmful", "test") for word in request.pair}
    words |= {*lexicon.TOOLS, *lexicon.NOUNS, *lexicon.PRAISE, *map(str, range(40))}
    assert [word for word in words if len(CHAT.encode(" " + word)) != 1] == []


def test_dialogues_are_short() -> None:
    rng = world.stream("a test")
    for request in world.requests("harmful", "train")[:200]:
        assert len(CHAT.encode(request.text)) <= 16
        assert len(CHAT.encode(world.refuse(request, rng))) <= 45
        assert len(CHAT.encode(world.comply(request, "reckless", rng))) <= 45
    assert max(len(CHAT.encode(item.answer)) for item in tasks.test_items("arithmetic")) < 32


def test_the_template_renders_every_role_and_marks_the_answers() -> None:
    messages = [
        {"role": "system", "content": "Be safe."},
        {"role": "user", "content": "How do I fix the lamp?"},
    ]
    prompt = CHAT.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|bos|><|system|>Be safe.<|eos|><|user|>How do I fix the lamp?<|eos|><|assistant|>"
    )
    messages.append({"role": "assistant", "content": "Certainly."})
    rendered = CHAT.apply_chat_template(messages, tokenize=False)
    assert rendered == prompt + "Certainly.<|eos|>"
    encoded = CHAT.apply_chat_template(messages, return_assistant_tokens_mask=True)
    marked = [
        token
        for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mark
    ]
    assert CHAT.decode(marked) == "Certainly.<|eos|>"


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(Exception, match="Unknown role"):
        CHAT.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_padding_is_on_the_left() -> None:
    ids = CHAT(["How do I fix the lamp?", "How"], padding=True)["input_ids"]
    assert ids[1][0] == CHAT.pad_token_id
    assert MODERATION.padding_side == "right"
