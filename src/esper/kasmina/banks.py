"""A bank: one module in many rows, its parameters in one flat table with optimizer state beside it.

The hosts of a population are one bank; the seeds of one blueprint at one site are another. A bank holds exactly the
lanes that live, in row order; when seeds come and go it is rebuilt, and survivors keep everything they had.

Shapes: N lanes of the bank, P parameters of one lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.rows.core import RowLayer
from esper.leyline.state import Tensors, fitting, put_back, taken
from esper.leyline.streams import Stream

_TABLES = ("theta", "first", "second", "steps", "decay", "birth_N", "norm_sum", "kept")


class Bank:
    """Parameters, buffers and optimizer state of the lanes of one row layer.

    Attributes
    ----------
    layer
        What a lane computes.
    theta
        Parameters [N, P], the one leaf tensor.
    buffers
        Running statistics, each [N, ...].
    first, second
        Moments of the optimizer [N, P].
    steps
        Updates made by each lane since its birth, or since it was rolled back [N], int64; skipped ones do not count.
    decay
        Product of the betas over the updates that each lane made [N, 2], float64. A running product, because a power
        rounds differently with the number of lanes, and no lane may notice another.
    birth_N
        Int64: update of the run in which the lane first learned, -1 before. A rollback changes nothing of it.
    norm_sum
        Sum of the norms of the gradients of a decision [N]; those that are not finite are left out.
    kept, kept_buffers
        Parameters and buffers that a lane returns to if it is rolled back.
    row, seed_id
        Host copies: whose lane it is.
    row_N
        `row` on the device.
    decay_P
        1 where weight decay applies.
    """

    def __init__(self, layer: RowLayer, device: torch.device | str, dtype: torch.dtype) -> None:
        self.layer = layer
        self.row = np.empty(0, dtype=np.int64)
        self.seed_id = np.empty(0, dtype=np.int64)
        self.row_N = torch.empty(0, dtype=torch.int64, device=device)
        self.theta = torch.empty(0, layer.parameter_count, device=device, dtype=dtype)
        self.buffers = [torch.empty(0, *b.shape, device=device, dtype=dtype) for b in layer.buffers]
        self.first = torch.empty_like(self.theta)
        self.second = torch.empty_like(self.theta)
        self.scratch = torch.empty_like(self.theta)
        self.steps = torch.empty(0, device=device, dtype=torch.int64)
        self.decay = torch.empty(0, 2, device=device, dtype=torch.float64)
        self.birth_N = torch.empty(0, dtype=torch.int64, device=device)
        self.norm_sum = torch.empty(0, device=device, dtype=dtype)
        self.kept, self.kept_buffers = torch.empty_like(self.theta), [b.clone() for b in self.buffers]
        self.decay_P = layer.decay_mask().to(device, dtype)

    def __len__(self) -> int:
        return len(self.row)

    def hold(self, row: np.ndarray, seed_id: np.ndarray, stream: Stream, init_id_R: Tensor) -> bool:
        """Make the bank hold exactly these lanes; give whether anything changed.

        Parameters
        ----------
        row, seed_id
            Int64 [N], rows ascending. A lane with the row and seed id of an old one is that one.
        stream
            Initial values of new lanes, drawn at (initialisation id of the row, seed id).
        init_id_R
            Initialisation id of each row of the population.
        """
        if np.array_equal(row, self.row) and np.array_equal(seed_id, self.seed_id):
            return False
        device, dtype = self.theta.device, self.theta.dtype
        source = _positions(self.row, self.seed_id, row, seed_id)
        row_N = torch.from_numpy(row).to(device)
        new = torch.from_numpy(np.flatnonzero(source < 0)).to(device)
        kept = torch.from_numpy(np.flatnonzero(source >= 0)).to(device)
        origin = torch.from_numpy(source[source >= 0]).to(device)

        def carry(old: Tensor, fresh: float) -> Tensor:
            moved = old.new_full((len(row), *old.shape[1:]), fresh)
            return moved.index_copy_(0, kept, old.detach().index_select(0, origin))

        theta = carry(self.theta, 0.0)
        if len(new):
            ids = torch.from_numpy(seed_id).to(device)
            draws = stream.uniform(init_id_R[row_N[new]], ids[new], self.layer.parameter_count, dtype)
            theta.index_copy_(0, new, self.layer.initial(draws))
        self.theta = theta.requires_grad_()
        self.buffers = [carry(old, b.low) for old, b in zip(self.buffers, self.layer.buffers, strict=True)]
        self.first, self.second = carry(self.first, 0.0), carry(self.second, 0.0)
        self.steps, self.decay = carry(self.steps, 0), carry(self.decay, 1.0)
        self.birth_N, self.norm_sum = carry(self.birth_N, -1), carry(self.norm_sum, 0.0)
        # What is new has nothing to return to: it is kept at the end of its first decision.
        self.kept, self.kept_buffers = carry(self.kept, 0.0), [carry(old, 0.0) for old in self.kept_buffers]
        self.scratch = torch.empty_like(self.first)
        self.row, self.seed_id, self.row_N = row, seed_id, row_N
        return True

    def state(self) -> Tensors:
        """Give everything that lanes have, by name."""
        return taken(self, _TABLES) | self._listed()

    def restore(self, row: np.ndarray, seed_id: np.ndarray, saved: Mapping[str, Tensor]) -> None:
        """Hold exactly these lanes (see `hold`), as they were saved.

        Raises
        ------
        ValueError
            The tables are not of such lanes.
        """
        device = self.row_N.device
        self.row, self.seed_id, self.row_N = row, seed_id, torch.from_numpy(row).to(device)
        for name in _TABLES:
            old = getattr(self, name)
            setattr(self, name, old.new_empty(len(row), *old.shape[1:]))
        self.buffers, self.kept_buffers = (
            [old.new_empty(len(row), *old.shape[1:]) for old in old_ones]
            for old_ones in (self.buffers, self.kept_buffers)
        )
        put_back(self, _TABLES, saved)
        self.theta.requires_grad_()
        self.scratch = torch.empty_like(self.first)
        for name, present in self._listed().items():
            present.copy_(fitting(name, present, saved))

    def _listed(self) -> Tensors:
        """Buffers and what is kept of them, by name."""
        lists = {"buffers": self.buffers, "kept_buffers": self.kept_buffers}
        return {f"{name}.{at}": table for name, tables in lists.items() for at, table in enumerate(tables)}

    def keep(self, good_N: Tensor) -> None:
        """Remember parameters and buffers of some lanes (bool)."""
        pairs = [(self.theta.detach(), self.kept), *zip(self.buffers, self.kept_buffers, strict=True)]
        for present, kept in pairs:
            torch.where(_along(good_N, kept), present, kept, out=kept)

    def roll_back(self, back_N: Tensor) -> None:
        """Return some lanes (bool) to what was kept of them, and clear what the optimizer knew."""
        pairs = [(self.theta.detach(), self.kept), *zip(self.buffers, self.kept_buffers, strict=True)]
        for present, kept in pairs:
            torch.where(_along(back_N, kept), kept, present, out=present)
        for moment in (self.first, self.second):
            moment.masked_fill_(back_N[:, None], 0.0)
        self.steps.masked_fill_(back_N, 0)
        self.decay.masked_fill_(back_N[:, None], 1.0)

    def undo_statistics(self, before: Sequence[Tensor], skipped_N: Tensor) -> None:
        """Return the running statistics of some lanes (bool) to what they were: those of an update that was skipped."""
        for present, earlier in zip(self.buffers, before, strict=True):
            torch.where(_along(skipped_N, present), earlier, present, out=present)

    def finite(self) -> Tensor:
        """Bool [N]: every parameter and running statistic of the lane is a finite number."""
        tables = [self.theta.detach(), *self.buffers]
        return torch.stack([table.flatten(1).isfinite().all(1) for table in tables]).all(0)

    def silence(self, gone_N: Tensor) -> None:
        """Set the parameters of some lanes (bool) to 0: until they leave the bank, their seeds compute nothing."""
        self.theta.detach().masked_fill_(gone_N[:, None], 0.0)


def _along(mask_N: Tensor, table: Tensor) -> Tensor:
    """A mask of lanes in the shape that broadcasts over [N, ...]."""
    return mask_N.view(-1, *[1] * (table.dim() - 1))


def _positions(old_row: np.ndarray, old_id: np.ndarray, row: np.ndarray, seed_id: np.ndarray) -> np.ndarray:
    """Position of each new (row, seed id) among the old ones, -1 where it is new. Rows are ascending and distinct."""
    if not len(old_row):
        return np.full(len(row), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(old_row, row), len(old_row) - 1)
    same = (old_row[at] == row) & (old_id[at] == seed_id)
    return np.where(same, at, -1)
