"""The layout of many rows of images: contiguous [B, L*C, H, W] against the same in channels-last.

    python benchmarks/layout.py [--rows 64]

Forward and backward of the pieces of a convolutional host, and the gathers that seeds need (docs/decisions/0001).
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import alternate, report
from torch import Tensor

from esper.tolaria.machine import tune_process


def pieces(rows: int, width: int, weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    lanes = torch.arange(0, rows, 2)

    def gather(x: Tensor) -> Tensor:
        return x.unflatten(1, (rows, width)).index_select(1, lanes)

    return {
        "grouped convolution 3x3": lambda x: F.conv2d(x, weight, padding=1, groups=rows),
        "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
        "group norm": lambda x: F.group_norm(x, rows),
        "average pooling": lambda x: F.avg_pool2d(x, 2),
        "gather half of the rows": gather,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    tune_process(2)
    rows = []
    for width in (8, 16):
        weight = torch.randn(args.rows * width, width, 3, 3, requires_grad=True)
        for name, run in pieces(args.rows, width, weight).items():
            sides = {}
            for layout, form in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
                x = torch.randn(args.batch, args.rows * width, 8, 8).contiguous(memory_format=form).requires_grad_()
                sides[layout] = lambda x=x, run=run: run(x).sum().backward()
            taken = alternate(sides, args.repeats)
            rows.append(
                {
                    "piece": name,
                    "channels of a row": width,
                    "contiguous (ms)": round(1e3 * taken["contiguous"], 2),
                    "channels-last (ms)": round(1e3 * taken["channels-last"], 2),
                    "contiguous is faster, times": round(taken["channels-last"] / taken["contiguous"], 2),
                }
            )
    report("layout", rows, settings=vars(args))


if __name__ == "__main__":
    main()
