"""Named, counter-based random numbers.

A number depends on the run seed, the name of its stream and its own coordinates (row, item, position), and on
nothing else: not on how many rows run, not on what was drawn before, not on the device. The generator is
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written with int64 tensors so
that a whole population draws at once; no library offers a separate key or counter for each row of a tensor.
"""

import hashlib

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


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
        first, second = torch.broadcast_tensors(first, second)
        blocks = torch.arange((count + 3) // 4, device=first.device)
        words = philox((blocks, first[:, None], second[:, None], torch.zeros_like(blocks)), self._key)
        return torch.stack(words, dim=-1).flatten(1)[:, :count]

    def uniform(
        self, first: torch.Tensor, second: torch.Tensor, count: int, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Uniform numbers [N, count] in the open interval (0, 1), the same in every dtype up to rounding."""
        numbers = ((self.integers(first, second, count).double() + 0.5) / 2.0**32).to(dtype)
        # The largest of them round to 1 in a shorter dtype.
        return numbers.clamp(max=1 - torch.finfo(dtype).eps / 2)

    def permutations(self, first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
        """Int64 [N, count]: a random order of 0..count-1 for each pair of coordinates."""
        # Ties among 32-bit keys are broken by position; the stable sort makes that the same everywhere.
        return self.integers(first, second, count).argsort(dim=1, stable=True)
