"""Head outputs at the last content tokens of safe and unsafe answers (Zhu et al., section 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from data.rows import PreferencePair
from modeling.capture import TokenRow, batches, captured_inputs
from modeling.chat import PromptStyle
from modeling.heads import HeadLayout, output_projections
from settings import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnswerEnd = Literal["content", "legacy_slice"]
# How many token ids the official code cuts off a rendered dialogue.
LEGACY_SLICE = 5


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as token ids.

    Attributes:
        rows: Safe and unsafe answer of each pair in turn: (prompt ids, answer ids up to the last
            token that counts), 2 N rows.
        pairs: The N pairs, in the order of `rows`.
        too_short: Pairs passed over because an answer has fewer tokens than are taken.
    """

    rows: list[TokenRow]
    pairs: list[PreferencePair]
    too_short: int


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    *,
    count: int,
    last_tokens: int,
    answer_end: AnswerEnd,
    system: str | None,
    seed: int,
) -> EncodedPairs:
    """Draws `count` pairs whose answers have the `last_tokens` that are taken, and renders them.

    Args:
        pairs: A safe (chosen) and an unsafe (rejected) answer to each prompt.
        tokenizer: The aligned model's.
        style: Renders them.
        count: N.
        last_tokens: r.
        answer_end: "content" ends at the answer's last content token; "legacy_slice" cuts five
            ids off the rendered dialogue, as the official code does.
        system: A system line, or None for the style's own.
        seed: Of the draw.

    Raises:
        DataError: There are fewer usable pairs than asked for.
    """
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    rows: list[TokenRow] = []
    usable: list[PreferencePair] = []
    too_short = 0
    for pair in shuffled:
        if len(usable) == count:
            break
        both = [
            _row(style, tokenizer, pair.prompt, text, answer_end, system)
            for text in (pair.chosen, pair.rejected)
        ]
        # What is sliced off as the official code does may reach into the prompt.
        taken = [answer if answer_end == "content" else prompt + answer for prompt, answer in both]
        if min(map(len, taken)) < last_tokens:
            too_short += 1
            continue
        usable.append(pair)
        rows += both
    if len(usable) < count:
        raise DataError(
            f"defense.n_pairs={count}, but sources.safety_pairs has only {len(usable)} pairs whose "
            f"answers both have defense.last_tokens={last_tokens} tokens or more (of "
            f"{len(pairs)}); give more pairs or lower defense.n_pairs"
        )
    return EncodedPairs(rows, usable, too_short)


def _row(
    style: PromptStyle,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    answer_end: AnswerEnd,
    system: str | None,
) -> TokenRow:
    head = style.encode_prompt(tokenizer, prompt, system)
    if answer_end == "content":
        return head, style.encode_content(tokenizer, prompt, answer, system)
    whole = head + style.encode_answer(tokenizer, prompt, answer, system)
    return whole[:-LEGACY_SLICE][: len(head)], whole[len(head) : -LEGACY_SLICE]


@torch.no_grad()
def head_outputs(
    model: PreTrainedModel,
    layout: HeadLayout,
    rows: Sequence[TokenRow],
    last_tokens: int,
    batch_size: int,
) -> Tensor:
    """Outputs of every head at the last r tokens of each row, none padded at the end, in one pass.

    The input of o_proj is the concatenation of the heads' outputs.

    Returns:
        (layers, heads, rows, r, head_dim) float32, on the CPU.
    """
    modules = {str(layer): module for layer, module in enumerate(output_projections(model))}
    captured = torch.empty(layout.layers, layout.heads, len(rows), last_tokens, layout.head_dim)
    # Rows of similar length go together, which saves padding.
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    indices: list[int] = []

    def keep(name: str, x: Tensor) -> None:
        outputs = x.view(len(indices), last_tokens, layout.heads, layout.head_dim)
        captured[int(name)][:, indices] = outputs.permute(2, 0, 1, 3).float().cpu()

    model.eval()
    with captured_inputs(modules, keep) as focus:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            (batch,) = batches([rows[i] for i in indices], batch_size, str(model.device))
            ends = batch.attention_mask.sum(1, keepdim=True)
            places = torch.arange(batch.input_ids.shape[1], device=ends.device)
            focus.positions = (places < ends) & (places >= ends - last_tokens)
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
    return captured
