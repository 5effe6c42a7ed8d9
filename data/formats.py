"""The formats in which people keep training rows, recognised by their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from data.local import Row, require_columns, text_of
from data.rows import Dialogue, Example, PreferencePair, Turn, with_input
from settings import DataError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class Format(NamedTuple):
    """A format: its name, the columns that a row of it has, and how its turns are read."""

    name: str
    columns: tuple[str, ...]
    turns: Callable[[Row, str, int], Sequence[Turn]]


def columns(prompt: str, response: str, text: str | None = None) -> Format:
    """Rows with the user's turn and the assistant's in two columns.

    Args:
        prompt: The user's column.
        response: The assistant's column.
        text: A column of the input that an instruction speaks of, which a row may lack.
    """

    def turns(row: Row, where: str, number: int) -> list[Turn]:
        if isinstance(row[prompt], list) and isinstance(row[response], list):
            return [*_turns(row, prompt, where, number), *_turns(row, response, where, number)]
        asked = text_of(row, prompt, where, number)
        if text is not None:
            asked = with_input(asked, str(row.get(text) or ""))
        answer = text_of(row, response, where, number)
        return [Turn("user", asked), Turn("assistant", answer, trained=True)]

    return Format(f"{prompt}/{response}", (prompt, response), turns)


def _dialogue(column: str) -> Format:
    return Format(column, (column,), lambda row, where, number: _turns(row, column, where, number))


FORMATS = (
    _dialogue("messages"),
    _dialogue("conversations"),
    columns("prompt", "response"),
    columns("prompt", "completion"),
    columns("instruction", "output", "input"),
    columns("instruction", "response", "context"),
)
"""Chat format of fine-tuning APIs and of TRL; ShareGPT; this project's own; TRL's prompt and
completion, as texts or messages; Alpaca; Dolly."""


def recognise(rows: Sequence[Row], where: str) -> Format:
    """The format of which every row has the columns.

    Raises:
        DataError: There are no rows, the first has no known format's columns (it lists what is
            known), or another row departs from the first one's format.
    """
    require_columns(rows, (), where)
    for known in FORMATS:
        if all(_has(row, known) for row in rows):
            return known
    first = next((known for known in FORMATS if _has(rows[0], known)), None)
    if first is None:
        listed = "; ".join(" and ".join(known.columns) for known in FORMATS)
        raise DataError(
            f"{where} has the columns {', '.join(map(str, rows[0]))}, of no known format (known: "
            f"{listed}); rename them, or set prompt_column and response_column"
        )
    number, row = next(each for each in enumerate(rows, 1) if not _has(each[1], first))
    raise DataError(
        f"{where} has the columns {', '.join(map(str, row))} in row {number}, but "
        f"{' and '.join(first.columns)} in row 1; give rows of one format, or set prompt_column "
        "and response_column to what all rows have"
    )


def _has(row: Row, known: Format) -> bool:
    return set(known.columns) <= row.keys()


def example(turns: Sequence[Turn], kind: str, category: str, where: str, number: int) -> Example:
    """A dialogue as a training row that ends with the last answer that is trained on.

    Raises:
        DataError: There is none, or no question stands before it.
    """
    last = max((at for at, turn in enumerate(turns) if turn.trained), default=0)
    first = next((turn.role for turn in turns if turn.role != "system"), "")
    if last == 0 or turns[last - 1].role != "user" or first != "user":
        raise DataError(
            f"{where} has no answer to a user's turn to train on, or begins with an answer, in row "
            f"{number}; each row needs a user's turn first and an answer last"
        )
    history, prompt, response = tuple(turns[: last - 1]), turns[last - 1].text, turns[last].text
    if history:
        return Dialogue(prompt, response, kind, category, history)
    return Example(prompt, response, kind, category)


def pair(row: Row, names: tuple[str, str, str], where: str, number: int) -> PreferencePair:
    """A preference pair of a row with these columns of the prompt, the chosen and the rejected.

    As in TRL each is a text or a list of messages; where both answers hold the prompt's messages
    too, there need be no prompt.

    Raises:
        DataError: It is something else, or holds more than one question and its two answers.
    """
    prompt, *answers = names
    if not isinstance(row[answers[0]], list):
        texts = [text_of(row, column, where, number) for column in names]
        return PreferencePair(*texts)
    head = list(_turns(row, prompt, where, number)) if row.get(prompt) else []
    dialogues = [[*head, *_turns(row, column, where, number)] for column in answers]
    roles = [[turn.role for turn in turns] for turns in dialogues]
    if roles != [["user", "assistant"]] * 2 or len({turns[0].text for turns in dialogues}) > 1:
        raise DataError(
            f"{where} should hold one user's turn and two answers to it in row {number}; pairs "
            "with a system line or several turns aren't read"
        )
    return PreferencePair(dialogues[0][0].text, *(turns[1].text for turns in dialogues))


def _turns(row: Row, column: str, where: str, number: int) -> list[Turn]:
    """The turns of a column of messages, {"role", "content"} or ShareGPT's {"from", "value"}."""
    messages = row[column]
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise DataError(
            f"{where} has {messages!r} in column {column!r} of row {number}; each row needs a list "
            "of messages there"
        )
    return [_turn(message, f"{where}, row {number}", at) for at, message in enumerate(messages, 1)]


def _turn(message: Mapping[str, Any], where: str, at: int) -> Turn:
    name = str(message.get("role") or message.get("from"))
    role = _ROLES.get(name.lower())
    text = message.get("content") if "role" in message else message.get("value")
    if isinstance(text, list) and all(_is_text(part) for part in text):
        text = "".join(part["text"] for part in text)
    if role is None or not isinstance(text, str) or (role != "system" and not text.strip()):
        raise DataError(
            f"{where} has a message {at} of the role {name!r} that isn't a text; only system "
            "lines and texts of user and assistant can be trained on"
        )
    # Fine-tuning APIs leave answers of weight 0 out of the loss.
    return Turn(role, text, trained=role == "assistant" and message.get("weight", 1) != 0)


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        return False
    return isinstance(part.get("text"), str)
