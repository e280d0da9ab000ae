"""`python -m finetune.split --model SPEC --out DIR`: an adapter as engines serve it.

vLLM and SGLang take LoRA matrices only, and our adapters train the projector too. So the projector and the choice of
layers go into a copy of the base with unchanged language weights (`OUT/base`), and the matrices become a PEFT adapter
for it (`OUT/lora`). Card and calibration stay where they are: the client reads them from the adapter directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from x2dfd import prompts
from x2dfd.adapter import EMBEDDED, PEFT_PREFIX, WEIGHTS, check_adapter, check_fit, read_adapter_card
from x2dfd.checkpoints import base_identity, load_model
from x2dfd.cli import run_command
from x2dfd.errors import SetupError
from x2dfd.files import atomic_write, read_json, write_text
from x2dfd.model_spec import ModelSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM accepts as --max-lora-rank."""


def split(source: str | Path | ModelSpec, out: Path) -> tuple[Path, Path, int]:
    """Write both folders; returns them and the adapter's rank. Raises SetupError for what loading refuses too."""
    spec = ModelSpec.parse(source)
    base, adapter = spec.base, EMBEDDED if spec.embedded else spec.adapter
    if adapter is None or spec.url is not None:
        raise SetupError(f"{spec} names no adapter to split: give DIR, or hub:NAME+DIR", code="adapter_missing")
    card = read_adapter_card(adapter)
    if card.tower != "frozen":
        raise SetupError(f"{adapter} changes the vision tower: python -m finetune merge", code="tower_changed")
    model, processor = load_model(
        base,
        tower_layers=card.tower_layers or None,
        text_layers=card.text_layers or None,
        feature_layers=card.feature_layers or None,
    )
    prompts.set_chat_template(processor, card.frame)  # and the engine's chats have it too
    check_adapter(adapter, card, base_identity(base), prompts.prompt_hash(processor, card.score_form))
    check_fit(model, adapter)
    state = load_file(adapter / WEIGHTS)
    matrices = {k: v for k, v in state.items() if ".lora_A." in k or ".lora_B." in k}
    whole_tensors = {k.removeprefix(PEFT_PREFIX): v for k, v in state.items() if k not in matrices}
    parameters = dict(model.named_parameters())
    if unknown := sorted(whole_tensors.keys() - parameters.keys()):
        raise SetupError(f"{adapter / WEIGHTS}: neither LoRA nor a whole module: {unknown[0]}", code="tensor_unknown")
    with torch.no_grad():
        for name, value in whole_tensors.items():
            parameters[name].copy_(value)
    whole, lora = out / "base", out / "lora"
    model.save_pretrained(whole)
    processor.save_pretrained(whole)
    lora.mkdir(parents=True, exist_ok=True)
    with atomic_write(lora / WEIGHTS) as temporary:
        save_file(matrices, temporary, {"format": "pt"})
    config = read_json(adapter / "adapter_config.json")
    config |= {"modules_to_save": None, "base_model_name_or_path": str(whole)}
    write_text(lora / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    return whole, lora, int(config["r"])


def _run(
    out: Annotated[Path, typer.Option(help="folder for base/ and lora/")],
    model: Annotated[str, typer.Option(metavar="SPEC", help="embedded, DIR, or hub:NAME+DIR")] = "embedded",
) -> None:
    """Split an adapter into a base and a LoRA that vLLM and SGLang can serve."""
    whole, lora, rank = split(model, out)
    allowed = next((r for r in RANKS if r >= rank), rank)
    print(f"vllm serve {whole} --enable-lora --max-lora-rank {allowed} --lora-modules x2dfd={lora}")


if __name__ == "__main__":
    run_command(_run, "Example:\n\n  python -m finetune.split --model build/adapter --out build/served")
