"""Every mistake is one sentence that says what to write instead, before anything heavy starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from attacks.base import Attack
from defenses.nlsr import NLSR
from evaluation.base import Judge, Verdict
from experiments import run
from experiments.config.experiment import PROJECT
from experiments.store import Store
from settings import target
from tests.experiments.composing import composed, refused
from tests.experiments.conftest import TOY, Command


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("attack.posion_ratio=0.1", "did you mean attack.poison_ratio?"),
        ("attack.train.learning_rat=1", "did you mean attack.train.learning_rate?"),
        ("+attack.extra=1", "attack.extra is not a setting"),
        (
            "hydra.launcher.partitio=x",
            "hydra.launcher.partitio is not a setting; --cfg hydra shows",
        ),
        ("task=sst2", "did you mean attack.task or"),
        ("defense=nlrs", "did you mean nlsr?"),
        (
            "evaluation.backend.batch_size=8",
            "chosen here; did you mean evaluation.backend.transformers.batch_size?",
        ),
        ("evaluation.harm_judge.treshold=0.4", "did you mean evaluation.harm_judge.threshold?"),
        ("model=lama2", "did you mean llama2?"),
        ("defens=nlsr", "defens is not a setting; did you mean defense?"),
        ("atack=harmful_ft", "did you mean attack?"),
        ("atack@refine=benign_ft", "atack is no group of options; did you mean attack?"),
        ("judge@evaluation.harm_jugde=keyword", "did you mean judge@evaluation.harm_judge?"),
        ("hydra/launcer=joblib", "did you mean hydra/launcher?"),
        ("attack.trian.epochs=3", "did you mean attack.train.epochs?"),
        ("attack.train.max_stpes=3", "did you mean attack.train.max_steps?"),
        (
            "attack.train.epochs=inf",
            "attack.train.epochs=inf is not allowed; it should be a",
        ),
        ("attack.train.learning_rate=nan", "it should be a finite number"),
        ("~tracker", "tracker is missing; leave out ~tracker, or set it"),
        ("model.base=/a/b=c", """must be quoted; write 'model.base="/a/b=c"'"""),
        ("model.base=/a/ü", """must be quoted; write 'model.base="/a/ü"'"""),
        ("model.base=/a/b(1)#2", """must be quoted; write 'model.base="/a/b(1)#2"'"""),
        ("model.base=~/a", f"""must be quoted; write 'model.base="{Path.home()}/a"'"""),
        ("attack.n=[1,2", "a list as NAME=[A,B]"),
        ("attack=unheard_of", "known: benign_ft, explicit, given, harmful_ft"),
        ("attack.task=ssst2", "attack.task: 'ssst2' is unknown; did you mean sst2?"),
        ("attack.poison_ratio=-0.1", "it should be greater than or equal to 0"),
        ("attack.poison_ratio=lots", "attack.poison_ratio='lots' is not allowed"),
        ("attack.n=true", "attack.n=True is not allowed"),
        ("attack.n=0", "attack.n=0 is not allowed"),
        ("attack.adapter=frehs", "'resume', 'fresh' or 'full'"),
        ("defense.sparsity=2", "defense.sparsity=2"),
        ("defense._target_=os.system", "plugins=[os]"),
        ("defense._target_=attacks.harmful_ft.HarmfulFT", "is not a defense"),
        ("seed=-1", "seed=-1 is not allowed"),
        ("evaluation.tasks=sst2", "write evaluation.tasks=[sst2,gsm8k]"),
        ("evaluation.tasks=[small_talk]", "small_talk has no answers to be scored by"),
        ("evaluation.prompt_sets=[advbnech]", "did you mean advbench?"),
        ("evaluation.prompt_sets=advbench", "write evaluation.prompt_sets=[advbench,xstest]"),
        ("evaluation.prompt_sets=[advbench,advbench]", "names one option twice"),
        ("evaluation.prompt_sets=[advbench]", "advbench"),
        ("evaluation.attack_prompts=[prefil]", "did you mean prefill?"),
        ("evaluation.attack_prompts=['file:/no/such.jsonl']", "/no/such.jsonl"),
        ("+tasks.arithmetic.n_tets=4", "did you mean tasks.arithmetic.n_test?"),
        ("protocol=boster", "did you mean booster?"),
        (
            "attack@refine=benign_fit",
            "attack@refine=benign_fit is unknown; did you mean benign_ft?",
        ),
        ("+attack@refine=nope", "attack@refine=nope is unknown; known: benign_ft, explicit"),
        ("attack=nope attack@refine=benign_ft", "attack=nope is unknown; known: benign_ft"),
        ("attack=_base/nope", "attack=_base/nope is unknown; known: fine_tuning"),
        ("poison@sources.poison=nope", "poison@sources.poison=nope is unknown; known: beaver"),
        ("judge@evaluation.harm_judge=nope", "judge@evaluation.harm_judge=nope is unknown; known"),
        ("refine.adapter=fresh", "attack@refine is null; add attack@refine=NAME first, known: ben"),
        ("objective.metric=hs", "objective is null; add objective=NAME first, known: hs_within"),
        ("xyzzy.adapter=fresh", "xyzzy.adapter is not a setting; known: attack.adapter"),
        ("runtime.xyzzy.a=1", "known: runtime.gpus, runtime.gpus_per_job, runtime.isolate, "),
        ("attack.trian.epohcs=3", "did you mean attack.train?"),
        ("poison=jsonl", "poison is not a setting; known: poison@sources.poison"),
        ("seed.first=1", "since seed holds none; set seed itself or"),
        ("sources.poison=nope", "sources.poison._target_ is missing; name the class"),
        ("sources.validation=nope", "sources.validation='nope' is no section; write"),
        ("model.dtype=float64", "it should be 'float32', 'float16' or 'bfloat16'"),
        ("tracker.project=", "tracker.project='' is not allowed; it should not be empty"),
        ("tracker.project=a/b", "it should match the pattern ^[^/"),
        ("attack.train=3", "attack.train=3 is not allowed; it should be a section, such as {NAME"),
        ("objective=pareto objective.metrics=[hs]", "it should have at least 2 items"),
        (
            "runtime.gpus=[1.5]",
            "runtime.gpus.0=1.5 is not allowed; it should be a valid integer or",
        ),
        ("plugins=[nope]", "plugins=[nope]: there is no package 'nope'; write the top name of"),
        ("plugins=[tests.nope]", "there is no package 'tests.nope'"),
        ("model.alignment=published model.aligned=null", "model.alignment=published needs"),
        ("model.alignment=mine", "'auto', 'published' or 'own'"),
        ("attack@refine=harmful_ft defense=safetylock", "set refine.adapter=fresh"),
        ("sources.poison=null", "sources.poison is null"),
        ("sources.poison={_target_:x.Y,path:rows.jsonl}", "write ~sources.poison and then"),
        ("poison@sources.poison=jsonl", "sources.poison.path is missing; set it"),
        ("model=local", "sources.calibration.harmful is not a setting of the options"),
        ("model.base=/no/such/folder", "model.base='/no/such/folder' is not a folder"),
        ("model.base=me/base@main", "set model.base to 'me/base' and its revision to 'main'"),
        (
            f"model.base={PROJECT}/organism/weights/aligned",
            "is an adapter; set model.base",
        ),
        ("model.aligned=/not/there", "model.aligned='/not/there' is not a folder"),
        ("model.aligned=", "model.aligned='' is empty"),
        (f"model.aligned={PROJECT}/organism/weights", "model folder, such as"),
        (f"model.aligned={PROJECT}/organism", "model.aligned="),
        ("+model.prompt.template.thnking=1", "model.prompt.template.thnking is nothing that"),
        ("model.prompt.date=today", "model.prompt.date: Invalid isoformat string"),
        ("attack.task=sst2", "data.root"),
    ],
)
def test_one_sentence(override: str, said: str) -> None:
    sentence = refused(*TOY, *override.split())
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("section", ["attack", "model", "defense"])
def test_a_section_that_was_left_out(section: str) -> None:
    assert refused(f"~{section}") == f"{section} is missing; leave out ~{section}, or set it"


class Recalibrated(NLSR):
    """A plugin's defense, with a setting that no file of a group has."""

    recalibrate: bool = False


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("defense.recalibrat=true", "did you mean +defense.recalibrate?"),
        ("defense.recalibrate=true", "before it is added; write +defense.recalibrate=..."),
        ("+defense.recalibrat=true", "did you mean defense.recalibrate?"),
    ],
)
def test_hints_know_the_chosen_classs_own_fields(setting: str, said: str) -> None:
    chosen = ("plugins=[tests]", f"defense._target_={target(Recalibrated)}", setting)
    assert said in refused(*chosen)


