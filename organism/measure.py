"""Measures what no experiment does: `python -m organism.measure`.

1. The heads' directions. A head's safe-minus-unsafe direction at the last tokens of answers (where
   steering methods take it) against the one at the prompt's last token (where the stance is
   decided): the cosine between the two, for the heads that tell safe from unsafe best.
2. The moderation classifier on whole answers to held-out requests.

How the models behave is measured by `python -m experiments.run experiment=organism`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from statsmodels.stats.proportion import proportion_confint

from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer
from organism import lexicon
from organism.make import WEIGHTS
from organism.moderation import flagged
from organism.moderation_rows import held_out
from organism.world import comply, refuse, requests, stream

if TYPE_CHECKING:
    from torch import Tensor, nn

ANSWERS, PROMPTS, LAST, CHOSEN = 100, 40, 5, 4


@dataclass(frozen=True, slots=True)
class Head:
    """One head's directions.

    Attributes:
        layer: Its layer.
        head: Its place in the layer.
        accuracy: Share of held-out answers that its direction puts on the right side.
        cosine: Between its direction at answers and the one at the prompt's end.
    """

    layer: int
    head: int
    accuracy: float
    cosine: float


def heads(checkpoint: Checkpoint) -> list[Head]:
    """Every head of a model, the best at telling safe from unsafe answers first.

    Half of the answer pairs give the directions (difference of means over their last tokens),
    the other half the accuracies, with the threshold midway between the means. At the prompt's
    end the contrast is the system line that asks for safety against the one that frees.

    Args:
        checkpoint: The model to look into.
    """
    model: Any = load_model(checkpoint).eval()
    tokenizer, rng = load_tokenizer(checkpoint), stream("measure")
    chosen = list(requests("harmful", "align"))[:ANSWERS]
    safe = _at_answers(model, tokenizer, [(r.text, refuse(r, rng)) for r in chosen])
    unsafe = _at_answers(model, tokenizer, [(r.text, comply(r, "reckless", rng)) for r in chosen])
    texts = [request.text for request in chosen[:PROMPTS]]
    ends = [
        _at_prompt_end(model, tokenizer, texts, line)
        for line in (lexicon.SAFE_LINES[0], lexicon.FREE_LINES[0])
    ]
    half = len(chosen) // 2
    means = safe[:half].mean((0, 1)), unsafe[:half].mean((0, 1))
    direction = means[0] - means[1]
    middle = (direction * (means[0] + means[1]) / 2).sum(-1)
    right = (safe[half:] * direction).sum(-1) > middle
    wrong = (unsafe[half:] * direction).sum(-1) > middle
    accuracy = (right.float().mean((0, 1)) + 1 - wrong.float().mean((0, 1))) / 2
    cosine = torch.cosine_similarity(ends[0] - ends[1], direction, dim=-1)
    layers, count = accuracy.shape
    found = [
        Head(layer, head, float(accuracy[layer, head]), float(cosine[layer, head]))
        for layer in range(layers)
        for head in range(count)
    ]
    return sorted(found, key=lambda each: (-each.accuracy, each.layer, each.head))


def _at_answers(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> Tensor:
    """Head outputs at the last content tokens: (rows, `LAST`, layers, heads, head_dim)."""
    style, found = PromptStyle(), []
    for prompt, answer in rows:
        ids = style.encode_prompt(tokenizer, prompt)
        ids += tokenizer(answer, add_special_tokens=False)["input_ids"]
        found.append(_outputs(model, ids)[-LAST:])
    return torch.stack(found)


def _at_prompt_end(model: Any, tokenizer: Any, prompts: Sequence[str], system: str) -> Tensor:
    """Mean head outputs at the prompt's last token: (layers, heads, head_dim)."""
    style = PromptStyle(system=system)
    found = [_outputs(model, style.encode_prompt(tokenizer, prompt))[-1] for prompt in prompts]
    return torch.stack(found).mean(0)


@torch.no_grad()
def _outputs(model: Any, ids: list[int]) -> Tensor:
    """Inputs of every `o_proj` for one sequence: (tokens, layers, heads, head_dim)."""
    with _recorded(model) as seen:
        model(input_ids=torch.tensor([ids]))
    config = model.config
    stacked = torch.stack([each[0] for each in seen], dim=1)
    return stacked.unflatten(-1, (config.num_attention_heads, config.head_dim))


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for name, module in model.named_modules()
        if name.endswith("self_attn.o_proj")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def moderation_table() -> Iterator[tuple[str, int, int]]:
    """Kind of answer, how many the classifier flags, and of how many; whole held-out answers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = WEIGHTS / "moderation"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for kind in ("compliance", "refusal", "benign", "probe", "task"):
        rows = held_out(kind, 600)
        yield kind, int(flagged(model, tokenizer, rows).sum()), len(rows)


def main() -> None:
    """Prints both tables as Markdown."""
    aligned = Checkpoint(str(WEIGHTS / "base"), str(WEIGHTS / "aligned"))
    best = heads(aligned)[:CHOSEN]
    print("| layer | head | accuracy | cosine |\n|---|---|---|---|")
    for head in best:
        print(f"| {head.layer} | {head.head} | {head.accuracy:.3f} | {head.cosine:.2f} |")
    median = float(torch.tensor([head.cosine for head in best]).double().quantile(0.5))
    print(f"median cosine of the {CHOSEN} heads of best accuracy: {median:.2f}\n")
    print("| answers | n | flagged, % |\n|---|---|---|")
    for kind, count, n in moderation_table():
        low, high = proportion_confint(count, n, method="wilson")
        print(f"| {kind} | {n} | {100 * count / n:.1f} [{100 * low:.1f}, {100 * high:.1f}] |")


if __name__ == "__main__":
    main()
