"""Which part of a tensor a rank of a tensor-parallel stage holds."""

from __future__ import annotations

from dataclasses import dataclass

from serving.layers.place import Place

__all__ = ["VocabularyShare", "share", "vocabulary_share"]

_ROWS = 16  # a rank's part of the vocabulary is a multiple of this, as matrix products like it


def share(size: int, place: Place, unit: int = 1) -> range:
    """This rank's run of `size` rows, in whole units that the number of ranks divides.

    Where it is a multiple of the number of units instead, several ranks hold the same unit.
    """
    units = size // unit
    if units >= place.ranks:
        each = units // place.ranks
        first = place.rank * each
    else:
        each, first = 1, place.rank * units // place.ranks
    return range(first * unit, (first + each) * unit)


@dataclass(frozen=True)
class VocabularyShare:
    """A rank's `tokens`, out of `size`. It has room for `rows` of them, which is the same on all
    ranks; the last ranks may have more room than tokens."""

    size: int
    tokens: range
    rows: int


def vocabulary_share(size: int, place: Place) -> VocabularyShare:
    """Equal parts in the order of ranks; the whole for a rank that is alone."""
    if place.ranks == 1:
        return VocabularyShare(size, range(size), size)
    rows = -(-size // (place.ranks * _ROWS)) * _ROWS
    start = min(size, place.rank * rows)
    return VocabularyShare(size, range(start, min(size, start + rows)), rows)
