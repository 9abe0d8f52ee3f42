"""Named, counter-based random numbers.

A number depends on the run seed, the name of its stream and its own coordinates (row, item, position), and on
nothing else: not on how many rows run, not on what was drawn before, not on the device. The generator is
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written with int64 tensors so
that a whole population draws at once; no library offers a separate key or counter for each row of a tensor.
"""

import hashlib
from collections.abc import Callable

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_AT_ONCE = 2**16
"""Numbers drawn in one piece, so that temporary tensors stay in the cache: four times as fast for millions."""


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 counters in [0, 2**32); gives four int64 tensors of the same range."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap modulo 2**64; both halves survive the wrap.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


class Stream:
    """One named stream of one run seed."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))

    def integers(self, first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
        """Uniform 32-bit integers at the coordinates (first, second, 0..count).

        Parameters
        ----------
        first, second
            Int64, broadcastable to [N]: for instance the row, and the number of its seed.
        count
            Numbers for each pair of coordinates.

        Returns
        -------
        torch.Tensor
            Int64 [N, count] in [0, 2**32).
        """
        return self._filled(first, second, count, torch.int64, lambda words: words)

    def uniform(
        self, first: torch.Tensor, second: torch.Tensor, count: int, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Uniform numbers [N, count] in the open interval (0, 1), the same in every dtype up to rounding."""
        # The largest of them round to 1 in a shorter dtype.
        largest = 1 - torch.finfo(dtype).eps / 2

        def between(words: torch.Tensor) -> torch.Tensor:
            return ((words.double() + 0.5) / 2.0**32).to(dtype).clamp(max=largest)

        return self._filled(first, second, count, dtype, between)

    def _filled(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        count: int,
        dtype: torch.dtype,
        convert: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Numbers [N, count], drawn and converted piece by piece so that what lies between stays in the cache."""
        first, second = (ids[:, None] for ids in torch.broadcast_tensors(first, second))
        numbers = torch.empty(len(first), count, dtype=dtype, device=first.device)
        piece = max(4, _AT_ONCE // max(1, len(first)) // 4 * 4)
        for start in range(0, count, piece):
            part = numbers[:, start : start + piece]
            blocks = torch.arange(start // 4, (start + part.shape[1] + 3) // 4, device=first.device)
            words = philox((blocks, first, second, torch.zeros_like(blocks)), self._key)
            part.copy_(convert(torch.stack(words, dim=-1).flatten(1)[:, : part.shape[1]]))
        return numbers

    def permutations(self, first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
        """Int64 [N, count]: a random order of 0..count-1 for each pair of coordinates."""
        # Ties among 32-bit keys are broken by position; the stable sort makes that the same everywhere.
        return self.integers(first, second, count).argsort(dim=1, stable=True)
