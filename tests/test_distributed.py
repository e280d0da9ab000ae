"""Two processes share one training under DeepSpeed: `make test-distributed`. Minutes, so not among the other tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file

import x2dfd
from data_gen.build import BuildConfig, build
from finetune.config import FinetuneConfig
from tests import tiny
from x2dfd.adapter import WEIGHTS, lora_b_sum, probe_logits, read_adapter_card
from x2dfd.checkpoints import load_model
from x2dfd.experts import BUILTIN

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.distributed, pytest.mark.needs_base]


def launched(launcher: str, port: int) -> list[str]:
    """The command line that starts two processes, as docs/finetune.md has it; on a machine without a GPU."""
    beside = Path(sys.executable).parent
    return {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={port}"],
        "accelerate": [
            str(beside / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", f"--main_process_port={port}",
        ],
        "deepspeed": [str(beside / "deepspeed"), "--num_gpus", "2", f"--master_port={port}"],
    }[launcher]  # fmt: skip


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_reads_every_key_of_its_json(name: str) -> None:
    """Read as something else, or refused, only after a large model was loaded on eight GPUs."""
    read = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    said = json.loads((ROOT / "finetune" / f"{name}.json").read_text())
    zero = said["zero_optimization"]
    numbers = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {k: 1 if v == "auto" else v for k, v in said.items()} | {"bf16": {"enabled": True}, "fp16": {}}
    assert set(numbers) <= {k for k, v in said.items() if v == "auto"}
    found = read(settings | {"zero_optimization": {k: 1000 if v == "auto" else v for k, v in zero.items()}}).zero_config
    assert found.stage == zero["stage"] and found.overlap_comm is zero["overlap_comm"]
    assert found.gather_16bit_weights_on_model_save is (found.stage == 3)
    for part in ("offload_optimizer", "offload_param"):
        there = getattr(found, part)
        assert (there.device if there else None) == ("cpu" if name == "zero3_offload" else None)


@pytest.mark.parametrize(
    ("launcher", "stage"),
    [("torchrun", "2"), ("torchrun", "3"), ("torchrun", "3_offload"), ("accelerate", "2"), ("deepspeed", "2")],
)
def test_two_processes_train_one_adapter(
    launcher: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 each process holds pieces: saved without gathering, the adapter is empty and still loads."""
    pytest.importorskip("deepspeed")
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    base = tiny.write_base(tmp_path / "base", tiny.processor_of_base())
    manifest = tiny.write_small_manifest(tmp_path / "data", np.asarray(skimage.data.astronaut()))
    instructions = build(BuildConfig(str(manifest), experts=(tiny.EXPERT,), cue_questions=2), tmp_path / "instructions")
    before = load_model(base)[0].state_dict()
    out = tmp_path / "adapter"
    config = FinetuneConfig(
        str(instructions), str(manifest), str(out), base=str(base), lora_r=4, lora_alpha=8, lora_dropout=0.0, lr=1e-2,
        projector_lr=1e-3, accumulate=1, max_steps=6, save_steps=100, checkpointing=True,
        deepspeed=str(ROOT / "finetune" / f"zero{stage}.json"),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launched(launcher, port), str(ROOT / "tests" / "two_processes.py"), str(tmp_path / "config.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry]
    mean = [entry["train_loss"] for entry in json.loads((out / "log.json").read_text()) if "train_loss" in entry]
    assert mean[0] < losses[0] - 0.3  # the first step's loss, and the mean over all
    state = load_file(out / WEIGHTS)
    assert lora_b_sum(out) > 0 and all(float(v.abs().sum()) > 0 for k, v in state.items() if "lora_B" in k)
    held = load_file(out / "held.safetensors")
    inner = (".base_layer", ".original_module")
    names = {
        k.removeprefix("base_model.model.").replace(inner[0], "").replace(inner[1], ""): v for k, v in held.items()
    }
    assert before.keys() <= names.keys() and all(torch.equal(v, names[k]) for k, v in before.items())
    card = read_adapter_card(out)
    loaded = x2dfd.load(f"hub:{base}+{out}", mode="paper")
    assert probe_logits(loaded.mllm) == pytest.approx(card.probes, abs=1e-3)
    assert card.figures["pictures_a_step"] == 2
