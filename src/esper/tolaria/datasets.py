"""Data sets on hand without a download, each in four disjoint stratified parts.

`train` trains the host; `reward_validation` feeds the reward of a training run; `selection` chooses
between finished candidates; `test` is read once, for the report.
"""

import copy
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from esper.leyline.errors import EsperError
from esper.leyline.files import digest
from esper.tolaria import mnist1d
from esper.tolaria.door import counts, entered

DIGITS_ROWS = 1797
DIGITS_SIDE = 8
DIGITS_CLASSES = 10
DIGITS_MAX_PIXEL = 16
DIGITS_SIZES = (897, 300, 300, 300)
DIGITS_BLAKE2B = "104b309918962f1d8c8b0ecc7112dfc8"
"""Checksum of pixels (little-endian float64) and classes (int64): only on the same digits can results be compared."""

# Of the 4,000 published train rows.
MNIST1D_SIZES = (2800, 600, 600)

Indices = npt.NDArray[np.int64]


# Equality is identity: comparing tensors gives tensors, not a truth value.
@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes
    ----------
    x : Tensor, float32 [N, ...]
        Inputs, in units of a standard deviation (see the loaders).
    y : Tensor, int64 [N]
        Classes, from 0; -100 where the example does not count.
    """

    x: torch.Tensor
    y: torch.Tensor

    @cached_property
    def counted(self) -> "Split":
        """The examples that count: what is measured is measured on them, and `n` of a standard error is their number.

        Found once for a part, because it waits for the device.
        """
        counted_N = counts(self.y)
        return self if bool(counted_N.all()) else Split(self.x[counted_N], self.y[counted_N])

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Split":
        """Give the part on `device`, with `x` as `dtype`; `y` stays int64."""
        return Split(self.x.to(device=device, dtype=dtype), self.y.to(device=device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in four disjoint parts.

    It is checked when it is made, whoever makes it: see `esper.tolaria.door.entered`.

    Attributes
    ----------
    name : str
        Its key in `DATASETS`.
    classes : int
        Number of classes.
    train, reward_validation, selection, test : Split
        The parts. Inputs may be given as uint8 and labels as integers of any width; they are converted.

    Raises
    ------
    EsperError
        A part cannot be learned from or measured on, in one line that names it.
    """

    name: str
    classes: int
    train: Split
    reward_validation: Split
    selection: Split
    test: Split

    def __post_init__(self) -> None:
        """Let the data in."""
        given = {name: (split.x, split.y) for name, split in self._parts.items()}
        for name, (x, y) in entered(given, self.classes).items():
            if x is not given[name][0] or y is not given[name][1]:
                object.__setattr__(self, name, Split(x, y))

    @property
    def _parts(self) -> dict[str, Split]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Split)}

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Dataset":
        """Give the data set on `device`, with every `x` as `dtype`; every `y` stays int64."""
        # What came through the door need not pass it again, which would wait for the device.
        moved = copy.copy(self)
        for name, part in self._parts.items():
            object.__setattr__(moved, name, part.to(device, dtype))
        return moved


