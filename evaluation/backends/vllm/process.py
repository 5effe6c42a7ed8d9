"""A worker process from the outside: whether it can run, starting it, asking it, why it failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from settings import ModelError

_WORKER = "evaluation.backends.vllm.worker"
_ROOT = Path(__file__).parents[3]
_TAIL = 4096
_END_SECONDS = 10.0
_MEMORY = (
    "vLLM ran out of memory; lower gpu_memory_utilization or set max_model_len of the vLLM backend"
)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # What is served is always a local folder.
    "HF_HUB_OFFLINE": "1",
}
# Choosing the platform loads its kernels, which is where a build for another torch or driver fails;
# the rest of vLLM would take twice as long.
_IMPORT = """
from vllm.platforms import current_platform as platform
if not platform.device_type or platform.is_cuda_alike() and not platform.device_count():
    raise SystemExit("it finds no device that it was built for")
"""
_IMPORT_SECONDS = 300.0


class Worker:
    """A child process that runs vLLM; this process never imports it.

    The child is no one's to inherit: it ends when this process does, however that ends.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Starts the process; `environment` are variables that it has besides this one's own."""
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=child_environment(environment),
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for this process, which then ends the worker.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, name: str, *, seconds: float | None = None, **arguments: Any) -> Any:
        """Sends a command and waits for its result; a worker that fails at one is ended.

        Args:
            name: A method of `evaluation.backends.vllm.worker.Server`.
            seconds: How long to wait, or None for as long as it takes.
            arguments: The method's arguments, as JSON can hold them.

        Raises:
            ModelError: It refused, died, or took too long; why, in one sentence.
        """
        if self._log.closed:
            raise ModelError("this vLLM engine is closed; open the model again")
        try:
            self._pipe.send_bytes(json.dumps({"name": name, "arguments": arguments}).encode())
            if not self._pipe.poll(seconds):
                raise ModelError(
                    f"vLLM took more than {seconds:.0f} s to {name}; set start_seconds of the vLLM "
                    "backend higher if the model is large or its disk slow"
                )
            reply = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise ModelError(self._obituary()) from error
        except BaseException:
            # An answer that nobody waits for would be taken for that to the next command.
            self.end()
            raise
        if "error" in reply:
            self.end()
            failed = f"vLLM failed at {name}: {short(reply['error'])}"
            raise ModelError(_MEMORY if reply["memory"] else failed)
        return reply["result"]

    def end(self) -> None:
        """Ends the process and gives all its memory back."""
        if self._log.closed:
            return
        self._pipe.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        # The whole session, since vLLM has children of its own where it uses several GPUs.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _obituary(self) -> str:
        """Why the process is gone: its signal or exit status, and the last it wrote."""
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0
        size = os.fstat(self._log.fileno()).st_size
        log = os.pread(self._log.fileno(), _TAIL, max(0, size - _TAIL)).decode(errors="replace")
        self.end()
        if status < 0:
            return (
                f"the vLLM process was killed (signal {-status}), most often for want of memory; "
                "lower gpu_memory_utilization or kv_cache_gib of the vLLM backend, or give the "
                "machine more memory"
            )
        lines = [short(line, 200) for line in log.splitlines() if line.strip()]
        return f"the vLLM process ended with status {status}: {' / '.join(lines[-3:])}"


@cache
def obstacle() -> str | None:
    """Why vLLM can't run here, to follow "vLLM, which"; None where it can.

    Where its module exists, a process of its own imports it, once for as long as this one runs.
    """
    if find_spec("vllm") is None:
        return "isn't installed"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _IMPORT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment({}),
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"is installed but doesn't import within {_IMPORT_SECONDS:.0f} s"
    if ran.returncode == 0:
        return None
    lines = ran.stderr.decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"status {ran.returncode}")
    return f"is installed but doesn't run here ({short(last, 200)})"


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process that imports vLLM: this one's, with vLLM's set, and `more`."""
    own = dict(os.environ)
    paths = [str(_ROOT), *filter(None, [own.get("PYTHONPATH")])]
    # vLLM binds threads to cores of its choice, whatever number of threads was asked for.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if "OMP_NUM_THREADS" in own else {}
    return {**threads, **own, **_ENVIRONMENT, **more, "PYTHONPATH": os.pathsep.join(paths)}


def short(text: str, most: int = 500) -> str:
    """The text as one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
