"""Typed settings and the errors a user reads; every other room may import this one.

`settings.process` ends a child with its parent, `settings.hub` asks the Hugging Face hub, and
`settings.progress` says how far long work is.
"""

from settings.base import Seed, Settings
from settings.build import build, plain, require_method, source, target
from settings.errors import DataError, ModelError, RelockError, SettingError, first_line

__all__ = [
    "DataError",
    "ModelError",
    "RelockError",
    "Seed",
    "SettingError",
    "Settings",
    "build",
    "first_line",
    "plain",
    "require_method",
    "source",
    "target",
]
