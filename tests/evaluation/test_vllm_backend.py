"""Worker processes, warm engines and the choice of a backend, with a stand-in for vLLM itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from evaluation.backends import canary
from evaluation.backends.auto import AutoBackend
from evaluation.backends.expected import classifier_texts, expected_probabilities
from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import VLLMBackend, process
from evaluation.backends.vllm import engine as engines
from evaluation.backends.vllm.engine import VLLMClassifier, VLLMEngine
from evaluation.backends.vllm.process import Worker
from evaluation.backends.vllm.weights import ServedWeights, lora_rank, shape
from evaluation.token_engine import Answer
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError, build
from tests.evaluation.conftest import WORDS, make_tokenizer, tiny_config
from tests.evaluation.fake_vllm import install

ROOT = Path(__file__).parents[2]
passed: list[tuple[Any, ...]] = []


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Installs the stand-in; yields the file in which it notes what happens to it."""
    install(tmp_path / "site")
    path = tmp_path / "log"
    path.touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_LOG", str(path))
    # The stand-in computes nothing that a canary could recognise.
    passed.clear()
    monkeypatch.setattr(canary, "verify", lambda engine, *asked: passed.append(asked))
    process.obstacle.cache_clear()
    yield path
    engines.shutdown()
    process.obstacle.cache_clear()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tokenizer = make_tokenizer(["user", "system", "assistant", ":", *WORDS])
    LlamaForCausalLM(tiny_config(len(tokenizer), head_dim=32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model that adds 1."""
    return model(original, tmp_path / "one", "1")


def model(source: Path, out: Path, step: str, **config: object) -> Path:
    shutil.copytree(source, out)
    (out / "step").write_text(step)
    stated = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stated, **config}))
    return out


def opened(folder: Path, adapter: Path | None = None, **settings: Any) -> VLLMEngine:
    checkpoint = Checkpoint(str(folder), None if adapter is None else str(adapter))
    return VLLMBackend(**settings).open(checkpoint, PromptStyle())


def said(engine: VLLMEngine, tokens: int = 3) -> list[int]:
    """What follows token 10: 15, 20, 25 for a model that adds 1."""
    (answer,) = engine.complete([[1, 10]], tokens)
    return list(engine.tokenizer(answer.text, add_special_tokens=False)["input_ids"])


def pid(engine: VLLMEngine) -> int:
    assert engine._running is not None
    return engine._running.worker.pid


def is_gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or does so soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_prompts_become_answers(folder: Path) -> None:
    engine = opened(folder)
    words = engine.tokenizer.convert_ids_to_tokens
    # "assistant :" is 6 7: the model goes on from 7 with 12, 17, 22; from the start's 20 with 25.
    plain, begun = engine.generate(["w1", "w2"], 3, starts=["", words(20)])
    assert plain == Answer(" ".join(words([12, 17, 22])), 3, True)
    assert begun == Answer(" ".join(words([20, 25, 30, 35])), 3, True)
    assert engine.generate([], 3) == []


def test_an_end_token_ends_the_answer(original: Path, tmp_path: Path) -> None:
    folder = model(original, tmp_path / "ends", "1")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [20]}))
    engine = opened(folder)
    assert engine.complete([[1, 10]], 9) == [Answer(engine.tokenizer.decode([15]), 2, False)]


def test_scores(folder: Path) -> None:
    engine = opened(folder)
    assert engine.logprobs([[1, 8, 9, 10], [5], [5, 6]]) == [[-0.08, -0.09, -0.5], [], [-0.5]]
    assert engine.next_logprobs([[1], [2]], [7, 8]) == [[-0.5, -0.5]] * 2


def test_what_is_not_finite_is_no_answer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = opened(folder).complete([[1, 42], [1, 10]], 3)
    assert broken == Answer("", 0, False)
    assert whole.tokens == 3
    assert "1 of 2 answers" in caplog.text


def test_what_does_not_fit_is_refused_before_it_is_sent(folder: Path) -> None:
    engine = opened(folder)
    with pytest.raises(ModelError, match="context holds 64"):
        engine.complete([[1] * 62], 3)


def test_the_next_checkpoint_of_a_shape_goes_into_the_warm_engine(
    folder: Path, tmp_path: Path, log: Path
) -> None:
    other = model(folder, tmp_path / "two", "2", dtype="bfloat16", eos_token_id=9)
    first = opened(folder)
    before, process = said(first), pid(first)
    first.close()
    second = opened(other)
    assert said(second) == [16, 22, 28] != before
    assert pid(second) == process
    second.close()
    assert said(opened(folder)) == before
    wanted = ["start one -1 True", "reload two", "reset", "reload one", "reset"]
    assert log.read_text().splitlines() == wanted


def test_weights_that_are_written_anew_are_read_anew(folder: Path) -> None:
    first = opened(folder)
    said(first)
    first.close()
    (folder / "step").write_text("3")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert said(opened(folder)) == [17, 24, 31]


def test_the_same_weights_are_neither_loaded_nor_verified_twice(folder: Path, log: Path) -> None:
    for _ in range(3):
        opened(folder).close()
    assert log.read_text().splitlines() == ["start one -1 True"]
    assert passed == [(Checkpoint(str(folder)), None)]


def test_another_shape_is_another_engine(folder: Path, tmp_path: Path) -> None:
    other = model(folder, tmp_path / "eps", "2", rms_norm_eps=1e-3)
    first = opened(folder)
    process = pid(first)
    first.close()
    assert pid(opened(other)) != process
    assert pid(opened(folder)) == process


def test_the_engine_that_has_rested_longest_makes_room(folder: Path, tmp_path: Path) -> None:
    others = [model(folder, tmp_path / f"eps{i}", "1", rms_norm_eps=i / 100) for i in (1, 2)]
    processes = []
    for each in (folder, *others):
        engine = opened(each, keep=2)
        processes.append(pid(engine))
        engine.close()
    assert is_gone(processes[0])
    assert pid(opened(others[1], keep=2)) == processes[2]
    assert pid(opened(others[0], keep=2)) == processes[1]


def test_nothing_rests_where_none_is_kept(folder: Path) -> None:
    engine = opened(folder, keep=0)
    process = pid(engine)
    engine.close()
    assert is_gone(process)
    with pytest.raises(ModelError, match="closed; open the model again"):
        said(engine)


def test_an_engine_in_use_is_nobody_elses(folder: Path, tmp_path: Path) -> None:
    first, second = opened(folder), opened(model(folder, tmp_path / "two", "2"))
    assert pid(first) != pid(second)
    assert said(first) == [15, 20, 25]
    assert said(second) == [16, 22, 28]


def test_a_gpus_memory_is_given_back_at_rest(
    folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DEVICE", "cuda:1")
    opened(folder, max_model_len=200).close()
    assert said(opened(folder, max_model_len=200)) == [15, 20, 25]
    # No longer than the model itself goes.
    assert log.read_text().splitlines() == ["start one 128 False", "sleep 1", "wake"]
    # What was moved between memories is verified again.
    assert len(passed) == 2


def adapter_folder(source: Path, out: Path, step: str = "1", **settings: Any) -> Path:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(out)
    (out / "step").write_text(step)
    return out


def test_adapters_of_a_base_share_an_engine(folder: Path, tmp_path: Path, log: Path) -> None:
    adapters = [adapter_folder(folder, tmp_path / step, step, r=int(step)) for step in ("2", "4")]
    first = opened(folder, adapters[0])
    process = pid(first)
    assert said(first) == [17, 24, 31]
    first.close()
    second = opened(folder, adapters[1])
    assert pid(second) == process
    assert said(second) == [19, 28, 37]
    second.close()
    for adapter in (adapters[1], adapters[0]):
        third = opened(folder, adapter)
        assert said(third) == ([19, 28, 37] if adapter == adapters[1] else [17, 24, 31])
        third.close()
    assert log.read_text().splitlines() == ["start one -1 True"]
    # Not again where it is in the engine still, but wherever it was put there.
    assert [checkpoint.adapter for checkpoint, _ in passed] == [
        str(adapters[index]) for index in (0, 1, 0)
    ]


def test_an_adapter_that_is_written_anew_is_read_anew(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(folder, tmp_path / "adapter", "2")
    opened(folder, adapter).close()
    (adapter / "step").write_text("4")
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    assert said(opened(folder, adapter)) == [19, 28, 37]
    assert len(passed) == 2


def test_an_engine_with_room_for_an_adapter_serves_what_needs_less(
    folder: Path, tmp_path: Path, log: Path
) -> None:
    large, small = (adapter_folder(folder, tmp_path / f"r{r}", "2", r=r) for r in (9, 4))
    other = model(folder, tmp_path / "two", "2")
    processes = []
    for base, adapter in ((folder, large), (folder, None), (other, None), (folder, small)):
        engine = opened(base, adapter)
        processes.append(pid(engine))
        assert said(engine, 1) == [{"one": 15, "two": 16}[base.name] + (2 if adapter else 0)]
        engine.close()
    assert len(set(processes)) == 1
    assert len(passed) == 4


def test_an_engine_without_room_for_an_adapter_is_not_given_one(
    folder: Path, tmp_path: Path
) -> None:
    adapters = [adapter_folder(folder, tmp_path / str(rank), r=rank) for rank in (4, 9)]
    engines = []
    for adapter in (None, *adapters):
        engine = opened(folder, adapter, keep=3)
        engines.append(pid(engine))
        engine.close()
    assert len(set(engines)) == 3


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"r": 1}, 1),
        ({"r": 9}, 16),
        ({"r": 4, "rank_pattern": {"q_proj": 20}}, 32),
        ({"use_dora": True}, None),
        ({"bias": "all"}, None),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"target_modules": ["lm_head"]}, None),
    ],
)
def test_adapters_that_vllm_serves(
    original: Path, tmp_path: Path, settings: dict[str, Any], rank: int | None
) -> None:
    adapter = adapter_folder(original, tmp_path / "adapter", **settings)
    assert lora_rank(Checkpoint(str(original), str(adapter))) == rank
    assert lora_rank(Checkpoint(str(original))) == 0


def test_an_adapter_that_vllm_does_not_serve_is_merged_for_as_long_as_it_loads(
    original: Path, tmp_path: Path
) -> None:
    from evaluation.backends.vllm.weights import served

    adapter = adapter_folder(original, tmp_path / "adapter", use_dora=True, init_lora_weights=False)
    checkpoint = Checkpoint(str(original), str(adapter))
    ids = torch.tensor([[1, 10, 11]])
    with served(checkpoint) as what:
        assert (what.adapter, what.rank) == (None, 0)
        merged = AutoModelForCausalLM.from_pretrained(what.folder)(ids).logits
        assert shape(what.folder) == shape(original)
    from modeling.loading import load_model

    assert torch.allclose(merged, load_model(checkpoint)(ids).logits, atol=1e-4)
    assert not what.folder.exists()


def test_an_engine_that_fails_its_canary_is_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def refuse(engine: VLLMEngine, *_: object) -> None:
        seen.append(pid(engine))
        raise ModelError("not the model")

    monkeypatch.setattr(canary, "verify", refuse)
    with pytest.raises(ModelError, match="not the model"):
        opened(folder)
    assert is_gone(seen[0])


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape, with what the stand-in says of the canary's texts in their place."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"classifier{seed}")
        tokenizer = make_tokenizer(["The", "the", "a", "and", "for", *WORDS])
        torch.manual_seed(seed)
        config = tiny_config(len(tokenizer), head_dim=32, num_labels=3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "step").write_text("1")
        texts = classifier_texts(tokenizer, 64)
        scores = (
            torch.tensor(expected_probabilities(Checkpoint(str(folder)), texts)).logit().tolist()
        )
        rows = {str(list(text)): row for text, row in zip(texts, scores, strict=True)}
        (folder / "logits.json").write_text(json.dumps(rows))
        folders.append(folder)
    return folders


def classifying(folder: Path) -> VLLMClassifier:
    return VLLMBackend().classifier(str(folder), "float32")


def test_a_classifier_is_verified_whenever_it_is_loaded(
    classifiers: list[Path], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = classifying(classifiers[0])
    texts = classifier_texts(first.tokenizer, first.context)
    wanted = expected_probabilities(Checkpoint(str(classifiers[0])), texts)
    for row, line in zip(first.probabilities(texts), wanted, strict=True):
        assert row == pytest.approx(line)
    assert first.usable
    first.close()
    assert not first.usable
    classifying(classifiers[1]).close()
    asked: list[str] = []
    monkeypatch.setattr(canary, "verify_classifier", lambda _, model, __: asked.append(model.base))
    classifying(classifiers[1]).close()
    assert not asked
    classifying(classifiers[0]).close()
    assert asked == [str(classifiers[0])]
    names = [folder.name for folder in classifiers]
    assert [line for line in log.read_text().splitlines() if line != "reset"] == [
        f"start {names[0]} -1 True", f"reload {names[1]}", f"reload {names[0]}",
    ]  # fmt: skip


def test_a_classifier_that_was_not_reloaded_is_refused_and_its_engine_ended(
    classifiers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STALE", "1")
    classifying(classifiers[0]).close()
    with pytest.raises(ModelError, match=r"scores differ by .* weights of another classifier"):
        classifying(classifiers[1])
    assert not engines._running
    classifying(classifiers[1]).close()


@pytest.mark.parametrize(("spoilt", "kind"), [("NaN", "NaN"), ("-Infinity", "differ by")])
def test_a_classifier_of_no_finite_scores_is_refused(
    classifiers: list[Path], tmp_path: Path, spoilt: str, kind: str
) -> None:
    folder = Path(shutil.copytree(classifiers[0], tmp_path / "spoilt"))
    rows = json.loads((folder / "logits.json").read_text())
    next(iter(rows.values()))[1] = float(spoilt)
    (folder / "logits.json").write_text(json.dumps(rows))
    with pytest.raises(ModelError, match=kind):
        classifying(folder)
    assert not engines._running


def test_the_reference_model_reaches_the_canary(folder: Path, tmp_path: Path) -> None:
    first, second = Checkpoint(str(folder)), Checkpoint(str(tmp_path))
    for reference in (None, second, second):
        VLLMBackend().open(first, PromptStyle(), reference).close()
    assert passed == [(first, None), (first, second)]


def test_an_error_of_vllms_is_one_line_and_ends_the_engine(folder: Path) -> None:
    engine = opened(folder)
    process = pid(engine)
    with pytest.raises(ModelError) as caught:
        engine.complete([[1, 43]], 3)
    assert str(caught.value) == "vLLM failed at generate: ValueError: a token that is not liked"
    assert is_gone(process)
    assert not engine.usable
    assert not engines._running
    engine.close()
    assert said(opened(folder)) == [15, 20, 25]


def test_a_killed_process_is_a_sentence(folder: Path) -> None:
    engine = opened(folder)
    process = pid(engine)
    assert engine.usable
    os.kill(process, signal.SIGKILL)
    # Not `is_gone`: a process of several threads shows as a zombie before its parent can reap it.
    end = time.monotonic() + 10
    while engine.usable and time.monotonic() < end:
        time.sleep(0.05)
    assert not engine.usable
    with pytest.raises(ModelError, match=r"was killed \(signal 9\), most often for want of memory"):
        said(engine)
    assert not engines._running
    engine.close()
    assert not engines._resting


def test_an_engine_killed_at_rest_is_replaced(folder: Path, tmp_path: Path) -> None:
    first = opened(folder)
    process = pid(first)
    first.close()
    os.kill(process, signal.SIGKILL)
    assert said(opened(model(folder, tmp_path / "two", "2"))) == [16, 22, 28]


@pytest.mark.parametrize(
    ("step", "seconds", "message"),
    [
        ("crash", 60, "ended with status 3: .*the disk is on fire"),
        ("memory", 60, "out of memory; lower gpu_memory_utilization"),
        ("slow", 1, "took more than 1 s to start; set start_seconds"),
    ],
)
def test_an_engine_that_does_not_start(
    original: Path, tmp_path: Path, step: str, seconds: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(model(original, tmp_path / "bad", step), start_seconds=seconds)
    assert not engines._running


def test_a_reload_that_fails_costs_a_new_engine(folder: Path, tmp_path: Path, log: Path) -> None:
    other = model(folder, tmp_path / "bad", "memory")
    opened(folder).close()
    with pytest.raises(ModelError, match="out of memory"):
        opened(other)
    assert log.read_text().splitlines() == ["start one -1 True", "reload bad"]
    (other / "step").write_text("2")
    assert said(opened(other)) == [16, 22, 28]


def test_a_worker_does_not_outlive_its_parent(folder: Path) -> None:
    script = (
        "import sys, time; from evaluation.backends.vllm.process import Worker\n"
        "worker = Worker({}); print(worker.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=-1, env=environment)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert is_gone(worker)


def test_a_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation.backends.vllm.process import child_environment

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in child_environment({})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert child_environment({})["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    given = child_environment({"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert given["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert given["HF_HUB_OFFLINE"] == "1"


def test_check_refuses_what_vllm_cannot_serve(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = VLLMBackend()
    backend.check(Checkpoint(str(folder)))
    backend.check(Checkpoint("somebody/something-not-here"))
    with pytest.raises(ModelError, match=r"defense\.form=baked"):
        backend.check(Checkpoint(str(folder), steering="vectors"))
    narrow = Checkpoint(str(model(folder, tmp_path / "narrow", "1", head_dim=16)))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ModelError, match="heads of size 16, and on a CPU vLLM has 32, 64"):
        backend.check(narrow)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    backend.check(narrow)
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    process.obstacle.cache_clear()
    with pytest.raises(SettingError, match=r"which isn't installed; .*pip install -e '\.\[vllm\]'"):
        backend.check(Checkpoint(str(folder)))


def test_identity_leaves_out_what_changes_no_answers() -> None:
    backend = VLLMBackend()
    assert backend.identity() == VLLMBackend(keep=0, gpu_memory_utilization=0.5).identity()
    assert backend.identity() != VLLMBackend(batch_invariant=True).identity()
    assert backend.own_process


def test_auto_takes_vllm_where_it_can(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    auto = AutoBackend()
    unknown = model(folder, tmp_path / "unknown", "1", architectures=["OddForCausalLM"])
    narrow = model(folder, tmp_path / "narrow", "1", head_dim=16)
    assert auto.chosen(Checkpoint(str(folder))) is auto.vllm
    for other in (Checkpoint(str(unknown)), Checkpoint(str(narrow))):
        assert auto.chosen(other) is auto.transformers
        auto.check(other)
    assert auto.chosen(Checkpoint(str(folder), steering="vectors")) is auto.transformers
    engine = auto.open(Checkpoint(str(folder)), PromptStyle())
    assert isinstance(engine, VLLMEngine)
    with_vllm = auto.identity()
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    process.obstacle.cache_clear()
    assert auto.chosen(Checkpoint(str(folder))) is auto.transformers
    assert auto.identity() != with_vllm


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("broken", r"is installed but doesn't run here \(ImportError: _C.so: undefined symbol\)"),
        ("none", r"is installed but doesn't run here \(it finds no device that it was built for\)"),
        ("cuda:0", "it finds no device that it was built for"),
    ],
)
def test_a_vllm_that_does_not_run_here_is_not_taken(
    folder: Path, log: Path, monkeypatch: pytest.MonkeyPatch, device: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_DEVICE", device)
    auto, checkpoint = AutoBackend(), Checkpoint(str(folder))
    assert auto.chosen(checkpoint) is auto.transformers
    assert "vllm" not in auto.identity()
    with pytest.raises(SettingError, match=f"needs vLLM, which .*{reason}"):
        VLLMBackend().check(checkpoint)
    # Asked once.
    assert Path(f"{log}-platform").read_text().splitlines() == [device]


def test_the_options_of_the_configuration_are_those_of_the_classes() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        nodes = [
            OmegaConf.to_container(compose("config", [f"+backend@wanted={name}"]).wanted)
            for name in ("vllm", "auto")
        ]
    assert [build(node, "evaluation.backend") for node in nodes] == [
        VLLMBackend(),
        AutoBackend(vllm=VLLMBackend(), transformers=TransformersBackend()),
    ]
    with pytest.raises(SettingError, match=r"evaluation.backend.vllm.keep=-1 is not allowed"):
        build({**nodes[1], "vllm": {**nodes[0], "keep": -1}}, "evaluation.backend")


def test_a_served_folders_stamp_is_of_its_weights(folder: Path) -> None:
    assert ServedWeights(folder).stamp == ServedWeights(folder).stamp
    before = ServedWeights(folder).stamp
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert ServedWeights(folder).stamp != before


def test_an_ended_worker_says_so() -> None:
    worker = Worker({})
    assert worker.is_alive
    worker.end()
    worker.end()
    assert not worker.is_alive
    with pytest.raises(ModelError, match="closed"):
        worker.ask("rest")
