"""The roofline: the least time that the counted operations can take on this machine, operation by operation. Every
matrix product, convolution and attention of a call is counted from its shapes while it runs. Its bound is the longer of
its FLOPs at the measured matrix rate and its bytes at the measured reading rate; a call's is their sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from finetune.gpu import matmul_rate, median_seconds

READ_SIDE = 8192  # of the square matrix whose product with a vector measures how quickly weights are read


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.mkldnn._linear_pointwise: lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1],
    torch.ops.onednn.qlinear_pointwise: lambda x, *_, out_val, **__: 2 * x.numel() * out_val.shape[-1],
}


@dataclass(frozen=True)
class Rates:
    """The measured rates of a device."""

    flop_per_s: float  # of a large square matrix product
    bytes_per_s: float  # of a matrix read once, for its product with a vector

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Rates:
        """`dtype`: of the products; with int8 they are of bytes, and the other operations in fp32."""
        numbers = torch.float32 if dtype == torch.int8 else dtype
        weights = torch.ones(READ_SIDE, READ_SIDE, device=device, dtype=numbers)
        vector = torch.ones(READ_SIDE, device=device, dtype=numbers)
        reading = median_seconds(lambda: weights @ vector, device, 10)
        side = 1024 if device.type == "cpu" else 8192
        return cls(matmul_rate(device, dtype, side), weights.numel() * weights.element_size() / reading)

    def better(self, other: Rates) -> Rates:
        """The higher of each: a rate that a busy moment lowered would make the bound too easy."""
        return Rates(max(self.flop_per_s, other.flop_per_s), max(self.bytes_per_s, other.bytes_per_s))


class Operations(TorchDispatchMode):
    """A context that counts (FLOPs, bytes) of each operation of this thread that has a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # under inference_mode a linear layer arrives whole
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if formula is not None:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.counts.append(
                (int(formula(*args, **kwargs, out_val=out)), sum(t.numel() * t.element_size() for t in tensors))
            )
        return out

    @property
    def flop(self) -> int:
        return sum(flop for flop, _ in self.counts)

    def bound(self, rates: Rates) -> float:
        """Seconds."""
        return sum(max(flop / rates.flop_per_s, size / rates.bytes_per_s) for flop, size in self.counts)
