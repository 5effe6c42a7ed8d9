"""The moderation classifier: a tiny Llama with one independent label per harmful category.

It has the form of PKU-Alignment/beaver-dam-7b, so that the same judge reads both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from organism.dialogues import vocabulary_text
from organism.moderation_rows import LABELS, TEMPLATE, Judged, draw
from organism.pretrain import update
from organism.tokenizer import train_tokenizer
from organism.world import stream

MAX_LENGTH = 256
SEED, BATCH, STEPS, RATE = 0, 64, 800, 2e-3


def moderation_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of its own, right-padded, in whose vocabulary the input's frame is."""
    frame = TEMPLATE.format(prompt="", answer="")
    texts = [*vocabulary_text(), *(frame for _ in range(50))]
    tokenizer = train_tokenizer(texts, vocab_size=4096, special=())
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def moderation_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: 2 layers of width 64 with 4 heads of 16."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        problem_type="multi_label_classification",
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Token ids and mask of texts with their end token, cut at `MAX_LENGTH`, right-padded."""
    return dict(
        tokenizer(
            [text + tokenizer.eos_token for text in texts],
            add_special_tokens=False,
            truncation=True,
            max_length=MAX_LENGTH,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )


def targets(rows: Sequence[Judged]) -> torch.Tensor:
    """One-hot flags in the order of `LABELS`, (rows, labels); all zero where nothing is flagged."""
    return torch.tensor([[float(row.flag == label) for label in LABELS] for row in rows])


def flagged(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Judged],
) -> torch.Tensor:
    """Whether any label's probability is above one half, (rows,) bool."""
    with torch.no_grad():
        logits = model(**encode(tokenizer, [row.text for row in rows])).logits
    return logits.sigmoid().amax(dim=-1) > 0.5


def train_moderation(folder: Path) -> None:
    """Make the classifier in `folder` (float16)."""
    tokenizer = moderation_tokenizer()
    torch.manual_seed(SEED)
    model = LlamaForSequenceClassification(moderation_config(tokenizer))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    rng = stream("moderation", SEED)
    for step in tqdm(range(STEPS), desc="moderation", unit="step"):
        rows = [draw(rng) for _ in range(BATCH)]
        inputs = encode(tokenizer, [row.text for row in rows])
        loss = model(**inputs, labels=targets(rows)).loss
        warm = min(1.0, (step + 1) / 50)
        rate = RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        update(model, optimizer, loss, rate)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
