"""The vision tower's forward pass, which is all that most verdicts need.

It does without transformers, whose import takes longer than a verdict. `x2dfd.tower.load_tower` gives the same tower as
a model of transformers, for trainings; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor], Tensor]


class TowerPass:
    """CLIP's vision tower (Radford et al., arXiv 2103.00020) for inference on a CPU.

    Its matrix products are oneDNN's: MKL's, which torch uses in fp32 otherwise, are half as quick on AMD's processors.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: int, heads: int, dtype: torch.dtype) -> None:
        """`weights`: fp32, by the names of CLIP in transformers; `dtype` (fp32 or bf16): of the matrix products."""
        self._kernel = weights["embeddings.patch_embedding.weight"]
        self._class_embedding = weights["embeddings.class_embedding"]
        self._positions = weights["embeddings.position_embedding.weight"]
        self._pre_norm = _norm(weights, "pre_layrnorm")
        self._layers = [_layer(weights, f"encoder.layers.{k}", heads, dtype) for k in range(layers)]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output [n, 1 + patches, width], fp32, of CLIP's input [n, 3, side, side]."""
        patches = F.conv2d(pixels, self._kernel, stride=self._kernel.shape[2:]).flatten(2).transpose(1, 2)
        x = torch.cat([self._class_embedding.expand(len(patches), 1, -1), patches], 1) + self._positions
        states = [self._pre_norm(x)]
        for layer in self._layers:
            states.append(layer(states[-1]))
        return tuple(states)


def _layer(weights: Mapping[str, Tensor], name: str, heads: int, dtype: torch.dtype) -> Layer:
    qkv = _linear(weights, dtype, *(f"{name}.self_attn.{k}_proj" for k in "qkv"))
    attention_out = _linear(weights, dtype, f"{name}.self_attn.out_proj")
    # CLIP's activation is x * sigmoid(1.702 x), that is swish(1.702 x) / 1.702, and oneDNN has swish.
    expand = _linear(weights, dtype, f"{name}.mlp.fc1", scale=1.702, activation="swish")
    contract = _linear(weights, dtype, f"{name}.mlp.fc2", input_scale=1 / 1.702)
    norm1, norm2 = _norm(weights, f"{name}.layer_norm1"), _norm(weights, f"{name}.layer_norm2")

    def run(x: Tensor) -> Tensor:
        x = x + attention_out(_attention(*qkv(norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)))
        return x + contract(expand(norm2(x)))

    return run


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, [n, heads, tokens, d] each: [n, tokens, heads * d].

    In bf16, two products by oneDNN take half the time of torch's fused kernel on a CPU; in fp32 they take longer.
    """
    if q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    attention = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).softmax(-1)
    return torch.matmul(attention, v).transpose(1, 2).flatten(2)


def _norm(weights: Mapping[str, Tensor], name: str) -> Layer:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return lambda x: F.layer_norm(x, weight.shape, weight, bias)


def _linear(
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    *names: str,
    scale: float = 1.0,
    input_scale: float = 1.0,
    activation: Literal["none", "swish"] = "none",
) -> Layer:
    """Linear layers with joined outputs, in `dtype`. Inputs are multiplied by `input_scale`, outputs by `scale`."""
    weight, bias = (torch.cat([weights[f"{n}.{part}"] for n in names]).mul_(scale) for part in ("weight", "bias"))
    weight, bias = weight.mul_(input_scale).to(dtype), bias.to(dtype)
    one_dnn = torch.backends.mkldnn.is_available()
    if one_dnn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # laid out once as oneDNN's products want it
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, activation, [], "")
    function: Layer = F.silu if activation == "swish" else lambda x: x
    return lambda x: function(F.linear(x.to(dtype), weight, bias))
