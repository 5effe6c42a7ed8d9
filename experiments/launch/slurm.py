"""What submitit hears of Slurm's jobs: whether they are still in the queue.

submitit asks Slurm's accounting (`sacct`), which many small clusters don't keep; a job whose worker
was killed then can't be told from one that waits, and is waited for without end.
"""

from __future__ import annotations

import getpass

from submitit.slurm.slurm import SlurmInfoWatcher


class QueueWatcher(SlurmInfoWatcher):
    """Takes a job that has left the queue, with a result or without one, to have ended.

    The queue has what is pending, running, suspended or completing; also what is queued again.
    """

    def _make_command(self) -> list[str] | None:
        if self._registered <= self._finished:
            return None
        # %i of an array's job is ARRAY_INDEX, as in submitit's own names.
        return ["squeue", f"--user={getpass.getuser()}", "--array", "--noheader", "--format=%i"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        listed = string.decode() if isinstance(string, bytes) else string
        queued = set(listed.split())
        return {
            job: {"JobID": job, "State": "RUNNING" if job in queued else "COMPLETED"}
            for job in self._registered
        }
