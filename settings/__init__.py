"""Typed settings and the errors a user reads; every other room may import this one."""

from settings.base import Settings
from settings.build import build, plain, target
from settings.errors import DataError, ModelError, RelockError, SettingError

__all__ = [
    "DataError",
    "ModelError",
    "RelockError",
    "SettingError",
    "Settings",
    "build",
    "plain",
    "target",
]
