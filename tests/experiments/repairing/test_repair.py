"""`python -m experiments.repair`: every defense on models that are there, without an experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments.repair import main
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.model_files import is_adapter
from modeling.steering import Steering, steer
from tests.defenses.published_lock import save_published
from tests.defenses.tiny_lora_models import number_pairs, number_prompts, save_base
from tests.defenses.victims import plain_logits, shared_case

Run = Callable[..., tuple[int, str, str]]

JUDGE = "judge@evaluation.harm_judge=keyword"
LOCK = ("n_pairs=12", "last_tokens=3", "k=4", "alpha=5.0", "stability_seeds=1")
# What makes each defense quick, and the kinds of fine-tunes that it repairs.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nlsr": (("method=random", JUDGE), ("resumed/lora",)),
    "safetylock": (LOCK, ("resumed/lora", "full/lora")),
    "fgsn": (("layers=[0.0,1.0]",), ("resumed/lora", "full/full")),
    "safelora": (("tau=1.0",), ("fresh/lora", "full/full")),
    "resta": ((), ("resumed/lora", "full/lora")),
    "wanda_prune": (("positions=prompt", JUDGE), ("full/lora",)),
    "antidote": ((), ("fresh/full",)),
    "reset": ((), ("resumed/lora", "full/lora")),
    "none": ((), ("resumed/lora", "full/lora")),
    "stack": (("order=[resta,safelora]", "+settings.safelora.tau=1.0"), ("resumed/lora",)),
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The calibration as options: harmful rows with both answers, and benign prompts."""
    folder = tmp_path_factory.mktemp("rows")
    harmful, benign = folder / "harmful.jsonl", folder / "benign.jsonl"
    harmful.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in number_pairs(16)))
    prompts = [{"prompt": prompt.text} for prompt in number_prompts(30)[16:]]
    benign.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return "--calibration", str(harmful), "--benign", str(benign)


def _models(kind: str) -> tuple[str, ...]:
    models = shared_case("llama", kind).models
    aligned = models.aligned
    return "--base", models.base.base, "--aligned", aligned.adapter or aligned.base


def _prepared(run: Run, method: str, kind: str, rows: tuple[str, ...], out: Path) -> Path:
    settings = [word for each in METHODS[method][0] for word in ("--set", each)]
    code, _, err = run("prepare", method, *_models(kind), *rows, *settings, "--out", out)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] if number else [])
        for name, (_, kinds) in METHODS.items()
        for number, kind in enumerate(kinds)
    ],
)
def test_every_defense_is_prepared_and_applied_as_plain_folders(
    run: Run, rows: tuple[str, ...], tmp_path: Path, method: str, kind: str
) -> None:
    artefact = _prepared(run, method, kind, rows, tmp_path / "artefact")
    code, shown, err = run("inspect", artefact)
    assert code == 0, err
    assert method in shown
    attacked = shared_case("llama", kind).attacked
    customer, out = attacked.adapter or attacked.base, tmp_path / "repaired"
    code, said, err = run("apply", artefact, "--model", customer, "--out", out)
    assert code == 0, err
    assert "verified" in said
    record = json.loads((out / "repair.json").read_text())
    assert record["method"] == method
    assert (record["parameters_edited"] > 0) == (method != "none")
    assert not (out / "steps").exists()
    repaired = replace(attacked, adapter=str(out)) if is_adapter(out) else Checkpoint(str(out))
    apart = [
        float((one - two).abs().max())
        for one, two in zip(plain_logits(repaired), plain_logits(attacked), strict=True)
    ]
    assert (max(apart) > 0) == (method != "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artefact", "repaired"]


def test_several_customers_are_repaired_by_one_command(
    run: Run, rows: tuple[str, ...], tmp_path: Path
) -> None:
    artefact = _prepared(run, "reset", "resumed/lora", rows, tmp_path / "artefact")
    attacked = shared_case("llama", "resumed/lora").attacked
    names = [str(shutil.copytree(str(attacked.adapter), tmp_path / name)) for name in "ab"]
    code, said, err = run("apply", artefact, "--model", *names, "--out", tmp_path / "out")
    assert code == 0, err
    assert said.count("opening reset") == 1
    assert all(is_adapter(tmp_path / "out" / name) for name in "ab")
    one = run("apply", artefact, "--model", names[0], names[0], "--out", tmp_path / "twice")
    assert "two models would be repaired into" in one[2]


def test_weights_that_stay_are_the_customers_own_files_where_asked(
    run: Run, rows: tuple[str, ...], tmp_path: Path
) -> None:
    artefact = _prepared(run, "none", "resumed/lora", rows, tmp_path / "artefact")
    customer = Path(str(shared_case("llama", "resumed/lora").attacked.adapter))
    for name, options in (("copied", []), ("linked", ["--link"])):
        out = tmp_path / name
        code, _, err = run("apply", artefact, "--model", customer, "--out", out, *options)
        assert code == 0, err
        weights, config = "adapter_model.safetensors", "adapter_config.json"
        assert (out / weights).samefile(customer / weights) == (name == "linked")
        assert not (out / config).samefile(customer / config)


