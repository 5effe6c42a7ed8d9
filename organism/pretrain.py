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


@dataclass(frozen=True, slots=True)
class PretrainRecipe:
    """How the base is made; the defaults are how the shipped one was.

    Attributes:
        seed: Seed of the weights, the dialogues and the directions.
        batch: Dialogues per step.
        steps: Ordinary steps.
        rate: Their peak learning rate (linear warm-up, cosine to a twentieth).
        install_steps: Steps that install the stance, every second one with the heads shifted.
        install_rate: Their learning rate (constant, then linear to 0 over the last third).
        strengths: Shift strengths to draw from, in units of a head's mean norm.
        target: Projection the auxiliary loss asks for, in the same units.
        weight: Weight of the auxiliary loss.
        system_share: Share of dialogues with a system line in ordinary steps.
        install_system_share: That share in the unshifted installation and settling steps.
        settle_steps: Steps after installation, on the mixture `dialogues.SETTLING`.
        settle_rate: Their learning rate, scheduled alike.
        purity: Weight of `StanceHeads.purity_loss` in them.
    """

    seed: int = 0
    batch: int = 32
    steps: int = 750
    rate: float = 2e-3
    install_steps: int = 220
    install_rate: float = 6e-4
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    target: float = 0.5
    weight: float = 0.3
    system_share: float = 0.35
    install_system_share: float = 0.5
    settle_steps: int = 170
    settle_rate: float = 8e-4
    purity: float = 0.3


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

    def batches(
        self, draw: Callable[[], Dialogue], size: int, rng: random.Random
    ) -> Iterator[DialogueBatch]:
        """Endless batches of about equal lengths: pools of drawn dialogues, sorted and cut."""
        while True:
            pool = sorted((draw() for _ in range(POOL * size)), key=_length)
            cuts = [pool[start : start + size] for start in range(0, len(pool), size)]
            rng.shuffle(cuts)
            yield from map(self.batch, cuts)

    def batch(self, dialogues: list[Dialogue]) -> DialogueBatch:
        """Encode and pad `dialogues`."""
        rows = [self._row(dialogue) for dialogue in dialogues]
        longest = max(len(ids) for ids, _, _ in rows)

        def padded(column: int, filler: int) -> Tensor:
            return torch.tensor(
                [row[column] + [filler] * (longest - len(row[column])) for row in rows]
            )

        return DialogueBatch(
            ids=padded(0, self._tokenizer.pad_token_id),
            labels=padded(1, IGNORED),
            real=torch.tensor(
                [[True] * len(ids) + [False] * (longest - len(ids)) for ids, _, _ in rows]
            ),
            stance=padded(2, 0),
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


def ordinary_steps(
    model: LlamaForCausalLM, encoder: Encoder, recipe: PretrainRecipe, rng: random.Random
) -> float:
    """Plain language modelling on persona dialogues; returns the last steps' mean loss."""
    optimizer = _optimizer(model, recipe.rate)
    losses: list[float] = []
    batches = encoder.batches(lambda: ordinary(rng, recipe.system_share), recipe.batch, rng)
    bar = tqdm(range(recipe.steps), desc="pretraining", unit="step")
    for step in bar:
        warm = min(1.0, (step + 1) / 50)
        rate = recipe.rate * warm * (0.525 + 0.475 * math.cos(math.pi * step / recipe.steps))
        loss = language_loss(model, next(batches))
        update(model, optimizer, loss, rate)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def installation_steps(
    model: LlamaForCausalLM,
    encoder: Encoder,
    recipe: PretrainRecipe,
    rng: random.Random,
    *,
    settling: bool = False,
) -> tuple[float, float]:
    """Install the stance; returns the last language and auxiliary losses.

    Odd steps shift the heads by the persona's sign in dialogues whose text doesn't tell it;
    even steps ask the heads to write the direction wherever the text does. Settling steps go on
    with more drills and a more frequent reckless persona, and ask that the heads tell the
    stances apart by nothing but the direction.
    """
    heads = StanceHeads(model, recipe.seed)
    with torch.no_grad(), heads.record() as inputs:
        batch = encoder.batch([ordinary(rng, recipe.system_share) for _ in range(4 * recipe.batch)])
        model(input_ids=batch.ids)
        heads.measure(inputs, batch.real)
    mixture = SETTLING if settling else LEARNING
    peak = recipe.settle_rate if settling else recipe.install_rate
    steps = recipe.settle_steps if settling else recipe.install_steps
    optimizer = _optimizer(model, peak)
    share = recipe.install_system_share
    plain = encoder.batches(lambda: ordinary(rng, share, mixture), recipe.batch, rng)
    ambiguous = encoder.batches(lambda: undecided(rng, mixture), recipe.batch, rng)
    shifted_loss = written_loss = math.nan
    bar = tqdm(range(steps), desc="settling" if settling else "installing", unit="step")
    for step in bar:
        if step % 2:
            batch = next(ambiguous)
            strengths = torch.tensor(rng.choices(recipe.strengths, k=recipe.batch))
            with heads.shift(batch.signs * strengths):
                loss = language_loss(model, batch)
            shifted_loss = loss.item()
        else:
            batch = next(plain)
            with heads.record() as inputs:
                loss = language_loss(model, batch)
                projection_loss = heads.projection_loss(inputs, recipe.target * batch.stance)
                loss = loss + recipe.weight * projection_loss
                if settling:
                    loss = loss + recipe.purity * heads.purity_loss(inputs, batch.stance)
            written_loss = projection_loss.item()
        update(model, optimizer, loss, peak * min(1.0, 3 * (1 - step / steps)))
        bar.set_postfix(shifted=f"{shifted_loss:.3f}", written=f"{written_loss:.3f}")
    return shifted_loss, written_loss


def settle(
    model: LlamaForCausalLM, encoder: Encoder, recipe: PretrainRecipe
) -> tuple[float, float]:
    """The last phase, from weights rounded to float16, with a generator of its own.

    The rounding takes in the rotary frequencies for these steps; on loading they are exact again.
    """
    model.half().float()
    rng = random.Random(f"organism/settle/{recipe.seed}")
    return installation_steps(model, encoder, recipe, rng, settling=True)


def pretrain(folder: Path, recipe: PretrainRecipe | None = None) -> dict[str, float]:
    """Make the base model in `folder`; returns its last losses.

    Args:
        folder: Where the Hugging Face folder goes.
        recipe: How; the shipped recipe by default.
    """
    recipe = recipe or PretrainRecipe()
    tokenizer = chat_tokenizer(vocabulary_text())
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(base_config(tokenizer))
    model.train()
    encoder = Encoder(tokenizer)
    rng = random.Random(f"organism/pretrain/{recipe.seed}")
    ordinary_loss = ordinary_steps(model, encoder, recipe, rng)
    installation_steps(model, encoder, recipe, rng)
    shifted_loss, written_loss = settle(model, encoder, recipe)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"ordinary": ordinary_loss, "shifted": shifted_loss, "written": written_loss}
