"""A library in vLLM's place, so that the worker process runs for real where vLLM isn't installed.

Its model adds a constant to the last token; the constant stands in the folder's file "step".  Its
classifier says what stands in the folder's "logits.json", by token ids.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = {
    "__init__.py": """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace as Of

SamplingParams = PoolingParams = Of
log = Path(os.environ["FAKE_LOG"])


def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")


class Tensor(list):
    def float(self):
        return self

    def tolist(self):
        return list(self)


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
        logits = Path(model) / "logits.json"
        self.logits = json.loads(logits.read_text()) if logits.is_file() else {}

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights" and not self.asleep
        note(f"reload {Path(kwargs['weights_path']).name}")
        if "FAKE_STALE" not in os.environ:
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

    def encode(self, prompts, pooling_params, pooling_task, use_tqdm):
        assert pooling_task == "classify" and not pooling_params.use_activation
        rows = [self.logits[str(list(prompt["prompt_token_ids"]))] for prompt in prompts]
        return [Of(outputs=Of(data=Tensor(row))) for row in rows]

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
from pathlib import Path
from types import SimpleNamespace

device = os.environ.get("FAKE_DEVICE", "cpu")
with Path(os.environ["FAKE_LOG"] + "-platform").open("a") as file:
    file.write(device + "\\n")
if device == "broken":
    raise ImportError("_C.so: undefined symbol")
current_platform = SimpleNamespace(
    device_type="" if device == "none" else device.partition(":")[0],
    is_cpu=lambda: device == "cpu",
    is_cuda_alike=lambda: device.startswith("cuda"),
    device_count=lambda: int(device.partition(":")[2]),
)
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
