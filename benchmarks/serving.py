"""What generation costs: `python -m benchmarks.serving [--model FOLDER]`.

transformers in batches and one prompt at a time, and vLLM where it is installed: the prompts as one
set, and as five that are asked one after another or in one pass, as `experiments.run` does.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from benchmarks.inputs import ORGANISM
from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import VLLMBackend
from evaluation.base import Backend
from evaluation.token_engine import Answer, Questions
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from organism.sources import BenignPrompts

NEW_TOKENS, SETS = 64, 5


def run(
    backend: Backend, model: Path, prompts: list[str], repeats: int
) -> tuple[float, list[float], list[str]]:
    """Opens the model, answers once to warm up and then `repeats` times in turns.

    Returns:
        Seconds to open it; generated tokens per second (the best of the repeats) of one set, of
        several one after another, and of several in one pass; the answers.
    """
    start = time.perf_counter()
    engine = backend.open(Checkpoint(str(model)), PromptStyle())
    opening = time.perf_counter() - start
    texts = [answer.text for answer in engine.generate(prompts, NEW_TOKENS)]
    whole = Questions(prompts, NEW_TOKENS)
    sets = [Questions(prompts[number::SETS], NEW_TOKENS) for number in range(SETS)]
    ways: list[Callable[[], list[list[Answer]]]] = [
        lambda: engine.generate_sets([whole]),
        lambda: [engine.generate_sets([each])[0] for each in sets],
        lambda: engine.generate_sets(sets),
    ]
    rates: list[list[float]] = [[] for _ in ways]
    for _, (way, of_way) in product(range(repeats), zip(ways, rates, strict=True)):
        start = time.perf_counter()
        tokens = sum(answer.tokens for answers in way() for answer in answers)
        of_way.append(tokens / (time.perf_counter() - start))
    engine.close()
    return opening, list(map(max, rates)), texts


def reload_seconds(backend: Backend, model: Path) -> float:
    """Seconds to open a second checkpoint of the model's shape after the first was closed."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(shutil.copytree(model, Path(folder) / "other"))
        start = time.perf_counter()
        backend.open(Checkpoint(str(other)), PromptStyle()).close()
        return time.perf_counter() - start


def main() -> None:
    """Prints what each takes, its ratio to transformers in batches, and how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.serving")
    parser.add_argument("--model", type=Path, default=ORGANISM, help="default: the organism")
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    prompts = [prompt.text for prompt in BenignPrompts(n=options.prompts).prompts()]
    print(f"{options.model.name}, {len(prompts)} prompts, up to {NEW_TOKENS} new tokens")
    batches, single = "transformers, batches of 64", "transformers, one at a time"
    ways: dict[str, tuple[Backend, list[str]]] = {
        batches: (TransformersBackend(batch_size=64), prompts),
        single: (TransformersBackend(batch_size=1), prompts[: len(prompts) // 5]),
    }
    served = find_spec("vllm") is not None
    if served:
        ways["vLLM"] = (VLLMBackend(kv_cache_gib=1), prompts)
    starts: dict[str, float] = {}
    expected: list[str] = []
    batched = 0.0
    for name, (backend, asked) in ways.items():
        starts[name], rates, texts = run(backend, options.model, asked, options.repeats)
        expected, batched = expected or texts, batched or rates[0]
        same = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=False))
        agreement = f"{same} of {len(texts)} answers agree"
        print(f"{name:27} {rates[0]:8.0f} tokens/s; {rates[0] / batched:.2f}x; {agreement}")
        alone, whole = rates[1:]
        several = f"{SETS} sets one by one {alone:.0f}, in one pass {whole:.0f}"
        print(f"  {several}: {whole / alone:.2f}x", flush=True)
    if not served:
        print("vLLM isn't installed here; make bench-vllm sets it up and runs this benchmark")
        return
    start, reload = starts["vLLM"], reload_seconds(ways["vLLM"][0], options.model)
    print(f"a new engine and canary     {start:8.2f} s")
    print(f"a reload and canary         {reload:8.2f} s; {start / reload:.0f}x faster")


if __name__ == "__main__":
    main()
