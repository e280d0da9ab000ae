"""The vision tower's forward pass, which is all that most verdicts need.

It does without transformers, whose import takes longer than a verdict. `x2dfd.tower.load_tower` gives the same tower as
a model of transformers, for trainings; the tests compare the two.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from x2dfd.errors import SetupError

Layer = Callable[[Tensor], Tensor]


class InputRange(NamedTuple):
    """What the inputs of a linear layer are divided by, and between which values they lie then; for 8 bits."""

    divisor: Tensor  # [in]
    low: float
    high: float

    def fits(self, weight: Tensor) -> bool:
        """Whether this is a range of the inputs of a weight [out, in]."""
        usable = self.divisor.shape == weight.shape[1:] and bool((self.divisor.isfinite() & (self.divisor > 0)).all())
        return usable and -math.inf < self.low <= self.high < math.inf


Observer = Callable[[str, Tensor, Tensor], None]
"""Called with the name of each product (see `InputRange`), its inputs [..., in] and its weight [out, in]."""


class TowerPass:
    """CLIP's vision tower (Radford et al., arXiv 2103.00020) for inference on a CPU.

    Its matrix products are oneDNN's: MKL's, which torch uses in fp32 otherwise, are half as quick on AMD's processors.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layers: int,
        heads: int,
        dtype: torch.dtype,
        ranges: Mapping[str, InputRange] | None = None,
        observe: Observer | None = None,
    ) -> None:
        """`weights`: fp32, by the names of CLIP in transformers; `dtype` (fp32, bf16, int8): of the matrix products.

        `ranges`, for int8: by the names that `observe` gets, which measures them in fp32.
        """
        self._kernel = weights["embeddings.patch_embedding.weight"]
        self._class_embedding = weights["embeddings.class_embedding"]
        self._positions = weights["embeddings.position_embedding.weight"]
        self._pre_norm = _norm(weights, "pre_layrnorm")
        names = [f"encoder.layers.{k}" for k in range(layers)]
        if dtype == torch.int8:
            if not adds_bytes_in_full():
                raise SetupError("int8 needs a CPU with VNNI; take --dtype fp32", code="int8_unsupported")
            self._layers = [_layer_in_8_bits(weights, n, heads, ranges or {}) for n in names]
        else:
            self._layers = [_layer(weights, n, heads, dtype, observe) for n in names]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output [n, 1 + patches, width], fp32, of CLIP's input [n, 3, side, side]."""
        patches = F.conv2d(pixels, self._kernel, stride=self._kernel.shape[2:]).flatten(2).transpose(1, 2)
        x = torch.cat([self._class_embedding.expand(len(patches), 1, -1), patches], 1) + self._positions
        states = [self._pre_norm(x)]
        for layer in self._layers:
            states.append(layer(states[-1]))
        return tuple(states)


Product = Literal["qkv", "attention_out", "expand", "contract"]


def _joined(weights: Mapping[str, Tensor], name: str) -> dict[Product, tuple[Tensor, Tensor]]:
    """Weight [out, in] and bias of each product of a layer.

    CLIP's activation is x * sigmoid(1.702 x), that is swish(1.702 x) / 1.702, and oneDNN has swish.
    """
    prefixes = [f"{name}.self_attn.{k}_proj" for k in "qkv"]
    qkv = tuple(torch.cat([weights[f"{n}.{part}"] for n in prefixes]) for part in ("weight", "bias"))
    out, fc1, fc2 = (
        (weights[f"{name}.{n}.weight"], weights[f"{name}.{n}.bias"])
        for n in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    )
    return {
        "qkv": (qkv[0], qkv[1]),
        "attention_out": out,
        "expand": (fc1[0] * 1.702, fc1[1] * 1.702),
        "contract": (fc2[0] / 1.702, fc2[1]),
    }


def _layer(weights: Mapping[str, Tensor], name: str, heads: int, dtype: torch.dtype, observe: Observer | None) -> Layer:
    products: dict[Product, Layer] = {}
    for product, (weight, bias) in _joined(weights, name).items():
        linear = _linear(weight, bias, dtype, "swish" if product == "expand" else "none")
        products[product] = linear if observe is None else _observed(linear, observe, f"{name}.{product}", weight)
    norm1, norm2 = _norm(weights, f"{name}.layer_norm1"), _norm(weights, f"{name}.layer_norm2")
    return _assembled(products, norm1, norm2, heads)


