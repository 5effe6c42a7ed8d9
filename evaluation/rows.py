"""Rows that models were measured by, as arrays: some of a frame's rows, chosen and read cheaply."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.clusters import Clusters
from settings import DataError

if TYPE_CHECKING:
    import pandas as pd


class Rows:
    """Some rows of a frame, and which of them are of one prompt and of one seed.

    A column becomes an array where it is first asked for, once for all rows of the frame.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self._whole: dict[str, NDArray[Any]] = {}
        self._chosen: NDArray[np.intp] | None = None

    @property
    def columns(self) -> Iterator[str]:
        """The names of all columns, in their order."""
        return iter(self._frame.columns)

    def __len__(self) -> int:
        return len(self._frame) if self._chosen is None else len(self._chosen)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column, text and what may be missing as objects; any is there where no row is."""
        if not len(self) and name not in self._frame:
            return np.empty(0, dtype=object)
        if name not in self._whole:
            column = self._frame[name]
            self._whole[name] = column.to_numpy(object if column.dtype == "str" else None)
        whole = self._whole[name]
        return whole if self._chosen is None else whole[self._chosen]

    def take(self, which: NDArray[Any]) -> Rows:
        """Those of these rows that a mask marks, or that have these places, in that order."""
        taken = Rows(self._frame)
        taken._whole = self._whole
        places = np.flatnonzero(which) if which.dtype == bool else which
        taken._chosen = places if self._chosen is None else self._chosen[places]
        return taken

    def missing(self, name: str) -> NDArray[np.bool_]:
        """Which rows lack a value in a column."""
        import pandas as pd

        return pd.isna(self[name])

    def needed(self, columns: Collection[str], gaps: bool = False) -> Rows:
        """These rows, in which the columns are there and, without `gaps`, filled.

        Raises:
            DataError: They aren't.
        """
        for name in columns if len(self) else ():
            if name not in self._frame or (not gaps and self.missing(name).any()):
                sets = ", ".join(sorted(set(self["set"])))
                raise DataError(
                    f"rows of {sets} lack a value in the column {name!r}; judge them again"
                )
        return self

    def filled(self, columns: Collection[str]) -> Rows:
        """The rows that have the columns; none of them where all that stands there is empty."""
        nothing = np.zeros(len(self), dtype=bool)
        if not set(columns) <= set(self._frame):
            return self.take(nothing)
        lacking = [self.missing(name) for name in columns]
        rows = self if not np.any(lacking) else self.take(~np.any(lacking, axis=0))
        found = (rows[name] for name in columns)
        if any(len(rows) and (each.dtype != object or (each != "").any()) for each in found):
            return rows
        return self.take(nothing)

    def of(self, sets: Collection[str]) -> Rows:
        """The rows of some sets of prompts."""
        codes, names = self._sets
        return self.take(np.array([name in sets for name in names], dtype=bool)[codes])

    @property
    def sets(self) -> list[str]:
        """The sets of prompts that there are, in the rows' order."""
        return list(self._sets[1])

    @cached_property
    def _sets(self) -> tuple[NDArray[np.intp], NDArray[Any]]:
        import pandas as pd

        codes, names = pd.factorize(self["set"])
        return codes, np.asarray(names, dtype=object)

    @cached_property
    def clusters(self) -> Clusters | None:
        """None where all rows are of one seed."""
        if "seed" not in self._frame:
            return None
        import pandas as pd

        seeds, of_seed = np.unique(self["seed"], return_inverse=True)
        if len(seeds) < 2:
            return None
        ids = pd.factorize(self["id"])[0]
        prompts = np.unique(self._sets[0] * (ids.max() + 1) + ids, return_inverse=True)[1]
        return Clusters(prompts, of_seed)
