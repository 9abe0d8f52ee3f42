"""What each layer of the policy network did in an update: its gradient, and what it gave out.

A layer is a module with parameters of its own, under its name in `named_modules`. Everything is added up on the device
in tensors made once, and travels with the update's one transfer; nothing here changes a number of the update.

Every minibatch before the early stop counts, taken or not. Norms, means and deviations are averaged over minibatches,
the largest value is the largest of all, entries that were not finite are summed. What is not finite in a minibatch is
left out of its layer's averages and largest values.

Shapes: L layers, P parameters, N calls of a pass, M most of either in one layer, K measures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from esper.leyline.transfer import Cargo

NOT_MEASURED = float("nan")


@dataclass(frozen=True)
class LayerReport:
    """One layer in one update; NaN where nothing was measured.

    Attributes
    ----------
    gradient_norm, gradient_largest
        Before clipping; largest is the largest absolute value.
    gradient_nonfinite
        Entries of the gradient.
    activation_mean, activation_deviation, activation_largest, activation_nonfinite
        The same of what the layer gave out in the forward pass, over all its entries: rows, tokens and decisions that
        were not made included. A layer that is called twice in a pass counts twice. NaN where its parameters are used
        without calling it: what the output layer of an attention gives out is measured at the attention.
    """

    gradient_norm: float
    gradient_largest: float
    gradient_nonfinite: int
    activation_mean: float
    activation_deviation: float
    activation_largest: float
    activation_nonfinite: float


def layers_of_parameters(network: nn.Module) -> list[str]:
    """Layer that each parameter belongs to, in the order of `parameters()`."""
    return [name.rpartition(".")[0] for name, _ in network.named_parameters()]


class LayerProbe:
    """Measures the layers of a network while it learns.

    Parameters
    ----------
    network
        Looked at within `watching` alone.

    Attributes
    ----------
    totals
        What is to be carried home, for `report`.
    """

    def __init__(self, network: nn.Module) -> None:
        sizes = Counter(layers_of_parameters(network))
        self._names, self._parameters_L = list(sizes), list(sizes.values())
        self._modules = [network.get_submodule(name) for name in sizes]
        self._calls_L: list[list[Tensor]] = [[] for _ in sizes]
        device = next(network.parameters()).device
        # Minibatches in the averages, what is averaged, the largest value, entries that were not finite.
        self.totals = {
            name: torch.zeros(len(sizes), measures, dtype=torch.float64, device=device)
            for name, measures in (("gradients_LK", 4), ("activations_LK", 5))
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every pass until the block is left; the totals begin anew."""
        for total_LK in self.totals.values():
            total_LK.zero_()
            total_LK[:, -2] = -torch.inf
        handles: list[RemovableHandle] = []
        try:
            for calls, module in zip(self._calls_L, self._modules, strict=True):
                handles.append(module.register_forward_hook(partial(_measure, calls)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for calls in self._calls_L:
                calls.clear()

    @torch.no_grad()
    def add(self, gradients: list[Tensor], norms_P: Tensor, running: Tensor) -> None:
        """Add a minibatch.

        Parameters
        ----------
        gradients, norms_P
            Of the network's parameters, before clipping, and their norms.
        running
            Bool: it is not behind the early stop.
        """
        ends_P2 = torch.stack([end for gradient in gradients for end in _extremes(gradient)]).view(-1, 2)
        of_parameters = torch.cat((norms_P[:, None], ends_P2), -1).double()
        norm_LM, largest_LM, wild_LM = _by_layer(of_parameters, self._parameters_L, 0.0)
        norm_L = torch.linalg.vector_norm(norm_LM, dim=1)
        _fold(self.totals["gradients_LK"], norm_L[:, None, None], largest_LM.amax(1, keepdim=True), wild_LM, running)
        of_calls = torch.stack([call for calls in self._calls_L for call in calls]).double()
        counts_L = [len(calls) for calls in self._calls_L]
        mean_LM, deviation_LM, largest_LM, wild_LM = _by_layer(of_calls, counts_L, torch.nan)
        means_LMK = torch.stack((mean_LM, deviation_LM), -1)
        _fold(self.totals["activations_LK"], means_LMK, largest_LM, wild_LM, running)
        for calls in self._calls_L:
            calls.clear()

    def report(self, cargo: Cargo) -> dict[str, LayerReport]:
        """Read what arrived: layers in the network's order."""
        both = zip(self._names, cargo["gradients_LK"].tolist(), cargo["activations_LK"].tolist(), strict=True)
        return {name: _read(gradient_K, activation_K) for name, gradient_K, activation_K in both}


def _measure(calls: list[Tensor], _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Keep mean, deviation, largest value and entries that are not finite of one call's output."""
    # An attention gives its weights besides, an LSTM its last state.
    values = (output[0] if isinstance(output, tuple) else output).detach().float()
    mean = values.mean()
    # `torch.var` takes twenty times as long on a CPU.
    deviation = torch.linalg.vector_norm(values - mean) / math.sqrt(values.numel())
    calls.append(torch.stack((mean, deviation, *_extremes(values))))


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute value, and how many are not finite."""
    magnitudes = values.abs()
    largest = magnitudes.amax()
    # Less itself, what is finite is 0. `isfinite` takes six times as long on a CPU.
    return largest, magnitudes.sub_(magnitudes).ne_(0).sum()


def _by_layer(rows: Tensor, counts_L: list[int], filler: float) -> tuple[Tensor, ...]:
    """Columns [L, M] of rows [P or N, K] that come layer by layer."""
    return pad_sequence(rows.split(counts_L), batch_first=True, padding_value=filler).unbind(-1)


def _fold(total_LK: Tensor, means_LMK: Tensor, largest_LM: Tensor, wild_LM: Tensor, running: Tensor) -> None:
    """Add one minibatch to the totals."""
    fine_LM = means_LMK.isfinite().all(-1) & running
    total_LK[:, 0] += fine_LM.sum(1)
    total_LK[:, 1:-2] += means_LMK.masked_fill(~fine_LM[..., None], 0.0).sum(1)
    largest_LM = largest_LM.masked_fill(~(largest_LM.isfinite() & running), -torch.inf)
    total_LK[:, -2] = torch.maximum(total_LK[:, -2], largest_LM.amax(1))
    # What fills up the table is no number.
    total_LK[:, -1] += wild_LM.masked_fill(~running, 0.0).nansum(1)


def _read(gradient_K: list[float], activation_K: list[float]) -> LayerReport:
    (norm,), largest, wild = _read_row(gradient_K)
    (mean, deviation), activation_largest, activation_wild = _read_row(activation_K)
    # Every output has either a finite largest value or an entry that is not finite.
    measured = not math.isnan(activation_largest) or activation_wild > 0
    return LayerReport(
        gradient_norm=norm,
        gradient_largest=largest,
        gradient_nonfinite=int(wild),
        activation_mean=mean,
        activation_deviation=deviation,
        activation_largest=activation_largest,
        activation_nonfinite=activation_wild if measured else NOT_MEASURED,
    )


def _read_row(row_K: list[float]) -> tuple[list[float], float, float]:
    """Averages, largest value and number of entries that were not finite."""
    minibatches, *sums, largest, wild = row_K
    means = [total / minibatches if minibatches else NOT_MEASURED for total in sums]
    return means, NOT_MEASURED if largest == -torch.inf else largest, wild
