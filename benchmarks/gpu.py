"""The methods at Llama-3-8B's shapes on one GPU, in minutes: `python -m benchmarks.gpu`.

The weights are random: what is measured is seconds and memory, not safety. `experiments.repair`
prepares NLSR, SafetyLock and FGSN and applies them to a fine-tuned adapter; vLLM, where it is
installed, serves the fine-tuned model and the locked one. Each peak stands beside what a plan
counts for the model. Without a GPU it runs too, on a smaller model (`--layers 2 --width 256`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from benchmarks.inputs import copy_tokenizer, move_adapter, random_adapter
from evaluation.base import Verdict
from evaluation.judges.keyword import KeywordJudge
from experiments import repair
from experiments.plan.shapes import read_shape
from experiments.plan.sizes import model_size
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name
from modeling.measure import measured
from modeling.training import LoraSettings
from organism.sources import AlignmentPairs, BenignPrompts

METHODS = ("nlsr", "safetylock", "fgsn")
RANK, NEW_TOKENS, PROMPTS = 16, 128, 180


class Lenient(KeywordJudge):
    """Calls every answer safe, as random weights write nothing that could be."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per answer."""
        return [Verdict("safe", 0.0)] * len(answers)


def main() -> None:
    """Makes the models in a temporary folder and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.gpu")
    sizes = {"layers": 32, "width": 4096, "inner": 14336, "vocabulary": 128256, "rows": 100}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", type=Path, help="where 40 GB fit (default: a temporary one)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        _write_models(folder, options)
        _write_rows(folder, options.rows)
        console.print(_methods(folder))
        if find_spec("vllm") is None:
            console.print("vLLM isn't installed, so that nothing was served")
        else:
            console.print(_serving(folder))


def _write_models(folder: Path, options: argparse.Namespace) -> None:
    """`base`, and adapters on it: `aligned`, and `attacked`, which is that with some noise."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 512),
    )
    torch.manual_seed(0)
    with torch.device(device_name()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="5GB")
    del model
    copy_tokenizer(folder / "base")
    base = Checkpoint(str(folder / "base"), dtype="bfloat16")
    random_adapter(base, folder / "aligned", RANK)
    move_adapter(folder / "aligned", folder / "attacked")


def _write_rows(folder: Path, count: int) -> None:
    pairs = AlignmentPairs(harmful=count, benign=0, probes=0).pairs()
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    benign = [{"prompt": each.text} for each in BenignPrompts(n=min(count, PROMPTS)).prompts()]
    for name, each in (("harmful", rows), ("benign", benign)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def _methods(folder: Path) -> Table:
    table = Table(
        "", "seconds", "peak MiB", "planned: weights, adapter", title="prepare and apply, bfloat16"
    )
    size = model_size(read_shape(folder / "base"), "bfloat16", LoraSettings(rank=RANK))
    models = ["--base", str(folder / "base"), "--aligned", str(folder / "aligned")]
    rows = ["--calibration", str(folder / "harmful.jsonl")]
    rows += ["--benign", str(folder / "benign.jsonl")]
    judge = [
        *("--set", "judge@evaluation.harm_judge=keyword", "--set", "plugins=[benchmarks]"),
        *("--set", "evaluation.harm_judge._target_=benchmarks.gpu.Lenient"),
    ]
    settings = {
        "nlsr": ["--set", "calibration_rows=20", "--set", "take_available=true", *judge],
        "safetylock": ["--set", "n_pairs=50"],
        "fgsn": ["--set", "n_pairs=50"],
    }
    for method in METHODS:
        artefact, out = str(folder / method), str(folder / f"{method}-repaired")
        prepare = ["prepare", method, *models, *rows, *settings[method], "--out", artefact]
        apply = ["apply", artefact, "--model", str(folder / "attacked"), "--out", out]
        for arguments in (prepare, apply):
            with measured() as cost:
                if repair.main(arguments):
                    raise SystemExit(f"{' '.join(arguments[:2])} failed")
            peak, planned = (f"{count / 2**20:.0f}" for count in (cost.peak_bytes, size.bytes))
            table.add_row(f"{arguments[0]} {method}", f"{cost.seconds:.1f}", peak, planned)
    return table


def _serving(folder: Path) -> Table:
    """The fine-tuned model and the locked one by vLLM: opening, then tokens per second."""
    from evaluation.backends.vllm import VLLMBackend

    backend = VLLMBackend()
    prompts = [prompt.text for prompt in BenignPrompts(n=PROMPTS).prompts()]
    attacked = Checkpoint(str(folder / "base"), str(folder / "attacked"), dtype="bfloat16")
    locked = Checkpoint(str(folder / "safetylock-repaired"), dtype="bfloat16")
    title = f"vLLM, {PROMPTS} prompts, up to {NEW_TOKENS} tokens"
    table = Table("", "opened in, s (canary included)", "tokens/s", title=title)
    # Another folder, so that a warm engine is given its weights anew.
    again = folder / "again"
    shutil.copytree(locked.base, again, copy_function=os.link)
    reloaded = Checkpoint(str(again), dtype="bfloat16")
    for name, model in {"attacked": attacked, "locked": locked, "reloaded": reloaded}.items():
        start = time.perf_counter()
        engine = backend.open(model, PromptStyle())
        opened = time.perf_counter() - start
        engine.generate(prompts, 8)
        start = time.perf_counter()
        answers = engine.generate(prompts, NEW_TOKENS)
        rate = sum(answer.tokens for answer in answers) / (time.perf_counter() - start)
        engine.close()
        table.add_row(name, f"{opened:.1f}", f"{rate:.0f}")
    return table


if __name__ == "__main__":
    main()
