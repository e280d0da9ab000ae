"""Instruction sets of other stacks are trained on as ours are: they become one beside the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_gen.adopt import adopt
from finetune.config import FinetuneConfig
from x2dfd.files import Json


def adopted(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with every set that has no card of ours written anew under `out/sets` (`data_gen.adopt`); of
    such a set, `manifest` is the folder that its pictures' paths start at. Raises X2DFDError as `adopt` does."""
    pairs = [[v] if isinstance(v, str) else list(v) for v in (config.instructions, config.manifest)]
    if all((Path(instructions).parent / "card.json").is_file() for instructions in pairs[0]):
        return config
    for k, (instructions, manifest) in enumerate(zip(*pairs, strict=True)):
        if not (Path(instructions).parent / "card.json").is_file():
            made = adopt(Path(instructions), Path(config.out) / "sets" / str(k), pictures=Path(manifest))
            pairs[0][k], pairs[1][k] = str(made), str(made.parent / "manifest.jsonl")
    one = isinstance(config.instructions, str)
    changed: Json = {
        name: paths[0] if one else tuple(paths) for name, paths in zip(("instructions", "manifest"), pairs, strict=True)
    }
    return replace(config, **changed)
