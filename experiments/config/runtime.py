"""How a job runs on its machine: processes, GPUs and threads; no result depends on it."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from experiments.config import gpus
from settings import Settings


class Runtime(Settings):
    """The `runtime` section.

    Attributes:
        isolate: Whether every stage runs in a child process.
        gpus: The GPUs that jobs share, as indices or UUIDs; each leases its own of them. None: a
            job sees what CUDA_VISIBLE_DEVICES shows.
        gpus_per_job: How many a job leases.
        threads: Threads of torch in a job; None: as OMP_NUM_THREADS says, or the launcher.
        progress: How a run shows how far it is: a live view on a terminal and lines elsewhere,
            lines, or nothing.
    """

    isolate: bool = False
    gpus: tuple[int | str, ...] | None = None
    gpus_per_job: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    progress: Literal["auto", "plain", "off"] = "auto"

    @field_validator("progress", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return "off" if value is False else value  # A YAML file's off.

    @model_validator(mode="after")
    def _check_gpus(self) -> Runtime:
        if self.gpus is None:
            return self
        names = [str(gpu) for gpu in self.gpus]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"runtime.gpus names {', '.join(twice)} twice; name each GPU once")
        if any(not name or "/" in name or name.startswith("-") for name in names):
            raise ValueError("runtime.gpus should hold indices or UUIDs, such as [0,1]")
        if self.gpus_per_job > len(names):
            raise ValueError(
                f"runtime.gpus_per_job={self.gpus_per_job} is more than the {len(names)} of "
                "runtime.gpus; lower it, or list more"
            )
        return self

    def prepare(self, threads: int | None) -> None:
        """Takes what the job needs of the machine, before torch is imported.

        Args:
            threads: How many are meant where `self.threads` says nothing; None: torch's choice.

        Raises:
            SettingError: The GPUs can't be had.
        """
        threads = self.threads or threads
        if threads is not None:
            # joblib sets what it finds unset of these, and torch's MKL goes by its own first.
            os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        if self.gpus is not None:
            gpus.lease(self.gpus, self.gpus_per_job)
