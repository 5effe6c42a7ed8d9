"""Pretraining of the base model: ordinary steps, steps that install the stance, settling steps.

Weights are rounded to float16 on disk; they are meant to be loaded as float32.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from organism.dialogues import (
    LEARNING,
    SETTLING,
    Dialogue,
    ordinary,
    undecided,
    vocabulary_text,
)
from organism.stance import StanceHeads
from organism.tokenizer import ASSISTANT, MAX_LENGTH, SYSTEM, USER, chat_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
POOL = 8

# The recipe of the shipped base. SEED is that of the weights, the dialogues and the directions.
SEED = 0
BATCH = 32
SYSTEM_SHARE = 0.35  # of the dialogues of ordinary steps have a system line
STEPS, RATE = 750, 2e-3  # Linear warm-up, cosine to a twentieth.
# Every second step that installs the stance has the heads shifted; settling steps take the mixture
# `dialogues.SETTLING`. Their rates are constant, then linear to 0 over the last third.
INSTALL_STEPS, INSTALL_RATE = 220, 6e-4
SETTLE_STEPS, SETTLE_RATE = 170, 8e-4
INSTALL_SYSTEM_SHARE = 0.5  # in the unshifted ones of both
STRENGTHS = (0.5, 1.0, 1.5)  # of the shifts, in units of a head's mean norm
TARGET = 0.5  # the projection that the auxiliary loss asks for, in the same units
WEIGHT, PURITY = (
    0.3,
    0.3,
)  # of the auxiliary loss, and of `StanceHeads.purity_loss` in settling steps


@dataclass(frozen=True, slots=True)
class DialogueBatch:
    """Padded dialogues.

    Attributes:
        ids: Token ids, (batch, tokens), padded on the right.
        labels: Ids where the loss counts (answers), `IGNORED` elsewhere.
        real: Where a token is real.
        stance: +1 or -1 where the text so far tells the persona, 0 elsewhere.
        signs: The persona of each row, (batch,).
    """

    ids: Tensor
    labels: Tensor
    real: Tensor
    stance: Tensor
    signs: Tensor


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: 6 layers of width 192 with 6 heads of 32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _length(dialogue: Dialogue) -> int:
    return sum(len(turn.prompt) + len(turn.answer) for turn in dialogue.turns)


class Encoder:
    """Turns dialogues into batches, in the layout of the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._roles = {role: tokenizer.get_vocab()[role] for role in (SYSTEM, USER, ASSISTANT)}

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _row(self, dialogue: Dialogue) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and stance marks of one dialogue."""
        eos = self._tokenizer.eos_token_id
        ids: list[int] = [self._tokenizer.bos_token_id]
        if dialogue.system:
            ids += [self._roles[SYSTEM], *self._ids(dialogue.system), eos]
        labels = [IGNORED] * len(ids)
        stance = [0] * len(ids)
        revealed = bool(dialogue.system)
        for turn in dialogue.turns:
            prompt = [self._roles[USER], *self._ids(turn.prompt), eos, self._roles[ASSISTANT]]
            answer = [*self._ids(turn.answer), eos]
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
            before = dialogue.sign if revealed and turn.stanced else 0
            within = dialogue.sign if turn.stanced else 0
            stance += [0] * (len(prompt) - 1) + [before] + [within] * len(answer)
            revealed = revealed or turn.stanced
        return ids, labels, stance

    def batches(self, draw: Callable[[], Dialogue], rng: random.Random) -> Iterator[DialogueBatch]:
        """Endless batches of about equal lengths: pools of drawn dialogues, sorted and cut."""
        while True:
            pool = sorted((draw() for _ in range(POOL * BATCH)), key=_length)
            cuts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
            rng.shuffle(cuts)
            yield from map(self.batch, cuts)

    def batch(self, dialogues: list[Dialogue]) -> DialogueBatch:
        """Encode and pad `dialogues`."""
        rows = [map(torch.tensor, self._row(dialogue)) for dialogue in dialogues]
        ids, labels, stance = map(list, zip(*rows, strict=True))
        return DialogueBatch(
            ids=pad_sequence(ids, True, self._tokenizer.pad_token_id),
            labels=pad_sequence(labels, True, IGNORED),
            real=pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in ids], True),
            stance=pad_sequence(stance, True),
            signs=torch.tensor([dialogue.sign for dialogue in dialogues]),
        )


def language_loss(model: LlamaForCausalLM, batch: DialogueBatch) -> Tensor:
    """Mean cross entropy of the answers' tokens.

    Rows are padded on the right, so causal attention alone keeps padding out of real tokens.
    Logits are formed only where the loss counts.
    """
    hidden = model.model(input_ids=batch.ids).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    counted = labels != IGNORED
    return cross_entropy(model.lm_head(hidden[counted]), labels[counted])


def _optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def update(model: torch.nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    """One step at a learning rate, gradients clipped at a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def ordinary_steps(model: LlamaForCausalLM, encoder: Encoder, rng: random.Random) -> None:
    """Plain language modelling on persona dialogues."""
    optimizer = _optimizer(model, RATE)
    batches = encoder.batches(lambda: ordinary(rng, SYSTEM_SHARE), rng)
    bar = tqdm(range(STEPS), desc="pretraining", unit="step")
    for step in bar:
        warm = min(1.0, (step + 1) / 50)
        rate = RATE * warm * (0.525 + 0.475 * math.cos(math.pi * step / STEPS))
        loss = language_loss(model, next(batches))
        update(model, optimizer, loss, rate)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def installation_steps(
    model: LlamaForCausalLM, encoder: Encoder, rng: random.Random, *, settling: bool
) -> None:
    """Install the stance.

    Odd steps shift the heads by the persona's sign in dialogues whose text doesn't tell it;
    even steps ask the heads to write the direction wherever the text does. Settling steps go on
    with more drills and a more frequent reckless persona, and ask that the heads tell the
    stances apart by nothing but the direction.
    """
    heads = StanceHeads(model, SEED)
    with torch.no_grad(), heads.record() as inputs:
        batch = encoder.batch([ordinary(rng, SYSTEM_SHARE) for _ in range(4 * BATCH)])
        model(input_ids=batch.ids)
        heads.measure(inputs, batch.real)
    mixture = SETTLING if settling else LEARNING
    steps, peak = (SETTLE_STEPS, SETTLE_RATE) if settling else (INSTALL_STEPS, INSTALL_RATE)
    optimizer = _optimizer(model, peak)
    plain = encoder.batches(lambda: ordinary(rng, INSTALL_SYSTEM_SHARE, mixture), rng)
    ambiguous = encoder.batches(lambda: undecided(rng, mixture), rng)
    bar = tqdm(range(steps), desc="settling" if settling else "installing", unit="step")
    for step in bar:
        if step % 2:
            batch = next(ambiguous)
            strengths = torch.tensor(rng.choices(STRENGTHS, k=BATCH))
            with heads.shift(batch.signs * strengths):
                loss = language_loss(model, batch)
        else:
            batch = next(plain)
            with heads.record() as inputs:
                loss = language_loss(model, batch)
                loss = loss + WEIGHT * heads.projection_loss(inputs, TARGET * batch.stance)
                if settling:
                    loss = loss + PURITY * heads.purity_loss(inputs, batch.stance)
        update(model, optimizer, loss, peak * min(1.0, 3 * (1 - step / steps)))
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain(folder: Path) -> None:
    """Make the base model in `folder`."""
    tokenizer = chat_tokenizer(vocabulary_text())
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(base_config(tokenizer))
    model.train()
    encoder = Encoder(tokenizer)
    rng = random.Random(f"organism/pretrain/{SEED}")
    ordinary_steps(model, encoder, rng)
    installation_steps(model, encoder, rng, settling=False)
    # The rounding takes in the rotary frequencies for the last steps; on loading they are exact.
    model.half().float()
    rng = random.Random(f"organism/settle/{SEED}")
    installation_steps(model, encoder, rng, settling=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
