"""LoRA and projector from the folder of a training with LLaVA's own code, in any of its files:

- LoRA: `adapter_model.safetensors`, or `adapter_model.bin` of an older PEFT
- the projector: `non_lora_trainables.bin`, or `mm_projector.bin` of a training of the projector alone
- both: a checkpoint of DeepSpeed's ZeRO (`latest` names its folder), where the projector has no file of its own

A third party's pickle is read by the restricted unpickler alone.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from x2dfd.adapter import PEFT_PREFIX, WEIGHTS
from x2dfd.errors import SetupError

LORA = (WEIGHTS, "adapter_model.bin")
PROJECTOR = ("non_lora_trainables.bin", "mm_projector.bin")
ZERO = "latest"
"""The file beside DeepSpeed's checkpoints that names the newest."""

State = dict[str, Tensor]


def read_trained(folder: Path) -> tuple[State, State]:
    """LoRA's matrices and the projector, under LLaVA's names within PEFT's wrapper. Raises SetupError."""
    projector = next((folder / name for name in PROJECTOR if (folder / name).is_file()), None)
    if projector is None and (folder / ZERO).is_file():
        both = _zero_weights(folder)
        lora = {k.replace(".default.", "."): v for k, v in both.items() if ".lora_" in k}
        return lora, {k: v for k, v in both.items() if ".lora_" not in k}
    matrices = next((folder / name for name in LORA if (folder / name).is_file()), None)
    if matrices is None or projector is None:
        lacking, names = ("LoRA", LORA) if matrices is None else ("projector", PROJECTOR)
        raise SetupError(
            f"{folder} has no file of the {lacking} ({' or '.join(names)}), and no checkpoint of ZeRO",
            code="adapter_incomplete",
        )
    return _tensors(matrices), {_with_prefix(k): v for k, v in _tensors(projector).items()}


def _with_prefix(name: str) -> str:
    """A name with PEFT's prefix, which some versions of LLaVA's code omit."""
    return name if name.startswith("base_model.") else PEFT_PREFIX + name


def _tensors(path: Path) -> State:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise SetupError(f"{path} cannot be read as a table of tensors: {error}", code="adapter_unreadable") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise SetupError(f"{path} holds no table of tensors", code="adapter_unreadable")
    return tensors


def _zero_weights(folder: Path) -> State:
    """The trained weights of a ZeRO checkpoint, put together in fp32 by DeepSpeed."""
    try:
        with _safe_load():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            gathered: State = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=True)
    except ImportError as error:
        raise SetupError(
            f"{folder} holds a checkpoint of ZeRO, which DeepSpeed puts together: pip install 'x2dfd[train]'",
            code="package_missing",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise SetupError(f"{folder}: checkpoint of ZeRO cannot be read: {error}", code="adapter_unreadable") from error
    return {_with_prefix(k): v for k, v in gathered.items()}


@contextmanager
def _safe_load() -> Iterator[None]:
    """Let torch.load read nothing but tensors, plain values and DeepSpeed's own types, whatever DeepSpeed asks for."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
