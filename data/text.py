"""Sources of held-out benign text, on which perplexity is measured.

Each row's response is scored given its prompt. A row without a prompt is plain text, with no
template around it and scored from its second token on; where a tokenizer puts a BOS first, as
Llama's does, that is the text's first, so that perplexities of two families aren't quite of the
same thing.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from data.local import Row, locate, read_rows, require_columns, take, text_of
from data.rows import Example
from data.sources import ExampleRows, FileSource, HubSource
from settings import DataError

KIND = "benign"


class FileText(FileSource, ExampleRows):
    """Text of a local file: plain, or responses to prompts.

    A file with a response column holds prompts and responses; any other one plain text, in the
    text column. In a .txt file, the paragraphs between blank lines are the rows.

    """

    text_column: str = "text"
    prompt_column: str = "prompt"
    response_column: str = "response"

    @cached_property
    def _selected(self) -> list[Example]:
        path = locate(None, self.path)
        rows = _paragraphs(path) if path.suffix.lower() == ".txt" else read_rows(path)
        answered = bool(rows) and self.response_column in rows[0]
        columns = (self.prompt_column, self.response_column) if answered else (self.text_column,)
        require_columns(rows, columns, self.path)
        examples = []
        for number, row in enumerate(rows, 1):
            *prompt, response = (text_of(row, column, self.path, number) for column in columns)
            examples.append(Example("".join(prompt), response, KIND))
        return take(examples, self.n, self.path)


class WikiText(HubSource, ExampleRows):
    """Paragraphs of WikiText (Merity et al. 2016, arXiv 1609.07843), in the data set's order.

    Column: text, one line of an article per row: blank, a heading ("= = History = =") or a
    paragraph. Paragraphs are kept as they are, but for white space around them; the data set sets
    spaces around punctuation and writes "@-@" for a hyphen within a word.

    Perplexity over single paragraphs compares models with each other. It isn't the one of
    published tables, which is taken over whole articles.

    Attributes:
        config: The hub's subset.
        min_characters: The least characters of a paragraph that is taken.
    """

    config: str = "wikitext-2-raw-v1"
    split: str = "test"
    min_characters: int = Field(default=200, ge=1)

    hub: ClassVar[str] = "Salesforce/wikitext"

    @property
    def name(self) -> str:
        """Subset and split."""
        return f"{self.config}/{self.split}"

    @cached_property
    def _selected(self) -> list[Example]:
        where = self._where
        paragraphs = []
        for number, row in self._rows("text", config=self.config):
            # Blank lines are part of the set.
            line = "" if not str(row["text"]).strip() else self._text(row, "text", number).strip()
            if len(line) >= self.min_characters and not re.fullmatch("(= )+.*( =)+", line):
                paragraphs.append(Example("", line, KIND))
        if not paragraphs:
            raise DataError(
                f"{where} has no paragraph of {self.min_characters} characters; "
                "lower min_characters or give another file"
            )
        return take(paragraphs, self.n, where)

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row count, checksum."""
        return {**super().provenance(), "source": self.path or f"{self.hub} ({self.name})"}


def _paragraphs(path: Path) -> list[Row]:
    """What stands between blank lines, as rows; line breaks inside stay."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"the file {str(path)!r} can't be read as UTF-8 text: {error}") from error
    blocks = (block.strip() for block in re.split(r"\n(?:[^\S\n]*\n)+", text))
    return [{"text": block} for block in blocks if block]
