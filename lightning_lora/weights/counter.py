"""Random bits that are a function of a key and a counter, computed where they are used.

The same integers come out on every device, and any part of a tensor can be had without the rest: so runs resume,
processes that hold a part each agree with one that holds all, and nothing is made on the host and copied.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Key = tuple[int, int]
"""Two numbers of 32 bits, signed."""


def key(*parts: object) -> Key:
    """Return the key for ``parts``, such as a seed, the name of a layer and the number of a step."""
    hashed = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(hashed[:4], "little", signed=True), int.from_bytes(hashed[4:8], "little", signed=True)


def words(key: Key, first: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits, (count,) int32, for each of the counters from ``first`` on.

    The mixing function is "lowbias32" of Chris Wellons ("Prospecting for Hash Functions", 2018): shifts and odd
    multipliers, chosen by search so that every bit of the input flips every bit of the output with a probability of
    1/2. One half of the key goes in before it; the other inside, so that no two keys give one sequence, shifted. What
    overflows 32 bits is dropped, on every device.
    """
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(first + key[0]))
    x.bitwise_xor_(_shifted(x, 16)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shifted(x, 15)).add_(key[1]).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(_shifted(x, 16))


def halves(key: Key, first: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits, (count,) int32 from 0 on, for each of the counters from ``first`` on: half a word each."""
    skipped = first % 2
    pairs = words(key, first // 2, (skipped + count + 1) // 2, device).view(torch.int16)
    return pairs[skipped : skipped + count].to(torch.int32).bitwise_and_(0xFFFF)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return ``x``, shifted to the right, with zeros from the left."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the lowest 32 bits of ``number``, as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