def _assembled(products: Mapping[Product, Layer], norm1: Layer, norm2: Layer, heads: int) -> Layer:
    def run(x: Tensor) -> Tensor:
        q, k, v = products["qkv"](norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + products["attention_out"](_attention(q, k, v))
        return x + products["contract"](products["expand"](norm2(x)))

    return run


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, [n, heads, tokens, d] each: [n, tokens, heads * d].

    In bf16, two products by oneDNN take half the time of torch's fused kernel on a CPU; in fp32 they take longer.
    """
    if q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    attention = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).softmax(-1)
    return torch.matmul(attention, v).transpose(1, 2).flatten(2)


def _norm(weights: Mapping[str, Tensor], name: str, step: _Bytes | None = None) -> Layer:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if step is not None:
        weight, bias = weight * step.factor, bias * step.factor + step.shift
    return lambda x: F.layer_norm(x, weight.shape, weight, bias)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype, activation: Literal["none", "swish"]) -> Layer:
    weight, bias = weight.to(dtype), bias.to(dtype)
    one_dnn = torch.backends.mkldnn.is_available()
    if one_dnn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # laid out once as oneDNN's products want it
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, activation, [], "")
    function: Layer = F.silu if activation == "swish" else lambda x: x
    return lambda x: function(F.linear(x.to(dtype), weight, bias))


def _observed(linear: Layer, observe: Observer, name: str, weight: Tensor) -> Layer:
    def run(x: Tensor) -> Tensor:
        observe(name, x, weight)
        return linear(x)

    return run


def _layer_in_8_bits(weights: Mapping[str, Tensor], name: str, heads: int, ranges: Mapping[str, InputRange]) -> Layer:
    """A layer whose products multiply bytes: inputs rounded to 0 to 255 by their `InputRange`, weights to -127 to 127.

    A channel's divisor moves its outliers from the inputs into the weights (SmoothQuant, arXiv 2211.10438). Scaling and
    shifting the inputs cost nothing: the norms do it, or the values that attention averages.
    """
    joined = _joined(weights, name)
    steps: dict[Product, _Bytes] = {}
    for product, (weight, _) in joined.items():
        inputs = ranges.get(f"{name}.{product}")
        if inputs is None or not inputs.fits(weight):
            raise SetupError(
                f"the ranges for int8 lack those of {name}.{product}, or do not fit it; measure them again",
                code="ranges_unreadable",
            )
        steps[product] = _Bytes(inputs)
    weight, bias = joined["qkv"]  # copies
    values = slice(2 * len(weight) // 3, None)  # the last third, after queries and keys
    weight[values] *= steps["attention_out"].factor[:, None]
    bias[values] = bias[values] * steps["attention_out"].factor + steps["attention_out"].shift
    products: dict[Product, Layer] = {
        product: step.linear(*joined[product], "swish" if product == "expand" else "none")
        for product, step in steps.items()
    }
    last, contract = steps["contract"], products["contract"]
    products["contract"] = lambda x: contract(x.mul_(last.factor).add_(last.shift))
    norm1 = _norm(weights, f"{name}.layer_norm1", steps["qkv"])
    norm2 = _norm(weights, f"{name}.layer_norm2", steps["expand"])
    return _assembled(products, norm1, norm2, heads)


class _Bytes:
    """How the inputs x of a product become bytes: the integer part of x * factor + shift, from 0 to 255."""

    def __init__(self, inputs: InputRange) -> None:
        low, high = min(inputs.low, 0.0), max(inputs.high, 1e-6)
        self._step = (high - low) / 255
        self._zero = round(-low / self._step)
        self._divisor = inputs.divisor
        self.factor = 1 / (inputs.divisor * self._step)
        self.shift = self._zero + 0.5

    def linear(self, weight: Tensor, bias: Tensor, activation: Literal["none", "swish"]) -> Layer:
        """A linear layer for inputs that are scaled and shifted already."""
        product = _byte_product(weight * self._divisor, bias, self._step, self._zero, activation)
        return lambda x: product(x.clamp_(0, 255).to(torch.uint8).flatten(0, -2)).unflatten(0, x.shape[:-1])


def _byte_product(weight: Tensor, bias: Tensor, step: float, zero: int, activation: Literal["none", "swish"]) -> Layer:
    """The product of bytes [n, in], which mean (x - zero) * step, with a weight [out, in] in 8 bits a row: fp32.

    The weight is used up.
    """
    scale = torch.maximum(weight.amax(1), -weight.amin(1)).clamp_(min=1e-12) / 127
    packed = torch.ops.onednn.qlinear_prepack(weight.div_(scale[:, None]).round_().to(torch.int8), None)
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    return lambda x: torch.ops.onednn.qlinear_pointwise(
        x, step, zero, packed, scale, zeros, bias, 1.0, 0, torch.float32, activation, [], ""
    )


@cache
def adds_bytes_in_full() -> bool:
    """Whether this CPU adds products of bytes in full. Without VNNI, the sums of pairs are cut off at 32,767."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False  # torch has these products for x86 alone
    x, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127.0)
    product = _byte_product(weight.clone(), torch.zeros(16), 1.0, 0, "none")(x)
    return torch.allclose(product, x.float() @ weight.T)
