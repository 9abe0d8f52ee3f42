"""Dense row layers: linear, embedding, attention. Shapes as in `core`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.rows.core import ParamSpec, Plain, RowLayer, Shape, Statistics, constant, leaf, uniform


def bound_of(fan_in: int) -> float:
    """Bound of torch's default initialisation of linear and convolution weights and biases, 1/sqrt(fan in)."""
    return 1 / math.sqrt(fan_in)


def rows_linear(x: Tensor, weight_LOD: Tensor, bias_LO: Tensor | None) -> Tensor:
    """Multiply [L, N, D] by the transposed weights [L, O, D] of each lane."""
    if bias_LO is None:
        return x.bmm(weight_LOD.transpose(1, 2))
    return bias_LO.unsqueeze(1).baddbmm(x, weight_LOD.transpose(1, 2))


class RowLinear(RowLayer):
    """`torch.nn.Linear` for vectors [L, B, D] and tokens [L, B, T, D].

    Parameters
    ----------
    zero
        Start at 0 instead of torch's default: the last layer of a residual branch.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False) -> None:
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        bound = 0.0 if zero else bound_of(in_features)
        weight = uniform("weight", (out_features, in_features), bound, decay=True)
        self.params: tuple[ParamSpec, ...] = (weight, uniform("bias", (out_features,), bound)) if bias else (weight,)

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        y = rows_linear(x.flatten(1, -2), params[0], params[1] if self.bias else None)
        return y.unflatten(1, x.shape[1:-1]) if x.dim() != 3 else y

    def output_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.out_features)

    def cost(self, shape: Shape) -> int:
        return math.prod(shape[:-1]) * self.in_features * self.out_features

    def plain(self) -> Plain:
        return leaf("Linear", in_features=self.in_features, out_features=self.out_features, bias=self.bias)


class RowEmbedding(RowLayer):
    """`torch.nn.Embedding`: int64 tokens [L, B, T] to [L, B, T, D]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        # A uniform of the variance of torch's normal: the streams draw uniforms only.
        self.params = (uniform("weight", (num_embeddings, embedding_dim), math.sqrt(3.0)),)

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        (weight,) = params
        # Not one lookup in all tables behind each other: a token out of range would read another row's.
        token_LN = x.flatten(1)[..., None].expand(-1, -1, self.embedding_dim)
        return weight.gather(1, token_LN).view(*x.shape, self.embedding_dim)

    def output_shape(self, shape: Shape) -> Shape:
        return (*shape, self.embedding_dim)

    def plain(self) -> Plain:
        return leaf("Embedding", num_embeddings=self.num_embeddings, embedding_dim=self.embedding_dim)


class RowAttention(RowLayer):
    """Self-attention on tokens [L, B, T, D], `torch.nn.MultiheadAttention(batch_first=True)` for each row.

    Parameters
    ----------
    causal
        A token attends to itself and those before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.width, self.heads, self.causal = width, heads, causal
        # Xavier uniform of the stacked projection, as in torch.
        self.params = (
            uniform("in_proj_weight", (3 * width, width), math.sqrt(6 / (4 * width)), decay=True),
            constant("in_proj_bias", (3 * width,), 0.0),
            uniform("out_proj.weight", (width, width), bound_of(width), decay=True),
            constant("out_proj.bias", (width,), 0.0),
        )

    def forward(
        self, x: Tensor, params: Sequence[Tensor], buffers: Sequence[Tensor], *, statistics: Statistics
    ) -> Tensor:
        lanes, batch, tokens, width = x.shape
        w_in, b_in, w_out, b_out = params
        projected = rows_linear(x.flatten(1, 2), w_in, b_in)
        q, k, v = projected.view(lanes * batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = y.transpose(1, 2).reshape(lanes, batch * tokens, width)
        return rows_linear(y, w_out, b_out).view(x.shape)

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def cost(self, shape: Shape) -> int:
        tokens, width = shape
        return 4 * tokens * width * width + 2 * tokens * tokens * width

    def plain(self) -> Plain:
        return leaf("SelfAttention", width=self.width, heads=self.heads, causal=self.causal)
