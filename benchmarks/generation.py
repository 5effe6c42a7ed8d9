"""Generation with transformers on the organism: batches of 64 against one prompt at a time."""

from __future__ import annotations

import time

from evaluation.backends.transformers import TransformersBackend
from experiments.config.experiment import PROJECT
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from organism.sources import BenignPrompts

PROMPTS, NEW_TOKENS = 128, 64


def tokens_per_second(batch_size: int, prompts: list[str]) -> tuple[float, list[str]]:
    """Generated tokens per second over all prompts, after one warm-up batch; and the answers."""
    checkpoint = Checkpoint(str(PROJECT / "organism" / "weights" / "base"))
    engine = TransformersBackend(batch_size=batch_size).open(checkpoint, PromptStyle())
    engine.generate(prompts[:batch_size], 8)
    start = time.perf_counter()
    answers = engine.generate(prompts, NEW_TOKENS)
    seconds = time.perf_counter() - start
    engine.close()
    return sum(answer.tokens for answer in answers) / seconds, [a.text for a in answers]


def main() -> None:
    """Prints tokens per second of both, their ratio, and how many answers agree."""
    prompts = [prompt.text for prompt in BenignPrompts().prompts()[:PROMPTS]]
    batched, batched_answers = tokens_per_second(64, prompts)
    single, single_answers = tokens_per_second(1, prompts)
    same = sum(a == b for a, b in zip(batched_answers, single_answers, strict=True))
    print(f"generation on the organism, {len(prompts)} prompts, up to {NEW_TOKENS} new tokens")
    print(f"batches of 64    {batched:8.0f} tokens/s")
    print(f"one at a time    {single:8.0f} tokens/s")
    print(f"ratio            {batched / single:8.1f}x; {same} of {len(prompts)} answers agree")


if __name__ == "__main__":
    main()