@pytest.mark.parametrize("folder", ["occupied/run", "n" * 300])
def test_a_run_folder_that_cannot_be_made(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setattr("sys.argv", ["run", f"hydra.run.dir={tmp_path / folder}"])
    assert run.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "set hydra.run.dir" in line


def test_folders_of_jobs_keep_their_numbers(command: Command) -> None:
    sweep = command("-m", "seed=0,1", "hydra.sweep.subdir=seed_${seed}")
    assert sweep.code == 1
    assert "hydra.sweep.subdir=seed_${seed} is not allowed" in sweep.err
    assert not list(sweep.folder.glob("seed_*"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nonsense=1", "nonsense is not a setting"),
        ("attack", "missing EQUAL"),
        ("attack@refine=nope", "attack@refine=nope is unknown; known: benign_ft"),
        ("attack.poison_ratio=1.5", "it should be less than or equal to 1"),
        ("attack.n=10000000", "lower attack.n"),
        ("evaluation.limits.harmful=100000", "evaluation.limits.harmful=100000 is more than"),
    ],
)
def test_one_line_on_stderr_and_nothing_half_written(
    command: Command, tmp_path: Path, override: str, said: str
) -> None:
    """Mistakes of Hydra's, of a setting, of the pipeline's and of a source, by the command."""
    store = tmp_path / "store"
    run = command(override, f"store.root={store}")
    assert run.code != 0
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in run.out
    assert "attack" not in {entry.name for entry in Store(store).entries()}
    assert not list(store.glob(".making/*"))


@pytest.mark.parametrize("where", ["attack.adapter=fresh attack", "model.aligned=null align"])
def test_unknown_projections(command: Command, where: str) -> None:
    *chosen, owner = where.split()
    run = command("defense=none", *chosen, f"{owner}.lora.target_modules=[q_proj,w_proj]")
    assert run.code != 0
    assert f"{owner}.lora.target_modules: w_proj is no projection of" in run.err
    assert "choose from down_proj, gate_proj, k_proj" in run.err


def test_more_alignment_rows_than_there_are(command: Command) -> None:
    run = command("defense=none", "model.aligned=null", "align.n_sft=100000")
    assert run.code != 0
    assert "align.n_sft=100000" in run.err
    assert "lower align.n_sft" in run.err


def test_rows_that_the_evaluation_took_away_are_told(tmp_path: Path) -> None:
    harmful = composed().sources.asked("test").harmful
    prompts = [prompt.text for prompt in harmful.prompts()[:2]] + ["Which gate is shut?"]
    rows = [{"prompt": text, "chosen": "No.", "rejected": "Yes."} for text in prompts]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pairs = f"{{_target_:data.sources.JsonlPairs,path:{path}}}"
    own = ("align=nlsr_dpo", "model.alignment=own", "align.n_sft=null", "align.n_pairs=3")
    sentence = refused("defense=none", *own, "~sources.pairs", f"+sources.pairs={pairs}")
    assert "asked for align.n_pairs=3 but sources.pairs holds 1 rows" in sentence
    assert sentence.endswith("because the evaluation asks them: 2 of sources.pairs)")


def test_a_model_of_ones_own_needs_a_path() -> None:
    assert refused("model=local") == "model.base is missing; set it"


def test_llama2_composes_and_says_what_is_missing(command: Command) -> None:
    composed = command("--cfg=job", "model=llama2", toy=False)
    assert composed.code == 0
    assert "meta-llama/Llama-2-7b-hf" in composed.out
    sentence = refused("model=llama2", "defense=nlsr", "attack=harmful_ft")
    assert "model.base='meta-llama/Llama-2-7b-hf'" in sentence
    assert "HF_HUB_OFFLINE" in sentence


@pytest.fixture
def broken_base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT / "organism/weights/base", tmp_path / "base"))


