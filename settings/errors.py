"""Errors whose message is one sentence for the user: what is wrong, and what to write instead."""

from __future__ import annotations


class RelockError(Exception):
    """The root of every error that is shown as a sentence and not as a stack trace."""


class SettingError(RelockError, ValueError):
    """A setting has a wrong name, type, range, or doesn't go with another one."""


class DataError(RelockError):
    """Rows are missing, too few, or not of the schema that was asked for."""


class ModelError(RelockError):
    """A checkpoint is missing, incomplete, damaged, or of the wrong kind."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; its class where it is mute."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
