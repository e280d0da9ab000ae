"""Instruction sets of other stacks: each is converted to one of ours in the adapter directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_gen.adopt import adopt
from finetune.config import FinetuneConfig


def adopted(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with every set that lacks a card of ours converted to `out/sets` (`data_gen.adopt`). For such a
    set, `manifest` names the folder of its pictures. Raises X2DFDError as `adopt` does."""
    pairs = [[v] if isinstance(v, str) else list(v) for v in (config.instructions, config.manifest)]
    if all((Path(instructions).parent / "card.json").is_file() for instructions in pairs[0]):
        return config
    for k, (instructions, manifest) in enumerate(zip(*pairs, strict=True)):
        if not (Path(instructions).parent / "card.json").is_file():
            adopted_path = adopt(Path(instructions), Path(config.out) / "sets" / str(k), pictures=Path(manifest))
            pairs[0][k], pairs[1][k] = str(adopted_path), str(adopted_path.parent / "manifest.jsonl")
    single = isinstance(config.instructions, str)
    instructions_paths, manifest_paths = (paths[0] if single else tuple(paths) for paths in pairs)
    return replace(config, instructions=instructions_paths, manifest=manifest_paths)
