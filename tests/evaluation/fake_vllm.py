"""A library in vLLM's place, so that the worker process runs for real where vLLM isn't installed.

Its model adds a constant to the last token; the constant stands in the folder's file "step".
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = {
    "__init__.py": """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace as Of

SamplingParams = PoolingParams = Of
log = Path(os.environ["FAKE_LOG"])


def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")


class OutOfMemoryError(RuntimeError):
    pass


class LLM:
    def __init__(self, model, **options):
        self.options, self.asleep = options, False
        self._read(model)
        note(f"start {Path(model).name} {options['max_model_len']} {options['enforce_eager']}")
        self.llm_engine = Of(model_config=Of(max_model_len=64))

    def _read(self, model):
        text = (Path(model) / "step").read_text()
        if text == "slow":
            time.sleep(60)
        if text == "crash":
            print("the disk is on fire", flush=True)
            os._exit(3)
        if text == "memory":
            raise OutOfMemoryError("CUDA: none left")
        self.step = int(text)

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights" and not self.asleep
        note(f"reload {Path(kwargs['weights_path']).name}")
        self._read(kwargs["weights_path"])

    def reset_prefix_cache(self):
        note("reset")

    def sleep(self, level):
        self.asleep = True
        note(f"sleep {level}")

    def wake_up(self):
        self.asleep = False
        note("wake")

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        assert not self.asleep
        step = self.step
        if lora_request is not None:
            assert self.options["enable_lora"]
            step += int((Path(lora_request.path) / "step").read_text())
        return [self._answer(p["prompt_token_ids"], s, step) for p, s in zip(prompts, sampling)]

    def _answer(self, ids, sampling, step):
        if 43 in ids:
            raise ValueError("a token\\nthat is not liked")
        made, last = [], ids[-1]
        while len(made) < sampling.max_tokens:
            last = 4 + (last + step) % 40
            made.append(last)
            if last in getattr(sampling, "stop_token_ids", ()):
                break
        wanted = getattr(sampling, "logprob_token_ids", None)
        score = float("nan") if 42 in ids else -0.5
        steps = [{t: Of(logprob=score) for t in wanted or [token]} for token in made]
        prompt = [None, *({t: Of(logprob=-t / 100)} for t in ids[1:])]
        return Of(outputs=[Of(token_ids=made, logprobs=steps)], prompt_logprobs=prompt)
""",
    "platforms.py": """
import os
from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: os.environ.get("FAKE_GPU") != "1")
""",
    "lora/__init__.py": "",
    "lora/request.py": """
from types import SimpleNamespace


def LoRARequest(name, number, path):
    return SimpleNamespace(name=name, number=number, path=path)
""",
}


def install(folder: Path) -> None:
    """Writes the package into `folder`, for a path that Python searches."""
    for name, text in PACKAGE.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
