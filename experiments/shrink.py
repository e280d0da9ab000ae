"""A LoRA adapter of a lower rank: the best approximation of each product B A by a truncated SVD.

    python -m experiments.shrink --adapter x2dfd/weights/embedded --rank 6 --out build/small

The projector, the experts' weights and the card's other files are copied. Training can resume from the result (`start`
of a finetune configuration). The calibration is not copied: it belongs to the adapter on which it was fitted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from x2dfd.cli import run_command
from x2dfd.files import file_sha256


def shrink(
    adapter: Annotated[Path, typer.Option(help="adapter directory")],
    rank: Annotated[int, typer.Option(help="rank to keep")],
    out: Annotated[Path, typer.Option(help="new adapter directory")],
) -> None:
    """Write the adapter with its LoRA at a lower rank, and say how much of it is kept."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, out, ignore=shutil.ignore_patterns("calibration.json", "validation.json"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    whole, kept = 0.0, 0.0
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.", ".lora_B.")
        left, sizes, right = torch.linalg.svd(tensors[other].float() @ tensors[name].float(), full_matrices=False)
        root = sizes[:rank].sqrt()
        tensors[other] = (left[:, :rank] * root).to(tensors[other].dtype).contiguous()
        tensors[name] = (root[:, None] * right[:rank]).to(tensors[name].dtype).contiguous()
        whole, kept = whole + float(sizes.square().sum()), kept + float(sizes[:rank].square().sum())
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config |= {"r": rank, "lora_alpha": config["lora_alpha"] * rank / config["r"]}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    card = json.loads((out / "card.json").read_text())
    card["sha256"] = file_sha256(out / "adapter_model.safetensors")
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    typer.echo(f"{out}: rank {rank}, {kept / whole:.1%} of the squared norm of the changes is kept")


if __name__ == "__main__":
    run_command(shrink)
