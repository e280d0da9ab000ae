"""The vision tower's pass alone, which is all that most verdicts need: no transformers, whose import outlasts one.

`x2dfd.tower.load_tower` gives the same tower as a model of transformers, for trainings; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor], Tensor]


class Eye:
    """CLIP's vision tower (Radford et al., arXiv 2103.00020) for inference on a CPU.

    In fp32 its products are oneDNN's: those of MKL, which torch takes otherwise, are half as quick on AMD's processors.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: int, heads: int, dtype: torch.dtype) -> None:
        self._weights = weights
        self._heads = heads
        self._layers = [self._layer(f"encoder.layers.{k}", dtype) for k in range(layers)]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output [n, 1 + patches, width], fp32, of CLIP's input [n, 3, side, side]."""
        kernel = self._weights["embeddings.patch_embedding.weight"]
        patches = F.conv2d(pixels, kernel, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
        first = self._weights["embeddings.class_embedding"].expand(len(patches), 1, -1)
        x = torch.cat([first, patches], 1) + self._weights["embeddings.position_embedding.weight"]
        states = [self._norm("pre_layrnorm")(x)]
        for layer in self._layers:
            states.append(layer(states[-1]))
        return tuple(states)

    def _layer(self, name: str, dtype: torch.dtype) -> Layer:
        asked = self._linear(dtype, *(f"{name}.self_attn.{k}_proj" for k in "qkv"))
        out, wide, back = (
            self._linear(dtype, f"{name}.{k}") for k in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        )
        before, between = self._norm(f"{name}.layer_norm1"), self._norm(f"{name}.layer_norm2")

        def run(x: Tensor) -> Tensor:
            n, tokens, width = x.shape
            q, k, v = asked(before(x)).view(n, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
            x = x + out(seen)
            h = wide(between(x))
            return x + back(h * torch.sigmoid(1.702 * h))

        return run

    def _norm(self, name: str) -> Layer:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return lambda x: F.layer_norm(x, weight.shape, weight, bias)

    def _linear(self, dtype: torch.dtype, *names: str) -> Layer:
        """Linear layers side by side; their results in `dtype`."""
        weight, bias = (torch.cat([self._weights[f"{n}.{part}"] for n in names]) for part in ("weight", "bias"))
        if dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            weight, bias = weight.to(dtype), bias.to(dtype)
            return lambda x: F.linear(x.to(dtype), weight, bias)
        packed, added = weight.to_mkldnn(), bias.to_mkldnn()
        return lambda x: torch.ops.aten.mkldnn_linear(x.to_mkldnn(), packed, added).to_dense()
