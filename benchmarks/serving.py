"""Generation on the organism: transformers in batches and one by one, and vLLM."""

from __future__ import annotations

import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import VLLMBackend
from evaluation.base import Backend
from experiments.config.experiment import PROJECT
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from organism.sources import BenignPrompts

PROMPTS, NEW_TOKENS, REPEATS = 320, 64, 3
BASE = PROJECT / "organism" / "weights" / "base"


def run(backend: Backend, prompts: list[str]) -> tuple[float, float, list[str]]:
    """Opens the organism, answers once to warm up and then `REPEATS` times.

    Returns:
        Seconds to open it, generated tokens per second (the best of the repeats), the answers.
    """
    start = time.perf_counter()
    engine = backend.open(Checkpoint(str(BASE)), PromptStyle())
    opening = time.perf_counter() - start
    engine.generate(prompts, 8)
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        answers = engine.generate(prompts, NEW_TOKENS)
        rates.append(sum(answer.tokens for answer in answers) / (time.perf_counter() - start))
    engine.close()
    return opening, max(rates), [answer.text for answer in answers]


def reload_seconds(backend: Backend) -> float:
    """Seconds to open a second checkpoint of the organism's shape after the first was closed."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(shutil.copytree(BASE, Path(folder) / "other"))
        start = time.perf_counter()
        backend.open(Checkpoint(str(other)), PromptStyle()).close()
        return time.perf_counter() - start


def main() -> None:
    """Prints what each takes, its ratio to transformers in batches, and how many answers agree."""
    prompts = [prompt.text for prompt in BenignPrompts(n=PROMPTS).prompts()]
    print(f"the organism, {len(prompts)} prompts, up to {NEW_TOKENS} new tokens")
    ways: dict[str, tuple[Backend, list[str]]] = {
        "transformers, batches of 64": (TransformersBackend(batch_size=64), prompts),
        "transformers, one at a time": (TransformersBackend(batch_size=1), prompts[:64]),
    }
    served = find_spec("vllm") is not None
    if served:
        ways["vLLM"] = (VLLMBackend(kv_cache_gib=1), prompts)
    measured = {name: run(backend, asked) for name, (backend, asked) in ways.items()}
    _, batched, expected = measured["transformers, batches of 64"]
    for name, (_, rate, texts) in measured.items():
        same = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=False))
        agreement = f"{same} of {len(texts)} answers agree"
        print(f"{name:27} {rate:8.0f} tokens/s; {rate / batched:.2f}x; {agreement}")
    if not served:
        print("vLLM isn't installed here; make bench-vllm sets it up and runs this benchmark")
        return
    start, reload = measured["vLLM"][0], reload_seconds(ways["vLLM"][0])
    print(f"a new engine and canary     {start:8.2f} s")
    print(f"a reload and canary         {reload:8.2f} s; {start / reload:.0f}x faster")


if __name__ == "__main__":
    main()
