"""The process that runs vLLM: it answers each JSON command on its pipe with one JSON message.

Only this module imports vllm. `evaluation.backends.vllm.process` starts it and sets its
environment; its standard input ends when the process that started it does.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from settings.process import begin_child, collect_as_usual

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.lora.request import LoRARequest

# The projections of a block, by vLLM's names. An adapter on lm_head or the embeddings is merged;
# leaving those out also keeps vLLM's CPU kernels for them away from prompt_logprobs, where they
# fail.
_LORA_MODULES = ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
_LORA_MODULES += ["gate_up_proj", "gate_proj", "up_proj", "down_proj"]


class Server:
    """One vLLM engine and the commands that it serves; each public method is a command."""

    def __init__(self) -> None:
        self._llm: LLM
        self._adapter: LoRARequest | None = None
        self._adapters = 0
        self._sleeps = False

    def start(
        self, model: str, kind: str, dtype: str, max_lora_rank: int, sleep: bool, **options: Any
    ) -> int:
        """Loads a model's folder, and returns how many tokens a prompt and its answer may have.

        `kind` is "generate", or "classify" for a sequence classifier; a `max_lora_rank` of 0 makes
        an engine without adapters; only GPUs' memory can be given back in `sleep`. Options are
        further arguments of `vllm.LLM`.
        """
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        self._sleeps = sleep and not on_cpu
        if max_lora_rank:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank}
            options |= {"lora_target_modules": _LORA_MODULES}
        if kind == "classify":
            options |= {"runner": "pooling", "convert": "classify"}
        # Compiling for a CPU takes minutes and a compiler, and isn't worth either here.
        options["enforce_eager"] = options["enforce_eager"] or on_cpu
        self._llm = LLM(
            model=model,
            dtype=dtype,
            seed=0,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_sleep_mode=self._sleeps,
            **options,
        )
        collect_as_usual()
        return self._llm.llm_engine.model_config.max_model_len

    def load(self, model: str) -> None:
        """Puts the weights of another folder of the same shape in place of those served."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        self._llm.reset_prefix_cache()

    def adapt(self, folder: str | None) -> None:
        """Serves an adapter from now on, or none."""
        from vllm.lora.request import LoRARequest

        self._adapter = None
        if folder is not None:
            # A number of its own each time, or vLLM would go on with the one that it has cached.
            self._adapters += 1
            self._adapter = LoRARequest(f"adapter-{self._adapters}", self._adapters, folder)

    def generate(
        self, ids: Sequence[list[int]], limits: Sequence[int], ends: list[int]
    ) -> list[tuple[list[int], bool]]:
        """Greedy token ids of each row up to its limit, and whether all came of finite logits."""
        alike = {"stop_token_ids": ends, "logprobs": 0, "ignore_eos": True}
        outputs = self._run(ids, [{**alike, "max_tokens": limit} for limit in limits])
        return [_checked(output) for output in outputs]

    def logprobs(self, ids: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability of every token but the first; each row has two at least."""
        # The last token is scored as the next one of those before it, since vLLM wants room for a
        # token behind every prompt and a row may fill the context.
        sampling = [
            {"max_tokens": 1, "prompt_logprobs": 0, "logprob_token_ids": [row[-1]]} for row in ids
        ]
        outputs = self._run([row[:-1] for row in ids], sampling)
        return [_scored(output, row) for output, row in zip(outputs, ids, strict=True)]

    def next_logprobs(self, ids: Sequence[list[int]], candidates: list[int]) -> list[list[float]]:
        """Log-probability of each candidate as the next token."""
        sampling = {"max_tokens": 1, "logprob_token_ids": candidates}
        return [
            [_first(output)[token].logprob for token in candidates]
            for output in self._run(ids, [sampling] * len(ids))
        ]

    def classify(self, ids: Sequence[list[int]]) -> list[list[float]]:
        """The classifier's logits of each row."""
        from vllm import PoolingParams

        outputs = self._llm.encode(
            [{"prompt_token_ids": row} for row in ids],
            pooling_params=PoolingParams(use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [output.outputs.data.float().tolist() for output in outputs]

    def rest(self) -> None:
        """Gives the GPU's memory back: the weights move to main memory."""
        if self._sleeps:
            self._llm.sleep(level=1)

    def wake(self) -> bool:
        """Undoes `rest`; returns whether there was anything to undo."""
        if self._sleeps:
            self._llm.wake_up()
        return self._sleeps

    def _run(
        self, ids: Sequence[list[int]], sampling: Sequence[dict[str, Any]]
    ) -> list[RequestOutput]:
        from vllm import SamplingParams

        return self._llm.generate(
            [{"prompt_token_ids": row} for row in ids],
            [SamplingParams(temperature=0.0, detokenize=False, **each) for each in sampling],
            lora_request=self._adapter,
            use_tqdm=False,
        )


def main(descriptor: int) -> None:
    """Serves commands until the pipe is closed, or ends with the process that started this one."""
    begin_child(sys.stdin.buffer.read)
    server = Server()
    with Connection(descriptor) as pipe:
        while True:
            try:
                command = json.loads(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(json.dumps(_reply(server, **command)).encode())


def _reply(server: Server, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": getattr(server, name)(**arguments)}
    except Exception as error:
        traceback.print_exc()
        kind, text = type(error).__name__, str(error)
        memory = kind == "OutOfMemoryError" or "out of memory" in text
        return {"error": f"{kind}: {text}", "memory": memory}


def _checked(output: RequestOutput) -> tuple[list[int], bool]:
    generated = output.outputs[0]
    ids = list(generated.token_ids)
    steps = zip(ids, generated.logprobs or [], strict=True)
    return ids, all(math.isfinite(step[token].logprob) for token, step in steps)


def _scored(output: RequestOutput, row: list[int]) -> list[float]:
    prompt = zip(row[1:-1], (output.prompt_logprobs or [])[1:], strict=True)
    return [
        *(step[token].logprob for token, step in prompt if step),
        _first(output)[row[-1]].logprob,
    ]


def _first(output: RequestOutput) -> Any:
    return (output.outputs[0].logprobs or [])[0]


if __name__ == "__main__":
    main(int(sys.argv[1]))
