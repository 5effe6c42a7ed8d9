"""Published prompt sets for harmfulness and over-refusal, from the hub or from local files."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pydantic import Field, model_validator

from data.hub import fetch_files, load_split
from data.local import (
    Row,
    harm_category,
    locate,
    matches,
    read_cells,
    read_rows,
    require_columns,
    take,
)
from data.rows import Prompt, Role, with_context, with_input
from data.sources import PromptRows
from settings import DataError


class PublishedPrompts(PromptRows):
    """A published set of prompts; `conf/prompts` holds one file per set.

    Where copies of a set name a column differently, several names are given, and the first that
    is there counts.

    Attributes:
        name: Name of the set, which starts the ids of its prompts.
        role: What it is asked for: "harmful", "over_refusal" (harmless prompts that a model may
            take for harmful ones) or "benign".
        root: Folder of the local file, or None to load from the hub.
        file: The local file below `root`.
        hub: Id of the data set on the hub.
        configs: The hub's subsets that make up the set, one after the other; none where the data
            set has no subsets.
        split: Split on the hub.
        hub_files: Instead of splits, CSV files of the hub's repository that have no header: the
            first cell of a line is the prompt, and the file's name the category.
        revision: Hub revision, or None for the newest.
        text: Column of the prompt.
        context: Column of what the prompt is about, which stands before it; none for most sets.
        input: Column of an Alpaca prompt's input, which stands after it; none for most sets.
        category: Column of the category; none where there is none.
        where: Rows are kept whose columns have these values, e.g. {label: safe}.
        expect: How many rows the whole set has; another number is refused. Several where several
            releases differ; None where any number will do.
        start: How many of the rows are skipped.
        every: Of the rows from there on, every so many-th is taken: 2 takes half of them, and the
            same with the next `start` the other half.
    """

    name: str
    role: Role
    root: str | None = None
    file: str
    hub: str
    configs: tuple[str, ...] = ()
    split: str = "train"
    hub_files: tuple[str, ...] = ()
    revision: str | None = None
    text: tuple[str, ...]
    context: tuple[str, ...] = ()
    input: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    where: dict[str, str | int | bool] = Field(default_factory=dict)
    expect: int | tuple[int, ...] | None = None
    start: int = Field(0, ge=0)
    every: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_way_to_read(self) -> PublishedPrompts:
        if self.hub_files and self.configs:
            raise ValueError("hub_files and configs are both given; leave one of them empty")
        return self

    @cached_property
    def _whole(self) -> list[Prompt]:
        rows = self._rows()
        require_columns(rows, self.where, self._where)
        prompts = [
            self._prompt(row, number)
            for number, row in enumerate(rows, 1)
            if matches(row, self.where)
        ]
        expected = (self.expect,) if isinstance(self.expect, int) else self.expect
        if expected is not None and len(prompts) not in expected:
            stated = " or ".join(map(str, expected))
            raise DataError(
                f"{self._where} holds {len(prompts)} prompts of {self.name} instead of {stated}; "
                f"give the whole set, or set its expect to null to take what there is "
                f"(+prompts.{self.name}.expect=null)"
            )
        return prompts

    @cached_property
    def _selected(self) -> list[Prompt]:
        where = f"{self._where} after its first {self.start}" if self.start else self._where
        return take(self._whole[self.start :: self.every], self.n, where)

    def provenance(self) -> dict[str, Any]:
        """Where the prompts come from, for a run's record: source, commit, counts, checksum."""
        return {**super().provenance(), "role": self.role, "rows": len(self._whole)}

    @property
    def _where(self) -> str:
        if self.root is not None:
            return self.file
        subsets = f"{', '.join(self.configs)}: " if self.configs else ""
        part = f"{len(self.hub_files)} files" if self.hub_files else f"{subsets}{self.split}"
        return f"{self.hub} ({part})"

    def _rows(self) -> list[Row]:
        if self.root is not None:
            hub = f", or its root to null to read the hub (+prompts.{self.name}.root=null)"
            return read_rows(locate(self.root, self.file, "data.prompts or data.root", hub))
        instead = f"data.prompts to a folder with {self.file}"
        rows: list[Row] = []
        if self.hub_files:
            paths, commit = fetch_files(self.hub, self.hub_files, self.revision, instead)
            self._commits.append(commit)
            for path in paths:
                rows += ({self.text[0]: c[0], "category": path.stem} for c in read_cells(path))
            return rows
        for config in self.configs or (None,):
            part, commit = load_split(self.hub, config, self.split, self.revision, instead)
            rows += part
            self._commits.append(commit)
        return rows

    def _prompt(self, row: Row, number: int) -> Prompt:
        column = _present(row, self.text)
        if column is None:
            raise DataError(
                f"{self._where} has no column {' or '.join(map(repr, self.text))} in row {number} "
                f"(it has {', '.join(map(str, row))}); rename the column or set its name"
            )
        text = self._text(row, column, number).strip()
        text = with_input(text, str(row.get(_present(row, self.input)) or ""))
        text = with_context(text, str(row.get(_present(row, self.context)) or ""))
        category = harm_category(row.get(_present(row, self.category)))
        return Prompt(f"{self.name}/{number}", text, category)


def _present(row: Row, names: tuple[str, ...]) -> Any:
    """The first of `names` that is a column of this row, or None: subsets differ in columns."""
    return next((name for name in names if name in row), None)
