"""Head outputs at the last content tokens of safe and unsafe answers (Zhu et al., section 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from data.rows import PreferencePair
from modeling.capture import Focus, TokenRow, captured_inputs
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
    """Outputs of every head at the last r tokens of each row, none padded at the end.

    The input of o_proj is the concatenation of the heads' outputs.  The rows come in pairs, and
    what the two begin with is run once; nothing is run behind the last layer's heads.

    Returns:
        (layers, heads, rows, r, head_dim) float32, on the CPU.
    """
    modules = {str(layer): module for layer, module in enumerate(output_projections(model))}
    captured = torch.empty(layout.layers, layout.heads, len(rows), last_tokens, layout.head_dim)
    whole = [prompt + answer for prompt, answer in rows]
    # Pairs of similar length go together, which saves padding.
    order = sorted(range(0, len(rows), 2), key=lambda at: len(whole[at]) + len(whole[at + 1]))
    indices: list[int] = []

    def keep(name: str, x: Tensor) -> None:
        outputs = x.view(len(indices), last_tokens, layout.heads, layout.head_dim)
        captured[int(name)][:, indices] = outputs.permute(2, 0, 1, 3).float().cpu()

    model.eval()
    step = max(1, batch_size // 2)
    with captured_inputs(modules, keep) as focus:
        for start in range(0, len(order), step):
            pairs = order[start : start + step]
            both = [at + side for at in pairs for side in (0, 1)]
            shared = [_shared(whole[at], whole[at + 1], last_tokens) for at in pairs]
            begun = _Begun(model)
            if min(shared):
                indices = []
                begun.run(focus, [whole[at][:n] for at, n in zip(pairs, shared, strict=True)])
                begun.twice()
            else:
                shared = [0] * len(pairs)
            indices = both
            ends = [whole[at][shared[place // 2] :] for place, at in enumerate(both)]
            begun.run(focus, ends, last_tokens)
    return captured


def _shared(one: list[int], other: list[int], last_tokens: int) -> int:
    """How many first tokens two rows have in common, not counting their last r."""
    equal = (x == y for x, y in zip(one, other, strict=False))
    return min(len(list(takewhile(bool, equal))), len(one) - last_tokens, len(other) - last_tokens)


class _Begun:
    """Rows that a model has run a part of: its cache, and which of its places are tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask: Tensor | None = None

    def run(self, focus: Focus, rows: Sequence[list[int]], count: int = 0) -> None:
        """Runs what comes next of each row, with its last `count` tokens in focus.

        Without any the rows are padded on the left, so that what follows joins on to them.
        """
        length, device = max(map(len, rows)), self._model.device
        gaps = [[0] * (length - len(row)) for row in rows]
        padded = [row + gap if count else gap + row for row, gap in zip(rows, gaps, strict=True)]
        ends = torch.tensor([[len(row) if count else length] for row in rows], device=device)
        starts = ends - torch.tensor([[len(row)] for row in rows], device=device)
        places = torch.arange(length, device=device)
        mask = ((places >= starts) & (places < ends)).long()
        if self._mask is not None:
            mask = torch.cat([self._mask, mask], 1)
        self._mask = mask
        inputs = {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -length:],
        }
        options = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": 1}
        last = (places >= ends - count) & (places < ends)
        focus.run(last, partial(self._model, **inputs, **options))

    def twice(self) -> None:
        """Has each row stand there twice, one after the other."""
        assert self._mask is not None
        self._cache.batch_repeat_interleave(2)
        self._mask = self._mask.repeat_interleave(2, 0)
