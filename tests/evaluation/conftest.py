"""Tiny models and tokenizers, made on the fly."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{index}" for index in range(40)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }} : {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word tokenizer that puts a BOS before every text, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        add_bos_token=True,
    )


def tiny_config(vocabulary: int, **extra: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model whose generation settings ask for sampling and other end tokens."""
    import torch

    folder = tmp_path_factory.mktemp("generator")
    tokenizer = make_tokenizer(["user", "system", "assistant", ":", *WORDS])
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(len(tokenizer)))
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_p=0.5, repetition_penalty=1.3, eos_token_id=[9, 20]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random multi-label classifier over five categories."""
    import torch

    folder = tmp_path_factory.mktemp("judge")
    frame = ["BEGINNING", "OF", "CONVERSATION:", "USER:", "ASSISTANT:"]
    joined = [f"ASSISTANT:{word}" for word in WORDS]
    tokenizer = make_tokenizer([*frame, *joined, *WORDS])
    torch.manual_seed(1)
    labels = {index: f"harm_{index}" for index in range(5)}
    model = LlamaForSequenceClassification(tiny_config(len(tokenizer), id2label=labels))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
