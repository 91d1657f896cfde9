"""Which lengths of prompts had their share of first tokens in time lately.

When not everybody can be in time, leaving out the longest keeps the most: so all long prompts would
be late before one short one is. A class of lengths that had less than its share is spared as long
as there is enough to spare of the others.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

#: Where the second and the third class of lengths begin, in tokens of the prompt.
BOUNDS = (1024, 8192)
#: What a class is due, and what all must have before a class gets it.
_CLASS_SHARE, _WHOLE_SHARE = 0.85, 0.88
#: Outcomes that a share is remembered of, of a class and of all.
_CLASS_MEMORY, _WHOLE_MEMORY = 64, 512


class LengthShares:
    """Shares of first tokens in time, with forgetting. A new one takes all to be in time."""

    def __init__(self) -> None:
        self._shares = np.ones(len(BOUNDS) + 1)
        self._whole = 1.0

    @staticmethod
    def class_of(tokens: int) -> int:
        """The class of a prompt of so many tokens."""
        return bisect_right(BOUNDS, tokens)

    def note(self, length_class: int, in_time: bool) -> None:
        """One more prompt of a class was in time, or can no longer be."""
        self._shares[length_class] += (in_time - self._shares[length_class]) / _CLASS_MEMORY
        self._whole += (in_time - self._whole) / _WHOLE_MEMORY

    def spared(self) -> NDArray[np.bool_] | None:
        """Which classes are to be left out last; None if all are alike."""
        low = self._shares < _CLASS_SHARE
        return low if self._whole > _WHOLE_SHARE and low.any() else None
