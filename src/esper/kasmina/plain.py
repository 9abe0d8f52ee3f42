"""A grown network as a plain PyTorch module.

Needs torch and nothing else; this file is copied next to each saved model.

    python model.py            print the network
    from model import load
    network = load("model.safetensors", "model.json")

`model.json` describes the modules and holds a checksum of everything, `model.safetensors` holds the weights. Neither
can name anything but the modules below, and nothing in them is executed.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

LAYERS = (
    *("Linear", "Embedding", "Conv1d", "Conv2d", "ReLU"),
    *("LayerNorm", "BatchNorm1d", "BatchNorm2d"),
    *("AvgPool1d", "AvgPool2d", "MaxPool1d", "MaxPool2d"),
)
"""The torch modules that a description may name."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


class GlobalMean(nn.Module):
    """Mean over all axes behind the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] to [B, C]."""
        return x.flatten(2).mean(2)


class GroupNorm(nn.GroupNorm):
    """Group norm that takes a single value in a group, too: that is its own mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def behind(x: torch.Tensor, axes: int) -> torch.Tensor:
    """Put so many axes of size 1 behind those of `x`."""
    # Without asking x for its shape, so that torch.fx can trace it.
    for _ in range(axes):
        x = x.unsqueeze(-1)
    return x


class Excite(nn.Module):
    """Scale each channel by what the whole example says (squeeze and excitation).

    `axes` of an example lie behind its channels: 0 for vectors, 1 for signals, 2 for images.
    """

    def __init__(self, squeeze: nn.Module, axes: int) -> None:
        super().__init__()
        self.squeeze, self.axes = squeeze, axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        pooled = x.flatten(2).mean(2) if self.axes > 0 else x
        return x * behind(torch.tanh(self.squeeze(pooled)), self.axes)


class SelfAttention(nn.MultiheadAttention):
    """Self-attention over tokens [B, T, D]."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__(width, heads, batch_first=True)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Keep the shape."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if self.causal else None
        attended: torch.Tensor = super().forward(x, x, x, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]
        return attended


class Grown(nn.Module):
    """A seed that grew at this place: its module, how it joins the stream, and at which share. `axes` as in Excite."""

    def __init__(self, seed: nn.Module, operator: str, alpha: float, axes: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        if operator not in ("add", "multiply", "gate"):
            raise ValueError(f"unknown operator {operator!r}")
        self.seed, self.operator, self.alpha, self.axes, self.gate = seed, operator, alpha, axes, gate

    def extra_repr(self) -> str:
        """Show how the seed joins."""
        return f"operator={self.operator}, alpha={self.alpha:g}"

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        delta: torch.Tensor = self.seed(h)
        if self.operator == "multiply":
            return h + self.alpha * (h * torch.tanh(delta))
        if self.gate is not None:
            pooled = h.flatten(2).mean(2) if self.axes > 0 else h
            delta = delta * behind(torch.sigmoid(self.gate(pooled)), self.axes)
        return h + self.alpha * delta


def build(description: dict[str, Any]) -> nn.Module:
    """Make the module that a description names; weights are torch's initial ones."""
    kind, args = description["type"], description.get("args", {})
    children = {name: build(child) for name, child in description.get("children", {}).items()}
    if kind == "Sequential":
        network = nn.Sequential()
        for name, child in children.items():
            network.add_module(name, child)
        return network
    own: dict[str, Any] = {made.__name__: made for made in (GlobalMean, GroupNorm, Excite, SelfAttention, Grown)}
    if kind not in own and kind not in LAYERS:
        raise ValueError(f"unknown module {kind!r} in the description")
    make = own[kind] if kind in own else getattr(nn, kind)
    module: nn.Module = make(**children, **args)
    return module


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file: 8 bytes of header length, a JSON header, and the raw tensors.

    Raises `ValueError` where the file is damaged.
    """
    data = bytearray(Path(path).read_bytes())
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        body = data[8 + size :]
        return {name: _tensor(body, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header does not describe what it holds") from error


def _tensor(body: bytearray, entry: dict[str, Any]) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != end - begin or not 0 <= begin <= end <= len(body):
        raise ValueError("a tensor lies elsewhere, or is of another size")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=count, offset=begin).reshape(shape).clone()


def seal(network: dict[str, Any], weights: bytes) -> str:
    """Checksum of a network's description, however it is written down, and of its file of weights."""
    return hashlib.blake2b(json.dumps(network, sort_keys=True).encode() + weights, digest_size=16).hexdigest()


def load(weights: str | Path, description: str | Path) -> nn.Module:
    """Load a saved network, ready to use.

    Raises `ValueError` where a file is damaged, or they are not of one network.
    """
    try:
        said = json.loads(Path(description).read_bytes())
        told = said["network"]
        whole = said["blake2b"] == seal(told, Path(weights).read_bytes())
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{description} and {weights} do not belong together, or one of them is damaged")
    network = build(told)
    state = read_safetensors(weights)
    for dtype in {t.dtype for t in state.values() if t.is_floating_point()}:
        network = network.to(dtype)
    network.load_state_dict(state)
    return network.eval()


if __name__ == "__main__":
    here = Path(sys.argv[0]).resolve().parent
    try:
        loaded = load(here / "model.safetensors", here / "model.json")
    except (OSError, ValueError) as problem:
        sys.exit(f"model.py: {problem}")
    print(loaded)
    print(f"{sum(p.numel() for p in loaded.parameters()):,} parameters")
