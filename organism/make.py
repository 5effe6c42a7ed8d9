"""Remakes the organism's weights: `python -m organism.make`.

Bit for bit on one machine with the same library versions: fixed seeds, two threads,
deterministic algorithms, a generator of its own for every stage. Another processor may round
otherwise; `--check` tells.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
RECIPE = HERE.parent / "conf" / "align" / "organism.yaml"
FOLDERS = ("base", "moderation", "aligned")
THREADS = 2


def make_aligned(base: Path, folder: Path) -> None:
    """Align `base` by the recipe of `conf/align/organism.yaml` and write its adapter to `folder`.

    The adapter's config is written in one order and names the base by its place in the project,
    so that the same adapter always gives the same files.
    """
    from omegaconf import OmegaConf

    from modeling.alignment import Alignment
    from modeling.chat import PromptStyle
    from modeling.checkpoint import Checkpoint
    from modeling.training import PROJECTIONS
    from organism.sources import AlignmentExamples, AlignmentPairs
    from settings.build import plain

    model = {"lora_targets": list(PROJECTIONS)}
    node = OmegaConf.create({"model": model, "align": OmegaConf.load(RECIPE)})
    OmegaConf.resolve(node)
    settings = plain(OmegaConf.to_container(node.align))
    recipe = Alignment.validated({**settings, "seed": 0}, "align")
    rows = [row.turns for row in AlignmentExamples().examples()]
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in AlignmentPairs().pairs()]
    with tempfile.TemporaryDirectory() as scratch:
        rows, pairs = rows[: recipe.n_sft], pairs[: recipe.n_pairs]
        recipe.run(Checkpoint(str(base)), rows, pairs, PromptStyle(), folder, Path(scratch))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "organism/weights/base"
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(output: Path) -> None:
    """Make all three folders below `output`."""
    import torch

    from organism.moderation import train_moderation
    from organism.pretrain import pretrain

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    pretrain(output / "base")
    train_moderation(output / "moderation")
    make_aligned(output / "base", output / "aligned")


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file of the three folders, by its path below `root`."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def differences(shipped: Path, remade: Path) -> list[str]:
    """Files that differ between two sets of weights, or are in one of them only."""
    ours, theirs = digests(shipped), digests(remade)
    return sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )


def main() -> int:
    """Make the weights, or check the shipped ones; the exit status is 1 where they differ."""
    parser = argparse.ArgumentParser(description="Remake the organism's weights.")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where to write them")
    parser.add_argument(
        "--check", action="store_true", help="remake elsewhere and compare with the shipped ones"
    )
    options = parser.parse_args()
    if not options.check:
        make(options.output)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        changed = differences(WEIGHTS, Path(folder))
    for name in changed:
        print(f"differs: {name}")
    print("the shipped weights were remade" if not changed else f"{len(changed)} files differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
