"""Convolutions that are computed as one batched product, against torch's grouped convolution of the same lanes.

    python benchmarks/products.py

Forward and backward in the layout that rows have (docs/decisions/0001). The last line is a layer that keeps the grouped
convolution, because its product would be too large.
"""

import argparse

import torch
import torch.nn.functional as F
from common import alternate, report
from torch import Tensor

from esper.kasmina.rows.convolution import DENSE_LARGEST, RowConv2d
from esper.kasmina.rows.core import Statistics
from esper.tolaria.machine import tune_process

LAYERS = (
    # lanes, in, out, kernel, groups, extent
    (5, 8, 8, 1, 1, 8),
    (64, 8, 8, 1, 1, 4),
    (64, 8, 8, 3, 1, 2),
    (6, 8, 16, 3, 1, 2),
    (6, 16, 8, 3, 1, 2),
    (64, 8, 8, 3, 8, 2),
    (64, 16, 16, 3, 16, 2),
    (64, 16, 16, 3, 1, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=51)
    args = parser.parse_args()
    tune_process(2)
    rows = []
    for lanes, ins, outs, kernel, groups, extent in LAYERS:
        layer = RowConv2d(ins, outs, kernel, groups=groups, bias=False)
        x = torch.randn(args.batch, lanes * ins, extent, extent, requires_grad=True)
        weight = torch.randn(lanes, outs, ins // groups, kernel, kernel, requires_grad=True)
        grad = torch.randn(args.batch, lanes * outs, extent, extent)

        def row_layer(layer=layer, x=x, weight=weight) -> Tensor:
            return layer.forward(x, (weight,), (), statistics=Statistics.UPDATED)

        def grouped(x=x, weight=weight, kernel=kernel, groups=groups * lanes) -> Tensor:
            return F.conv2d(x, weight.flatten(0, 1), padding=kernel // 2, groups=groups)

        def update(run, x=x, weight=weight, grad=grad) -> None:
            torch.autograd.grad(run(), (x, weight), grad)

        torch.testing.assert_close(row_layer(), grouped(), atol=1e-4, rtol=1e-4)
        taken = alternate(
            {"row": lambda u=update, r=row_layer: u(r), "grouped": lambda u=update, r=grouped: u(r)}, args.repeats
        )
        product = kernel == 1 or ins * outs // groups**2 <= DENSE_LARGEST
        rows.append(
            {
                "lanes": lanes,
                "channels": f"{ins} to {outs}{', depthwise' if groups == ins else ''}",
                "kernel": kernel,
                "extent": f"{extent}x{extent}",
                "grouped convolution (ms)": round(1e3 * taken["grouped"], 2),
                "row layer (ms)": round(1e3 * taken["row"], 2),
                "times": round(taken["grouped"] / taken["row"], 2),
                "row layer is": "product" if product else "convolution",
            }
        )
    report("products", rows, settings=vars(args))


if __name__ == "__main__":
    main()
