"""Measures what no experiment does: `python -m organism.measure`.

1. The heads' directions. A head's safe-minus-unsafe direction at the last tokens of answers (where
   steering methods take it) against the one at the prompt's last token (where the stance is
   decided): the cosine between the two, for the heads that tell safe from unsafe best.
2. The moderation classifier on whole answers to held-out requests.

How the models behave is measured by `python -m experiments.run experiment=organism`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling.capture import TokenRow, batches, captured_inputs
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer
from organism import lexicon
from organism.make import WEIGHTS
from organism.moderation import flagged
from organism.moderation_rows import held_out
from organism.world import Request, comply, refuse, requests, stream

if TYPE_CHECKING:
    from torch import Tensor

ANSWERS, PROMPTS, LAST, CHOSEN = 100, 40, 5, 4
BATCH = 25


@dataclass(frozen=True, slots=True)
class Head:
    """One head: its place, the share of held-out answers that its direction puts on the right
    side, and the cosine between its direction at answers and the one at the prompt's end.
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
    """
    model: Any = load_model(checkpoint).eval()
    tokenizer, rng = load_tokenizer(checkpoint), stream("measure")

    def row(request: Request, answer: str, system: str | None = None) -> TokenRow:
        prompt = PromptStyle(system=system).encode_prompt(tokenizer, request.text)
        return prompt, tokenizer(answer, add_special_tokens=False)["input_ids"]

    asked = requests("harmful", "align")[:ANSWERS]
    safe = _last_outputs(model, [row(each, refuse(each, rng)) for each in asked], LAST)
    unsafe = _last_outputs(
        model, [row(each, comply(each, "reckless", rng)) for each in asked], LAST
    )
    ends = [
        _last_outputs(model, [row(each, "", line) for each in asked[:PROMPTS]], 1).mean((0, 1))
        for line in (lexicon.SAFE_LINES[0], lexicon.FREE_LINES[0])
    ]
    half = len(asked) // 2
    means = safe[:half].mean((0, 1)), unsafe[:half].mean((0, 1))
    direction = means[0] - means[1]
    middle = (direction * (means[0] + means[1]) / 2).sum(-1)
    right = (safe[half:] * direction).sum(-1) > middle
    wrong = (unsafe[half:] * direction).sum(-1) > middle
    accuracy = (right.float().mean((0, 1)) + 1 - wrong.float().mean((0, 1))) / 2
    cosine = torch.cosine_similarity(ends[0] - ends[1], direction, dim=-1)
    layers, count = accuracy.shape
    measured = [
        Head(layer, head, float(accuracy[layer, head]), float(cosine[layer, head]))
        for layer in range(layers)
        for head in range(count)
    ]
    return sorted(measured, key=lambda each: (-each.accuracy, each.layer, each.head))


@torch.no_grad()
def _last_outputs(model: Any, rows: Sequence[TokenRow], count: int) -> Tensor:
    """Head outputs at each row's last tokens: (rows, count, layers, heads, head_dim)."""
    layers: dict[str, list[Tensor]] = {
        name: [] for name, _ in model.named_modules() if name.endswith("self_attn.o_proj")
    }
    modules = {name: model.get_submodule(name) for name in layers}
    with captured_inputs(modules, lambda name, x: layers[name].append(x)) as focus:
        for batch in batches(rows, BATCH, str(model.device)):
            ends = batch.attention_mask.sum(1, keepdim=True)
            places = torch.arange(batch.input_ids.shape[1], device=ends.device)
            last = (places < ends) & (places >= ends - count)
            focus.run(last, partial(model, **batch.inputs, use_cache=False))
    outputs = torch.stack([torch.cat(each) for each in layers.values()], 1)
    heads = model.config.num_attention_heads
    return outputs.view(len(rows), count, len(layers), heads, model.config.head_dim)


def main() -> None:
    """Prints both tables as Markdown."""
    aligned = Checkpoint(str(WEIGHTS / "base"), str(WEIGHTS / "aligned"))
    best = heads(aligned)[:CHOSEN]
    print("| layer | head | accuracy | cosine |\n|---|---|---|---|")
    for head in best:
        print(f"| {head.layer} | {head.head} | {head.accuracy:.3f} | {head.cosine:.2f} |")
    median = float(torch.tensor([head.cosine for head in best]).double().quantile(0.5))
    print(f"median cosine of the {CHOSEN} heads of best accuracy: {median:.2f}\n")
    folder = WEIGHTS / "moderation"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("| answers | n | flagged, % |\n|---|---|---|")
    for kind in ("compliance", "refusal", "benign", "probe", "task"):
        rows = held_out(kind, 600)
        count, n = int(flagged(model, tokenizer, rows).sum()), len(rows)
        low, high = proportion_confint(count, n, method="wilson")
        print(f"| {kind} | {n} | {100 * count / n:.1f} [{100 * low:.1f}, {100 * high:.1f}] |")


if __name__ == "__main__":
    main()
