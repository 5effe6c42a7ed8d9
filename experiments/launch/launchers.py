"""What Hydra's launchers leave to the job: a process of its own, its cores, and a sweep's end.

Under every launcher but Hydra's own serial one a job is a child of the launcher's worker. A kill,
most often the kernel's for want of memory, then takes one job: the worker lives, says what became
of it, and goes on with the next. The job also imports torch afresh, so that it can be told before
which GPUs and how many threads are its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from settings import RelockError
from settings.process import begin_child

if TYPE_CHECKING:
    from hydra.conf import HydraConf

SERIAL = "BasicLauncher"
_SUBMITIT_LOCAL, _SUBMITIT_SLURM = "LocalLauncher", "SlurmLauncher"
_SIGNALS = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)
_LINGER_SECONDS = 30  # For what a library still does at its process's end.
_QUEUE_SECONDS = 60  # The queue is asked at most so often.
_SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_SUBDIRS = ("${hydra.job.num}", "${hydra:job.num}")
_LIBRARIES = ("joblib", "submitit", "ray")


def name(hydra_config: HydraConf | DictConfig) -> str:
    """The class of the launcher that a composed configuration names."""
    return str(hydra_config.launcher["_target_"]).rpartition(".")[2]


def has_workers(hydra_config: HydraConf | DictConfig) -> bool:
    """Whether jobs are run by a launcher's worker processes."""
    return hydra_config.mode == RunMode.MULTIRUN and name(hydra_config) != SERIAL


def default_threads(hydra_config: HydraConf | DictConfig) -> int | None:
    """Threads of torch in a job where `runtime.threads` says nothing; None: torch chooses.

    Two busy processes that share cores slow each other many times over. joblib and Ray give their
    workers a share of the cores as OMP_NUM_THREADS; submitit's local jobs all run at once.
    """
    if not has_workers(hydra_config):
        return None
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal():
        return int(threads)
    if name(hydra_config) == _SUBMITIT_LOCAL:
        return 1
    if name(hydra_config) == _SUBMITIT_SLURM:
        return int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or None
    return None


def in_own_process(function: Callable[[], Any]) -> Any:
    """Calls `function` in a spawned process and returns what it returns.

    Args:
        function: Picklable and without arguments. It doesn't raise; what it returns is picklable.

    Raises:
        RelockError: The process ended without an answer.
    """
    # A worker of joblib's names its own method, which a new process doesn't know.
    multiprocessing.set_start_method("spawn", force=True)
    context = multiprocessing.get_context()
    receiver, sender = context.Pipe(duplex=False)
    ignored = [each for each in _SIGNALS if callable(signal.getsignal(each))]
    process = context.Process(target=_answer, args=(function, sender, ignored), name="relock-job")
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join(_LINGER_SECONDS)
        return answer
    except EOFError:
        process.join()
        raise RelockError(_ending(process.exitcode)) from None
    except Exception as error:
        if not is_breakdown(error):
            raise
        raise RelockError(
            "the launcher's time for it was over; raise hydra.launcher.timeout_min, or set "
            "hydra.launcher.max_num_timeout so that it is queued again and goes on from the store"
        ) from error
    finally:
        # A timeout or a preemption leaves `recv` by an exception of the signal's handler.
        process.kill()
        process.join()
        receiver.close()


def is_breakdown(error: BaseException) -> bool:
    """Whether a launcher's library raised it, as it does where one of its workers died."""
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def breakdown(error: BaseException) -> str:
    """One sentence for an error that a launcher's library raised."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("sbatch:"):
        return f"Slurm took none of the jobs: {lines[-1]}"
    return "the launcher lost a worker and broke off; see above"


def missing_plugin(error: BaseException) -> str | None:
    """One sentence for a launcher whose plugin isn't installed; None for any other error."""
    match = re.search(r"hydra_plugins\.hydra_(\w+)_launcher\.", str(error))
    if match is None or "plugin" not in str(error):
        return None
    plugin = match[1]
    # Ray's plugin can't stand beside what the others need.
    how = (
        "pip install 'relock[ray]' in an environment of its own"
        if plugin == "ray"
        else f"pip install hydra-{plugin}-launcher"
    )
    return f"hydra/launcher={plugin} needs a plugin that isn't installed here; {how}"


