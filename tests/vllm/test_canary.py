"""What a real vLLM serves without a word in place of the model, and the canary that tells."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.backends.canary import verify
from evaluation.backends.vllm.process import Worker
from evaluation.token_engine import Answer
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.export import export_with_biases
from modeling.loading import load_tokenizer
from settings import ModelError
from tests.vllm.conftest import ALIGNED, BACKEND, BASE, rewritten, save_classifier

if TYPE_CHECKING:
    from evaluation.backends.vllm.worker import Server

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The base with biases on two o_proj, in the one form that vLLM serves right."""
    folder = tmp_path_factory.mktemp("baked")
    torch.manual_seed(0)
    export_with_biases(BASE, {layer: 0.2 * torch.randn(192) for layer in (1, 4)}, folder)
    return Checkpoint(str(folder))


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(ModelError) as caught:
        BACKEND.open(checkpoint, PromptStyle(), BASE)
    return str(caught.value)


def only_o_biases(folder: Path) -> Path:
    path = folder / "model.safetensors"
    kept = {
        name: value
        for name, value in load_file(path).items()
        if not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
    }
    save_file(kept, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_what_is_served_right_passes(baked: Checkpoint, dtype: str) -> None:
    served = replace(baked, dtype=dtype)
    engine = BACKEND.open(served, PromptStyle(), replace(BASE, dtype=dtype))
    with pytest.raises(ModelError, match=r"has -?0\.0\d of the edit|log-probabilities differ"):
        verify(engine, replace(ALIGNED, dtype=dtype), replace(BASE, dtype=dtype))
    engine.close()


def test_a_reload_that_did_not_happen_is_seen(baked: Checkpoint) -> None:
    engine = BACKEND.open(BASE, PromptStyle())
    with pytest.raises(ModelError, match=r"has -?0\.00 of the edit"):
        verify(engine, baked, BASE)
    with pytest.raises(ModelError, match="weights or the adapter of another model"):
        verify(engine, baked)
    engine.close()


def test_an_adapter_that_is_not_applied_is_seen() -> None:
    engine = BACKEND.open(BASE, PromptStyle())
    with pytest.raises(ModelError, match=r"has -?0\.00 of the edit"):
        verify(engine, ALIGNED, BASE)
    engine.close()


def test_biases_that_vllm_would_drop_are_refused_before(baked: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(baked.base, tmp_path / "dropped"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    said = refusal(Checkpoint(str(only_o_biases(folder))))
    assert re.search(r"o_proj\.bias.*, which its config\.json doesn't provide for", said)


def test_missing_biases_are_refused_before(baked: Checkpoint, tmp_path: Path) -> None:
    """vLLM would take what lay in that memory before."""
    folder = Path(shutil.copytree(baked.base, tmp_path / "missing"))
    said = refusal(Checkpoint(str(only_o_biases(folder))))
    assert "lacks trained weights for" in said


def test_a_prefix_cache_that_outlived_its_model_is_seen(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, value in weights.items():
            if "k_proj" in name or "v_proj" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))

    other = rewritten(tmp_path, change)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        stale, fresh = pool.submit(reloaded, BASE, other).result()
    assert "next tokens are off" in stale
    assert "prefix cache of another model" in stale
    assert not fresh


def reloaded(before: Checkpoint, after: Checkpoint) -> tuple[str, str]:
    """What the canary says of new weights under the old prefix cache, and under an empty one."""
    import os

    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from evaluation.backends.vllm.worker import Server

    server = Server()
    options = {"max_model_len": 256, "enforce_eager": True}
    server.start(before.base, "generate", before.dtype, 0, False, **options)
    engine = InProcess(server)
    verify(engine, before)
    server._llm.collective_rpc("reload_weights", kwargs={"weights_path": after.base})
    said = []
    for _ in range(2):
        try:
            verify(engine, after)
            said.append("")
        except ModelError as error:
            said.append(str(error))
        server._llm.reset_prefix_cache()
    return said[0], said[1]


def test_a_classifier_that_was_not_reloaded_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = (save_classifier(tmp_path / str(seed), seed) for seed in (0, 1))
    BACKEND.classifier(right, "float32").close()
    ask = Worker.ask

    def forgetful(worker: Worker, name: str, **arguments: Any) -> Any:
        return None if name == "load" else ask(worker, name, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "ask", forgetful)
        with pytest.raises(ModelError, match="weights of another classifier"):
            BACKEND.classifier(wrong, "float32")
    BACKEND.classifier(wrong, "float32").close()
    # Reloaded for real.
    BACKEND.classifier(right, "float32").close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_classifier_that_is_served_right_passes(tmp_path: Path, dtype: str) -> None:
    BACKEND.classifier(save_classifier(tmp_path, 0), dtype).close()


class InProcess:
    """A server as an engine, without the process between the two."""

    def __init__(self, server: Server) -> None:
        self.tokenizer = load_tokenizer(BASE)
        self.context, self.usable = 256, True
        self._server = server

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._server.logprobs([list(row) for row in ids])

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        return self._server.next_logprobs([list(row) for row in ids], list(candidates))

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        made = self._server.generate([list(row) for row in ids], [max_new_tokens] * len(ids), [2])
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row, _ in made]
        return [Answer(text, len(row), False) for text, (row, _) in zip(texts, made, strict=True)]
