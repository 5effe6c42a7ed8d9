"""Model folders that appear complete or not at all, and what lies in them beside the weights."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from settings import ModelError

# What a tokenizer and its chat template, and `generate`, read.
_BESIDES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)
_NEVER = (".bin", ".safetensors", ".pt", ".pth", ".py")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` that becomes `out` when the block ends without an error.

    Args:
        out: The folder; must be missing or empty.

    Raises:
        ModelError: It holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{str(out)!r} isn't empty; export to a new folder")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def copy_besides(source: Path, out: Path) -> None:
    """Copies tokenizer, chat template and generation config, but neither weights nor code."""
    for path in (path for pattern in _BESIDES for path in source.glob(pattern)):
        if path.is_file() and path.suffix not in _NEVER:
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