def refusal(config: DictConfig) -> str | None:
    """Why the launcher couldn't run a multirun's jobs, in one sentence; None where it can."""
    launcher, options = name(config.hydra), config.hydra.launcher
    folders = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if isinstance(folders, dict) and folders["subdir"] not in _SUBDIRS:
        return (
            f"hydra.sweep.subdir={folders['subdir']} is not allowed: a sweep's jobs are told by "
            "the numbers that their folders have, for its summary, rerun, progress and report; "
            "leave it out (.hydra/overrides.yaml in a job's folder says which it is)"
        )
    if launcher == _SUBMITIT_SLURM:
        lacking = [each for each in _SLURM_COMMANDS if shutil.which(each) is None]
        if lacking:
            return (
                f"hydra/launcher=submitit_slurm needs Slurm's {', '.join(lacking)} on PATH; run it "
                "on a node that has them, or use hydra/launcher=joblib"
            )
    if options.get("n_jobs") == 0:
        return "hydra.launcher.n_jobs=0 runs nothing; give a number of jobs, or -1 for all cores"
    if "timeout_min" in options and not options.timeout_min > 0:
        return (
            f"hydra.launcher.timeout_min={options.timeout_min} ends every job at once; give the "
            "minutes that a job may take"
        )
    return None


def watch(config: DictConfig) -> None:
    """Prepares to hear of the jobs that a multirun's launcher hands to a batch system."""
    if name(config.hydra) == _SUBMITIT_SLURM:
        from submitit import SlurmJob

        from experiments.launch.slurm import QueueWatcher

        SlurmJob.watcher = QueueWatcher(_QUEUE_SECONDS)


def wait_for_jobs(config: DictConfig) -> None:
    """Waits until the jobs that a launcher left running have ended.

    joblib and Ray end theirs before they raise; submitit raises for the first dead job.
    """
    launcher = name(config.hydra)
    if launcher == _SUBMITIT_SLURM:
        from submitit import SlurmJob

        for folder, job in _submitted(config):
            SlurmJob[Any](folder, job).wait()
    elif launcher == _SUBMITIT_LOCAL:
        for _, job in _submitted(config):
            # The job's number is its process's, which is a child of this one.
            with suppress(ChildProcessError):
                os.waitpid(int(job), 0)


def running_array(config: DictConfig) -> int | None:
    """The number of the Slurm array that goes on without this process, if there is one."""
    if name(config.hydra) != _SUBMITIT_SLURM:
        return None
    arrays = [int(job.partition("_")[0]) for _, job in _submitted(config)]
    return max(arrays, default=None)  # A search waits for each before the next.


def _submitted(config: DictConfig) -> list[tuple[Path, str]]:
    """Folder and number of every job that submitit was given."""
    pickles = sorted(Path(config.hydra.sweep.dir).glob(".submitit/*/*_submitted.pkl"))
    return [(pickle.parent, pickle.name.removesuffix("_submitted.pkl")) for pickle in pickles]


def _answer(
    function: Callable[[], Any], sender: Connection, ignored: Sequence[signal.Signals]
) -> None:
    # A batch system signals all processes of a job; what the worker does about it is enough.
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)
    begin_child()
    with suppress(KeyboardInterrupt):  # The sweep's own process says so.
        sender.send(function())
    sender.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        cause = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            cause += (
                ", most often for want of memory; run fewer jobs at once or give the machine more "
                "memory"
            )
        return f"its process {cause}"
    return f"its process ended by itself with exit code {code}"
