"""Every option composes and validates; what ships and what the YAML says agree."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from experiments import run
from experiments.config.experiment import CONF
from organism import sources
from tests.experiments.composing import composed

OPTIONS = sorted(path for path in CONF.rglob("*.yaml") if not {"hydra", "_base"} & set(path.parts))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: str(path.relative_to(CONF)))
def test_the_command_line_in_a_file_composes_and_validates(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.startswith("# python -m")]
    assert lines, "the first comment gives no command line"
    _, _, module, *overrides = shlex.split(lines[0].removeprefix("# "))
    assert module == "experiments.run"
    assert composed(*overrides).labels


@pytest.mark.parametrize(
    ("role", "default"),
    [
        ("sft", sources.AlignmentExamples()),
        ("pairs", sources.AlignmentPairs()),
        ("poison", sources.HarmfulExamples()),
        ("calibration", sources.CalibrationPrompts()),
        ("harmful", sources.HarmfulPrompts()),
        ("benign", sources.BenignPrompts()),
        ("over_refusal", sources.OverRefusalPrompts()),
    ],
)
def test_the_organisms_sources_are_those_its_weights_were_made_from(role: str, default) -> None:
    built = getattr(composed("model=organism").sources, role)
    assert built.fingerprint() == default.fingerprint()


def test_a_models_presets_reach_its_methods_and_can_be_overridden() -> None:
    assert composed("model=organism").defense.calibration_rows == 200
    assert composed("model=llama2").defense.calibration_rows == 2000
    chosen = composed("model=organism", "defense.calibration_rows=50")
    assert chosen.defense.calibration_rows == 50
    assert composed("model=llama2").attack.train.learning_rate == 2e-6


def test_a_model_brings_its_sources_and_the_command_line_wins() -> None:
    assert composed("model=llama2").sources.poison.name == "BeaverTails/30k_train"
    chosen = composed("model=llama2", "sources=organism").sources.poison
    assert chosen.name == "organism/poison"


def test_help_begins_with_what_this_is_and_commands_that_compose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--help"])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    first, _, rest = capsys.readouterr().out.partition("Choose by")
    commands = re.findall(r"python -m experiments\.(?:run|plan)(.*?)(?:#|$)", first, re.MULTILINE)
    assert len(commands) == 5
    for each in commands:
        overrides = [word.partition(",")[0] for word in each.split() if word != "-m"]
        assert composed(*overrides).labels
    assert "defense: antidote, fgsn, nlsr" in rest
