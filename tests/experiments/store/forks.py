"""The main command in forks of one process, so that what is heavy is imported once for all."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from experiments import run
from experiments.launch.job import quiet_libraries
from settings.process import collect_as_usual, collect_rarely

quiet_libraries()
collect_rarely()
for heavy in (
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    "statsmodels.stats.contingency_tables",
    "statsmodels.stats.proportion",
    "evaluation.backends.auto",
    "evaluation.metrics",
    "experiments.pipeline.pipeline",
    "experiments.report.run_table",
    "modeling.training",
):
    importlib.import_module(heavy)
# Every collection of garbage in a fork would look through it.
collect_as_usual()


def forked(arguments: Sequence[str], become: Callable[[], object]) -> int:
    """Runs the command in a fork that calls `become` first; its exit code, or minus the signal.

    What it says besides errors is left out.
    """
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        become()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["run", *arguments]
        code = 1
        try:
            code = run.main()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
