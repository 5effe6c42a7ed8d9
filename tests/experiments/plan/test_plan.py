"""The plan: what it foretells is what a run makes; its formulas against torch and PEFT."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelInfo
from hypothesis import given
from hypothesis import strategies as st

from experiments.config.experiment import PROJECT, register_resolvers
from experiments.config.jobs import expand
from experiments.pipeline.cost import ModelSize, Work
from experiments.pipeline.inputs import read_inputs
from experiments.pipeline.pipeline import Pipeline
from experiments.pipeline.steps.base import Step
from experiments.plan.__main__ import main
from experiments.plan.dry_run import DryRun, Entry, Ledger
from experiments.plan.models import Library, fetched_bytes
from experiments.plan.shapes import read_shape
from experiments.plan.sizes import PlannedSizes, model_size
from experiments.plan.totals import Rates, add_up
from experiments.store import StageResult, Store
from modeling.training import LoraSettings, TrainSettings
from tests.experiments.conftest import SHORT, TOY, Command

ORGANISM = PROJECT / "organism" / "weights" / "base"

Planned = dict[str, dict[str, Any]]
REFINE = ("attack@refine=harmful_ft", "refine.n=16", "refine.train.epochs=1")


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Planned]:
    """`python -m experiments.plan ... --json` at toy size: its stages by kind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> Planned:
        file = tmp_path / "plan.json"
        flags = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        code = main([*flags, "--json", str(file), "tracker=none", *TOY, *overrides])
        assert code == 0, capfd.readouterr().err
        return {line["kind"]: line for line in json.loads(file.read_text())["stages"]}

    return call


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-m", "defense=none,reset,nlsr"), id="sweep"),
        pytest.param(
            ("defense=fgsn", "defense.dimensions=[theft,malware,fraud]", *REFINE),
            id="fgsn-steps",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "defense=stack",
                "defense.order=[none,nlsr,safetylock]",
                "+defense.settings.safetylock.form=hooked",
                "model.alignment=own",
                "align.n_sft=16",
                "+defense.settings.nlsr.take_available=true",
                "align.n_pairs=16",
                "refine.adapter=fresh",
                *REFINE,
            ),
            id="stack-refined",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (
                "-m",
                "defense=wanda_prune,antidote,fgsn",
                "attack.adapter=resume,full",
                "evaluation.attack_prompts=[prefill]",
            ),
            id="answers-and-full-weights",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_foretells_the_stages_that_a_run_then_makes(
    command: Command, plan: Callable[..., Planned], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    store = tmp_path / "store"
    line = (*SHORT, *arguments, f"store.root={store}")
    planned = plan(*line)
    assert all(kind["reused"] == 0 for kind in planned.values())
    assert not store.exists()
    run = command(*line)
    made = Counter(entry.name for entry in Store(store).entries())
    assert {name: kind["to_run"] for name, kind in planned.items()} == dict(made), run.err

    again = plan(*line)
    assert all(kind["to_run"] == 0 for kind in again.values())
    assert sum(kind["disk_bytes"] for kind in again.values()) == 0
    assert again["attack"]["measured_tokens_per_second"] > 0


def test_a_judge_that_writes_is_counted_with_its_question_and_its_reply(
    plan: Callable[..., Planned],
) -> None:
    adapter = ORGANISM.parent / "aligned"
    judge = ("evaluation.judges=[rubric_local]", f"+judges.rubric_local.model={adapter}")
    plain = plan("store.root=/nowhere")["judge"]
    asked = plan("store.root=/nowhere", *judge, "+judges.rubric_local.max_tokens=64")["judge"]
    rows = 4 * 12
    assert asked["rows"] == plain["rows"] + rows
    assert asked["answer_tokens"] == plain["answer_tokens"] + 64 * rows
    # The instruction around each pair, besides what the classifier reads too.
    more = asked["prompt_tokens"] - plain["prompt_tokens"]
    assert more > rows * 300


def test_every_step_keeps_its_key_on_the_way_to_a_child_process(tmp_path: Path) -> None:
    class Pickling(DryRun):
        def __call__(self, step: Step, following: Sequence[Step] = ()) -> StageResult:
            copy = pickle.loads(pickle.dumps(step))
            seen.add(type(step))
            assert copy.stage == step.stage
            return super().__call__(copy)

    register_resolvers()
    seen: set[type[Step]] = set()
    ledger = Ledger(PlannedSizes(Library(tmp_path / "scratch")))
    line = ["defense=fgsn", "model.alignment=own", "refine.adapter=fresh", *REFINE, *TOY]
    (job,) = expand([*line, f"store.root={tmp_path / 'store'}"], multirun=False)
    base, published = ledger.sizes.library.find_models(job.model)
    runner = Pickling(Store(job.store), ledger)
    pipeline = Pipeline(job, read_inputs(job), base, published, runner)
    pipeline.measure(pipeline.train().models)
    assert {step.__name__ for step in seen} == {
        "Align", "Merge", "RunAttack", "Prepare", "Apply",
        "Generate", "Likelihood", "JudgeAnswers", "ScoreAnswers",
    }  # fmt: skip


def test_a_papers_grid_is_counted(plan: Callable[..., Planned]) -> None:
    line = ("experiment=nlsr_table1", "+scale=toy", "store.root=/nowhere")
    two = "attack.poison_ratio=0.05,0.3"
    counted = {kind: each["to_run"] for kind, each in plan(*line, two).items()}
    assert (counted["attack"], counted["apply"]) == (2, 6)
    assert counted["prepare"] == 3
    fewer = plan(*line, "attack.poison_ratio=0.05", "defense=reset,none")
    assert fewer["prepare"]["to_run"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        ("defense=nslr",),
        ("attack.poison_ratio=1.5",),
        ("-m", "defense.sparsity=2"),
        ("attack.n=4800000",),
        ("attack.adapter=fresh", "attack.lora.target_modules=[w_proj]", "defense=none"),
        ("model.base=no/such/model",),
        ("evaluation.harm_judge.model=/nowhere",),
    ],
)
def test_what_a_run_refuses_the_plan_refuses_in_the_same_sentence(
    command: Command, capfd: pytest.CaptureFixture[str], wrong: tuple[str, ...]
) -> None:
    run = command(*[part for part in wrong if part != "-m"])
    assert run.code == 1
    assert main(["tracker=none", *TOY, *wrong]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    if wrong[0] != "model.base=no/such/model":
        assert said == run.err


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """The organism's folder without its weights."""
    folder = tmp_path / "shell"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (ORGANISM / name).is_file():
            shutil.copy(ORGANISM / name, folder)
    return folder


def test_a_folder_with_only_a_config_is_enough(
    plan: Callable[..., Planned], shell: Path, tmp_path: Path
) -> None:
    line = ("defense=nlsr", "model.alignment=own", f"store.root={tmp_path / 'store'}")
    whole, bare = plan(*line), plan(*line, f"model.base={shell}")
    assert bare == whole
    (shell / "tokenizer.json").unlink()
    guessed = plan(*line, f"model.base={shell}")
    assert guessed["generate"]["answer_tokens"] == whole["generate"]["answer_tokens"]
    assert 0.5 < guessed["attack"]["prompt_tokens"] / whole["attack"]["prompt_tokens"] < 2


def test_checks_of_headers_are_made_without_weights(
    shell: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = (f"model.base={shell}", "model.alignment=own", "tracker=none", *TOY)
    assert main([*line, "align.lora.target_modules=[w_proj]"]) == 1
    said = capfd.readouterr().err
    assert f"w_proj is no projection of {str(shell)!r}; choose from down_proj" in said
    assert main([*line, "defense=safetylock", "defense.k=4000"]) == 1
    assert "defense.k=4000 is more than the model's" in capfd.readouterr().err


def test_without_a_config_it_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["model.base=nobody/nothing", "tracker=none", *TOY]) == 1
    assert "set model.base to a folder that holds the model's config.json" in capfd.readouterr().err


SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64}
ROWS, LENGTH = 2, 16


