"""Who may use which starts: the one authority, so that what is reserved for an evaluation cannot be trained on.

A start (initialisation, data order, wrong labels) is a number below 2**32: with the run's seed it is the coordinate of
every random number of a host. Each purpose has a range of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STARTS_OF_ROUND = 2**12
"""Starts are numbered through all rounds of a training; more groups than this no round has."""
MOST_ROUNDS = 2**18
"""Rounds whose starts have numbers."""
TRAINING = range(MOST_ROUNDS * STARTS_OF_ROUND)
"""Everything that is learned from, by whatever learner, and what a person grows."""
SELECTION = range(TRAINING.stop, TRAINING.stop + 2**29)
"""On which the best policy of a training is selected."""
CHOICE = range(SELECTION.stop, SELECTION.stop + 2**27)
"""On which fixed plans are chosen."""
FITTING = range(CHOICE.stop, CHOICE.stop + 2**26)
"""On which hosts that grow nothing are watched, to tell conditions by their losses."""
REPLAY = range(FITTING.stop, FITTING.stop + 2**26)
"""On which a policy is watched, to find out what it does most often."""
SCORE = range(REPLAY.stop, REPLAY.stop + 2**28)
"""On which plans that were chosen are scored."""
JUDGEMENT = range(SCORE.stop, SCORE.stop + 2**30)
"""On which a training evaluates its best policy at the end."""
EXAM = range(JUDGEMENT.stop, JUDGEMENT.stop + 2**30)
"""On which everything is compared."""


def start_ids(of: range, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Int64 [count]: `count` starts of a range from its number `first` on.

    Raises
    ------
    ValueError
        The range has no such starts.
    """
    # The configuration reads these ranges, and no question should wait for torch.
    import torch

    if not 0 <= first <= first + count <= len(of):
        raise ValueError(f"starts {first:,} to {first + count - 1:,}: this range has {len(of):,}, counted from 0")
    return of.start + torch.arange(first, first + count, device=device)