def test_a_truncated_weights_file(command: Command, broken_base: Path) -> None:
    weights = broken_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    run = command(f"model.base={broken_base}")
    assert run.code != 0
    assert "model.base" in run.err
    assert "is truncated or damaged" in run.err


def test_a_folder_without_weights(command: Command, broken_base: Path) -> None:
    (broken_base / "model.safetensors").unlink()
    run = command(f"model.base={broken_base}")
    assert run.code != 0
    assert "holds no weights" in run.err


def test_a_judge_model_that_is_no_classifier(command: Command, broken_base: Path) -> None:
    run = command(f"evaluation.harm_judge.model={broken_base}")
    assert run.code != 0
    assert "not a sequence classifier" in run.err


class SilentJudge(Judge):
    """Returns no verdicts at all."""

    def score(self, prompts: object, answers: object) -> list[Verdict]:
        return []


def test_a_judge_that_returns_nothing(command: Command) -> None:
    target = f"{SilentJudge.__module__}.SilentJudge"
    node = json.dumps({"_target_": target}).replace('"', "")
    run = command(
        "defense=none",
        "plugins=[tests]",
        "~evaluation.harm_judge",
        f"+evaluation.harm_judge={node}",
    )
    assert run.code != 0
    assert "SilentJudge gave 0 verdicts for 36 answers" in run.err


class DiskFillingAttack(Attack):
    """Writes until the disk is full."""

    def run(
        self, aligned: object, data: object, style: object, seed: int, out: Path, scratch: Path
    ):
        out.mkdir()
        (out / "half.txt").write_text("half")
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)


def test_a_full_disk(command: Command, tmp_path: Path) -> None:
    target = f"{DiskFillingAttack.__module__}.DiskFillingAttack"
    run = command(
        "defense=none",
        "plugins=[tests]",
        "~attack",
        f"+attack={{_target_: {target}, task: arithmetic}}",
        f"store.root={tmp_path / 'store'}",
        toy=False,
    )
    assert run.code != 0
    assert "store.root" in run.err
    assert "is full; free some space" in run.err
    assert not list((tmp_path / "store").rglob("half.txt"))
