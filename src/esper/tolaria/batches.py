"""Minibatches of all rows at once, drawn by counter-based streams.

Row r walks through its own shuffles of the training split; its order depends on its data id and the epoch alone.

Shapes: R rows, U updates, B examples of a minibatch, N examples of the split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.streams import Stream


class BatchOrder:
    """Which examples each row sees at each update.

    Parameters
    ----------
    seed
        Run seed.
    data_id_R
        Int64: rows with the same id see the same examples in the same order.
    examples
        N.
    batch_size
        B.
    """

    def __init__(self, seed: int, data_id_R: Tensor, examples: int, batch_size: int) -> None:
        self._stream = Stream(seed, "data order")
        self._data_id_R = data_id_R
        self._examples, self._batch_size = examples, batch_size
        self._epochs: dict[int, Tensor] = {}

    def indices(self, first_update: int, updates: int) -> Tensor:
        """Int64 [U, R, B]: examples of the updates from `first_update` on. Epochs follow without a gap."""
        start, count = first_update * self._batch_size, updates * self._batch_size
        first, last = start // self._examples, (start + count - 1) // self._examples
        self._epochs = {epoch: self._epoch(epoch) for epoch in range(first, last + 1)}
        order = torch.cat(list(self._epochs.values()), dim=1)
        offset = start - first * self._examples
        chosen = order[:, offset : offset + count]
        return chosen.view(len(self._data_id_R), updates, self._batch_size).transpose(0, 1)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch in self._epochs:
            return self._epochs[epoch]
        number = torch.tensor([epoch], device=self._data_id_R.device)
        return self._stream.permutations(self._data_id_R, number, self._examples)


def gather(x: Tensor, index_RB: Tensor, lane_axis: int) -> Tensor:
    """Examples of a minibatch in layout: [R, B, D] for lane axis 0, [B, R*C, ...] for lane axis 1."""
    if lane_axis == 0:
        return x[index_RB]
    return x[index_RB.T].flatten(1, 2)


def shared(x: Tensor, rows: int, lane_axis: int) -> Tensor:
    """Give the same examples to all rows, in layout."""
    if lane_axis == 0:
        return x.expand(rows, *x.shape)
    return x[:, None].expand(-1, rows, *x.shape[1:]).flatten(1, 2)
