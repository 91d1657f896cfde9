"""Random numbers that depend on seed, choice and token position, and on nothing else.

A generator with state would shift when a sequence changes its slot, is preempted, or replayed.
Here every number is computed from where it is used, by the output function of SplitMix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014; finaliser by Stafford):

    key     = mix(mix(seed + G) + (choice + 1) * G)      one key a sequence
    z       = mix(key + (position + 1) * G)              one number a token
    uniform = (floor(z / 2^11) + 1/2) / 2^53             never 0, never 1

All arithmetic is modulo 2^64 and runs on the host, so devices agree to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["stream_key", "uniforms"]

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GAMMA = 0x9E37_79B9_7F4A_7C15
_FIRST, _SECOND = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def stream_key(seed: int, choice: int) -> int:
    """The key of one sequence, 0 <= key < 2^64. Seeds count modulo 2^64; choice is 0 .. n - 1."""
    return _mix(_mix(seed + _GAMMA) + (choice + 1) * _GAMMA)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in (0, 1) for each key [R] at its position [R]."""
    z = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    z ^= z >> np.uint64(31)
    numbers: NDArray[np.float64] = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return numbers
