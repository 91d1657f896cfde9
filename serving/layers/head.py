"""Hidden rows to logits; where embeddings are tied, token ids to hidden rows too."""

from __future__ import annotations

from torch import Tensor

from serving.layers.embedding import looked_up
from serving.layers.linear import Linear
from serving.layers.place import Place
from serving.layers.share import vocabulary_share

__all__ = ["Head"]


class Head:
    """Logits over the whole vocabulary, from what each rank holds of it."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, place: Place) -> None:
        self.linear = Linear(
            [(name, vocab_size)], hidden_size, bias=False, split="vocabulary", place=place
        )
        self._share = vocabulary_share(vocab_size, place)
        self._group = place.group

    def __call__(self, x: Tensor) -> Tensor:
        """x: [R, H] -> [R, vocab] in x's dtype; rows may lie apart by more than vocab."""
        return self._gathered(self.linear(x))

    def float32(self, x: Tensor) -> Tensor:
        """x: [R, H] -> [R, vocab] float32, valid until the next call."""
        return self._gathered(self.linear.packed.float32(x)).contiguous()

    def rows(self, token_ids: Tensor) -> Tensor:
        """The embedding, where it is tied to the head. token_ids: [T] -> [T, H]."""
        return looked_up(token_ids, self.linear.packed.rows, self._share, self._group)

    def _gathered(self, logits: Tensor) -> Tensor:
        if self._group is None:
            return logits
        return self._group.all_gather(logits)[:, : self._share.size]
