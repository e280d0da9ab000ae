"""What tests/test_distributed.py starts twice: a tiny training under DeepSpeed, and what became of the base's weights.

torchrun --nproc_per_node 2 tests/two_processes.py CONFIG.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from finetune.config import FinetuneConfig, load_config
from finetune.train import train
from tests import tiny
from x2dfd.experts import BUILTIN


def main(config: FinetuneConfig) -> None:
    torch.set_num_threads(1)
    BUILTIN[tiny.EXPERT] = tiny.EXPERT_TARGET
    plain = Accelerator.get_state_dict

    def kept(self: Accelerator, *given: Any, **named: Any) -> Any:
        """What the processes hold together at the end, put aside for the test."""
        state = plain(self, *given, **named)
        if self.is_main_process:
            frozen = {k: v for k, v in state.items() if "lora" not in k and "modules_to_save" not in k}
            save_file({k: v.clone() for k, v in frozen.items()}, Path(config.out) / "held.safetensors")
        return state

    Accelerator.get_state_dict = kept
    train(config)


if __name__ == "__main__":
    main(load_config(Path(sys.argv[-1])))