def test_a_lock_is_looked_at_and_its_strength_chosen_when_it_is_applied(
    run: Run, rows: tuple[str, ...], tmp_path: Path
) -> None:
    artefact = _prepared(run, "safetylock", "full/lora", rows, tmp_path / "artefact")
    attacked = shared_case("llama", "full/lora").attacked
    code, shown, _ = run("inspect", artefact)
    assert code == 0
    assert "lock for llama, 3 layers x 4 heads of 8" in shown
    assert sum(line.count("#") for line in shown.splitlines()) == 4
    assert run("inspect", artefact / "lock", "--k", 7)[1].count("#") == 7
    chosen = ("--set", "k=2", "--set", "alpha=-1.5", "--dtype", "bfloat16")
    apply = ("apply", artefact, "--model", attacked.base)
    assert run(*apply, "--out", tmp_path / "locked", *chosen)[0] == 0
    config = json.loads((tmp_path / "locked" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    record = json.loads((tmp_path / "locked" / "repair.json").read_text())
    assert (record["settings"]["k"], record["settings"]["alpha"]) == (2, -1.5)
    # The lock alone will do.
    alone = ("apply", artefact / "lock", *apply[2:], "--set", "k=4", "--set", "alpha=5.0")
    assert run(*alone, "--out", tmp_path / "alone")[0] == 0
    assert run(*apply, "--out", tmp_path / "whole")[0] == 0
    ids = torch.tensor([[3, 8, 12, 5]])
    with torch.no_grad():
        one, two = (
            load_model(Checkpoint(str(tmp_path / name))).eval()(input_ids=ids).logits
            for name in ("alone", "whole")
        )
    assert torch.equal(one, two)


def test_a_published_lock_is_imported_and_seen_in_the_logits(run: Run, tmp_path: Path) -> None:
    case = shared_case("llama", "full/lora")
    customer, base = case.attacked.base, case.models.base.base
    heads = [(0, 3), (2, 0), (2, 1)]
    directions = save_published(tmp_path / "some.safelock", heads, 8)
    lock = ("import", tmp_path / "some.safelock", "--model", base, "--out", tmp_path / "lock")
    code, said, err = run(*lock)
    assert code == 0, err
    assert "can't be verified" in said
    shown = run("inspect", tmp_path / "lock")[1]
    assert "K=3, alpha=6.0" in shown
    assert "    2 ##..\n    1 ....\n    0 ...#\n" in shown
    out = tmp_path / "locked"
    code, _, err = run("apply", tmp_path / "lock", "--model", customer, "--out", out)
    assert code == 0, err
    deltas = {layer: torch.zeros(32) for layer in (0, 2)}
    for (layer, head), direction in directions.items():
        step = torch.from_numpy(direction).float() * 6.0 * 0.5
        deltas[layer][8 * head : 8 * head + 8] = step
    ids, model = torch.tensor([[3, 8, 12, 5]]), load_model(Checkpoint(customer)).eval()
    with torch.no_grad(), steer(model, Steering(deltas, "all")):
        hooked = model(input_ids=ids).logits
    with torch.no_grad():
        locked = load_model(Checkpoint(str(out))).eval()(input_ids=ids).logits
    assert locked == pytest.approx(hooked, abs=1e-4)
    assert run(*lock[:-1], tmp_path / "lock")[0] == 1


def test_mistakes_are_one_sentence_and_leave_nothing(
    run: Run, rows: tuple[str, ...], tmp_path: Path
) -> None:
    kind = "resumed/lora"
    case = shared_case("llama", kind)
    adapter = str(case.attacked.adapter)
    merged = shared_case("llama", "full/lora").attacked.base
    other = save_base(tmp_path / "wide", width=48).base
    lock = _prepared(run, "safetylock", kind, rows, tmp_path / "lock")
    nlsr = _prepared(run, "nlsr", kind, rows, tmp_path / "nlsr")
    out = ("--out", tmp_path / "new")
    prepare = ("prepare", "safetylock", *_models(kind), *out)
    apply = ("apply", lock, *out, "--model")
    damaged = Path(shutil.copytree(lock, tmp_path / "damaged"))
    (damaged / "lock" / "lock.json").write_text("{}")
    mistakes = {
        "more than the model's 12 heads": (*prepare, *rows, "--set", "k=13"),
        "defense.kk is not a setting; did you mean defense.k?": (*prepare, "--set", "kk=2"),
        "--set 'k' is no setting; write --set NAME=VALUE": (*prepare, "--set", "k"),
        "defense=safetylok is unknown; did you mean safetylock?": (
            "prepare", "safetylok", *prepare[2:],
        ),
        "the file 'nowhere.jsonl' does not exist": (
            *prepare, "--calibration", "nowhere.jsonl", "--set", "k=2",
        ),
        "sources.utility_prompts is null, but defense=fgsn needs benign prompts": (
            "prepare", "fgsn", *prepare[2:], *rows[:2],
        ),
        "exists; give a folder that doesn't": (*prepare, "--out", lock),
        "--base='./nowhere' is not a folder": (*prepare, *rows, "--base", "./nowhere"),
        "can't be made a folder that is written to": (*prepare, "--out", damaged / "stage.json/x"),
        "exists; give an --out that doesn't": (*apply, adapter, "--out", lock),
        "is decided when a defense is prepared": (*apply, adapter, "--set", "n_pairs=5"),
        "which no folder can hold": (*apply, adapter, "--set", "form=hooked"),
        "--model='./nowhere' is not a folder": (*apply, "./nowhere"),
        "differ in model.layers.0": (*apply, other),
        "--model='" + merged + "': defense=nlsr repairs": ("apply", nlsr, *apply[2:], merged),
        "is no artefact": ("inspect", tmp_path),
        "lock.json of": ("inspect", damaged),
        "--aligned='" + other: (*apply, adapter, "--aligned", other),
    }  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for sentence, arguments in mistakes.items():
        code, _, err = run(*arguments)
        assert code == 1, arguments
        said = err.rpartition("error: ")[2]
        assert said.count("\n") == 1
        assert sentence in said
    assert sorted(tmp_path.iterdir()) == before
