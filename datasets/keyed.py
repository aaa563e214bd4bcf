"""Randomness without state: every draw is a function of a key.

A draw made here depends on nothing but its key, so it does not change with the number of processes, loader workers or
batches, and a stopped run continues with exactly the draws it would have made. The mixing function is the finaliser of
splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

import zlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def hash64(*keys: int | str | Tensor) -> Tensor:
    """Mix keys into well distributed int64 numbers; the order of the keys matters.

    keys: integers, names (hashed by their CRC-32, the same in every process) and int64 tensors that broadcast against
    each other. Returns an int64 tensor of the broadcast shape (a scalar if no key is a tensor).
    """
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = _finalise(state + (key if isinstance(key, Tensor) else _signed(key)) + GOLDEN)
    return state


def uniform(keys: Tensor, count: int, salt: str) -> Tensor:
    """Draw `count` numbers in [0, 1) for every key.

    keys (N,) int64; salt names the stream ("query/crop"), so that different parameters are independent.
    Returns (N, count) float32 with 24 random bits each.
    """
    steps = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    bits = _finalise(hash64(keys, salt).unsqueeze(1) + steps)
    return _shift(bits, 40).float() * 2.0**-24


def sample_keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """The keys (N,) int64 of samples `index` (N,) int64 in one epoch: what all their per-sample draws hang on."""
    return hash64(seed, epoch, index)


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """A generator of its own on `device`, seeded by the keys; torch's global one stays untouched."""
    return torch.Generator(device).manual_seed(int(hash64(*keys)))


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FACTORS[0]  # int64 products wrap around, which is what the algorithm asks for
    x = (x ^ _shift(x, 27)) * FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(key: int | str) -> int:
    number = zlib.crc32(key.encode()) if isinstance(key, str) else key
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