def tiny(folder: Path, dtype: str, *, lora: bool, layers: int = 2) -> tuple[Any, ModelSize]:
    """A small Llama, a real one and as a plan sees it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    LlamaConfig(**SIZES, num_hidden_layers=layers).save_pretrained(folder)
    shape = read_shape(folder)
    config = LlamaConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    if not lora:
        return model.train(), model_size(shape, dtype, None)
    from peft import get_peft_model

    settings = LoraSettings(rank=2)
    adapted = get_peft_model(model, settings.config())
    return adapted.train(), model_size(shape, dtype, settings)


def kept_bytes(model: Any) -> int:
    """Bytes that autograd keeps of a forward pass, besides the parameters."""
    import torch

    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # Held, so that no other takes its place.
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


TRAINING = TrainSettings(learning_rate=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_weights_gradients_and_moments_are_what_adamw_holds(tmp_path: Path, lora: bool) -> None:
    import torch

    model, planned = tiny(tmp_path, "bfloat16", lora=lora)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(each.grad for each in trained)]
    held += [value for state in optimizer.state.values() for value in state.values()]
    real = sum(tensor.nbytes for tensor in held)
    # Rows without a token keep no activations.
    assert planned.training([0], TRAINING).memory == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [True, False])
def test_activations_are_near_what_autograd_keeps(tmp_path: Path, dtype: str, lora: bool) -> None:
    model, planned = tiny(tmp_path, dtype, lora=lora, layers=6)
    planned_bytes = planned.activation_bytes(ROWS * LENGTH, checkpointing=False)
    assert 0.5 < planned_bytes / kept_bytes(model) < 2


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(tmp_path: Path) -> None:
    _, model = tiny(tmp_path, "bfloat16", lora=True)
    once = model.training([LENGTH] * 8, TRAINING)
    small = TRAINING.model_copy(update={"micro_batch_size": 2})
    again = small.model_copy(update={"gradient_checkpointing": True})
    sizes = [once, model.training([LENGTH] * 8, small), model.training([LENGTH] * 8, again)]
    assert sizes[0].memory > sizes[1].memory > sizes[2].memory > model.bytes
    assert sizes[2].operations == 1.5 * once.operations
    assert {size.prompt_tokens for size in sizes} == {8 * LENGTH}


def test_the_cache_and_the_parameters_are_the_real_ones(tmp_path: Path) -> None:
    import torch

    model, planned = tiny(tmp_path, "bfloat16", lora=True)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert planned.cache_bytes(ROWS * LENGTH) == held
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert planned.lora_parameters == trained
    whole = sum(each.numel() for each in model.parameters())
    assert planned.parameters + planned.lora_parameters == whole


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_arithmetic_is_near_what_torch_counts(tmp_path: Path, lora: bool, trained: bool) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, planned = tiny(tmp_path, "float32", lora=lora, layers=6)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
        if trained:
            loss.backward()
    lengths = [LENGTH] * ROWS
    work = planned.training(lengths, TRAINING) if trained else planned.forward(lengths)
    assert work.operations == pytest.approx(counter.get_total_flops(), rel=0.1)


@given(
    rows=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    batch=st.integers(1, 16),
    answer=st.integers(1, 64),
)
def test_a_faster_machine_never_takes_longer_and_a_longer_answer_never_less(
    rows: list[int], batch: int, answer: int
) -> None:
    model, slow, fast = ModelSize(10**6, 4, 2, 64, 32), Rates(1, 0.1), Rates(2, 0.2)
    work, more = (model.generation(rows, length, batch) for length in (answer, answer + 1))
    assert fast.seconds(work) < slow.seconds(work) < slow.seconds(more)
    assert work.memory < more.memory


def test_hours_go_by_what_finished_stages_have_reached(tmp_path: Path) -> None:
    ahead, rates = Work(rows=3, prompt_tokens=300, operations=1e15), Rates(tflops=1)
    ledger = Ledger(PlannedSizes(Library(tmp_path)))
    ledger.entries["ahead"] = Entry("attack", ahead, reused=False, seconds=0.0)
    assert add_up(ledger, rates).hours == pytest.approx(1000 / 3600)
    ledger.entries["finished"] = Entry("attack", Work(prompt_tokens=50), reused=True, seconds=5.0)
    (kind,) = add_up(ledger, rates).kinds
    assert kind.measured_tokens_per_second == 10
    assert kind.hours == pytest.approx(30 / 3600)
    # Where a kind reads no tokens, its stages take as long as those before.
    ledger.entries["merged"] = Entry("merge", Work(), reused=True, seconds=7.0)
    ledger.entries["to merge"] = Entry("merge", Work(), reused=False, seconds=0.0)
    assert add_up(ledger, rates).hours == pytest.approx(37 / 3600)


def test_second_copies_of_weights_are_not_fetched() -> None:
    sizes = {
        "config.json": 1,
        "model-00001-of-00001.safetensors": 10,
        "consolidated.safetensors": 100,
        "original/params.json": 1000,
        "README.md": 10_000,
    }
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    assert fetched_bytes(ModelInfo(id="maker/model", siblings=siblings)) == 11