def stratified_parts(y: Indices, sizes: Sequence[int], seed: int) -> list[Indices]:
    """Divide rows into disjoint parts of exact sizes, each with the classes in proportion.

    Every class is shuffled and spread evenly over (0, 1); all rows are then sorted by that position
    and cut. A class is so never more than about two rows off its proportion in any part.

    Parameters
    ----------
    y : int64 [N]
        Class of each row.
    sizes : sequence of int
        Rows of each part; their sum is N.
    seed : int
        0 or above; seeds a Philox generator of this call's own.

    Returns
    -------
    list of int64 [size]
        Row numbers of each part, shuffled.

    Raises
    ------
    ValueError
        If the sizes do not sum to N, or the seed is negative.
    """
    if sum(sizes) != len(y):
        raise ValueError(f"part sizes {tuple(sizes)} sum to {sum(sizes)}, not to the {len(y)} rows")
    generator = np.random.Generator(np.random.Philox(seed))
    order = generator.permutation(len(y))
    position = np.empty(len(y))
    for label in np.unique(y):
        members = order[y[order] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Classes of equal size tie; the stable sort leaves those ties in the shuffled order.
    spread = order[np.argsort(position[order], kind="stable")]
    return [generator.permutation(part) for part in np.split(spread, np.cumsum(sizes)[:-1])]


def _split(x: npt.NDArray[np.float64], y: Indices, rows: Indices | slice) -> Split:
    """Copy `rows` of `x` [N, ...] and `y` [N] into tensors."""
    return Split(torch.tensor(x[rows], dtype=torch.float32), torch.tensor(y[rows], dtype=torch.int64))


def _digits_fault(pixels: npt.NDArray[np.float64], y: Indices) -> str | None:
    """Say what is wrong with the digits as read, or None."""
    shape = (DIGITS_ROWS, DIGITS_SIDE * DIGITS_SIDE)
    if pixels.shape != shape or y.shape != shape[:1]:
        return f"its images have shape {pixels.shape} and its labels {y.shape}, not {shape} and {shape[:1]}"
    if not np.array_equal(np.unique(y), np.arange(DIGITS_CLASSES)):
        return f"its labels are not the classes 0 to {DIGITS_CLASSES - 1}"
    # Written so that NaN fails.
    if not (pixels.min() >= 0 and pixels.max() <= DIGITS_MAX_PIXEL):
        return f"its pixels are not all from 0 to {DIGITS_MAX_PIXEL}"
    if digest(pixels.astype("<f8").tobytes() + y.astype("<i8").tobytes()) != DIGITS_BLAKE2B:
        return "it holds other digits"
    return None


def _read_digits() -> tuple[npt.NDArray[np.float64], Indices]:
    """Read scikit-learn's digits: pixels, float64 [1797, 64], from 0 to 16, and classes, int64 [1797].

    Raises
    ------
    EsperError
        If the file is missing, unreadable, or does not hold the digits.
    """
    # Imported here: it takes about a second, which no other command should pay.
    import sklearn.datasets

    path = Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"
    fault: str | None
    try:
        # Damage may warn before it fails; the error below says it all.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
        y = labels.astype(np.int64)
        fault = _digits_fault(pixels, y)
    except FileNotFoundError as error:
        # The text that comes with the data may be the missing one.
        path = Path(error.filename or path)
        fault = "the file is missing"
    except (OSError, EOFError, ValueError, IndexError, ImportError, zlib.error) as error:
        fault = f"it cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    if fault is not None:
        raise EsperError(
            f"digits data file {path}: {fault}; reinstall scikit-learn (pip install --force-reinstall scikit-learn)"
        )
    return pixels, y


def load_digits(split_seed: int) -> Dataset:
    """Load scikit-learn's 8×8 digits, divided by `split_seed`.

    Parameters
    ----------
    split_seed : int
        0 or above. Decides all four parts: 897, 300, 300 and 300 rows.

    Returns
    -------
    Dataset
        `x` float32 [N, 1, 8, 8], about the mean of all train pixels in units of their standard
        deviation; `y` int64 [N].

    Raises
    ------
    EsperError
        If scikit-learn's data file is missing or damaged.
    ValueError
        If `split_seed` is negative.
    """
    pixels, y = _read_digits()
    parts = stratified_parts(y, DIGITS_SIZES, split_seed)
    # One mean and scale for all pixels: some pixels never vary.
    seen = pixels[parts[0]]
    x = ((pixels - seen.mean()) / seen.std()).reshape(-1, 1, DIGITS_SIDE, DIGITS_SIDE)
    train, reward_validation, selection, test = (_split(x, y, rows) for rows in parts)
    return Dataset("digits", DIGITS_CLASSES, train, reward_validation, selection, test)


def load_mnist1d(split_seed: int) -> Dataset:
    """Generate MNIST-1D (arXiv:2011.14439), its train part divided by `split_seed`.

    Parameters
    ----------
    split_seed : int
        0 or above. Divides the 4,000 published train rows into 2,800, 600 and 600; the test part is
        the published one whatever the seed.

    Returns
    -------
    Dataset
        `x` float32 [N, 1, 40], in units of the whole set's standard deviation about its mean, as
        published; `y` int64 [N].

    Raises
    ------
    ValueError
        If `split_seed` is negative.
    """
    signals, y = mnist1d.generate()
    x = signals[:, np.newaxis, :]
    parts = stratified_parts(y[: mnist1d.TRAIN_ROWS], MNIST1D_SIZES, split_seed)
    train, reward_validation, selection = (_split(x, y, rows) for rows in parts)
    test = _split(x, y, slice(mnist1d.TRAIN_ROWS, None))
    return Dataset("mnist1d", mnist1d.CLASSES, train, reward_validation, selection, test)


DATASETS: dict[str, Callable[[int], Dataset]] = {"digits": load_digits, "mnist1d": load_mnist1d}
