"""What a step needs from the host, in one pinned buffer and one copy to the device.

```
int32 words:  | drawing: 5 words a row | body: 6 words a token or sequence, tiles | page entries |
```

The place of every field follows from a `Size` alone, so a recorded step of that size finds its
inputs where it found them when it was recorded. Fields are filled up to the size with values that
do nothing: slots of -1 are not written, lengths of 0 not read, tiles of -1 skipped, and drawn rows
beyond the last go to a slot that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.stage.mirror import Int32s, Rows

__all__ = ["Body", "Drawing", "PageEntries", "Size", "Staging"]

Words = NDArray[np.int32]

_RING = 4  # more than the steps that can be in flight on one stage
_DRAW_WORDS = 5


@dataclass(frozen=True)
class Size:
    """Padded numbers of tokens, sequences and prefill tiles of a step."""

    tokens: int
    sequences: int
    tiles: int


@dataclass(frozen=True)
class Body:
    """Device views of one step's inputs; see `StepInputs` for their meaning.

    `ids` holds a token, or -1 - slot for the token sampled last for that slot.
    """

    positions: Tensor
    slot_mapping: Tensor
    ids: Tensor
    table_rows: Tensor
    context_lens: Tensor
    decode_lens: Tensor
    query_starts: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class Drawing:
    """Device views for the rows that get a token: [R] each."""

    uniform: Tensor
    temperature: Tensor
    rows: Tensor
    slots: Tensor


@dataclass(frozen=True)
class PageEntries:
    """Changes of the device's page table: entry `columns[i]` of slot `slots[i]` is `pages[i]`."""

    slots: NDArray[np.uint16]
    columns: NDArray[np.uint32]
    pages: NDArray[np.uint32]


class Staging:
    """A ring of pinned buffers and the one device buffer that all steps read."""

    def __init__(
        self, max_tokens: int, max_rows: int, max_tiles: int, max_entries: int, device: torch.device
    ) -> None:
        self._draw_words = _DRAW_WORDS * max_rows
        self._max_rows, self.max_entries = max_rows, max_entries
        body = 3 * max_tokens + 4 * max(max_rows, max_tokens) + 1 + 2 * max_tiles
        words = self._draw_words + body + 3 * max_entries
        self._host = [torch.zeros(words, dtype=torch.int32).pin_memory() for _ in range(_RING)]
        self._words: list[Words] = [host.numpy() for host in self._host]
        self._copied = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in range(_RING)
        ]
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._turn = 0

    def open(self) -> Words:
        """The next host buffer; its last copy has long been made, or is waited for."""
        self._turn = (self._turn + 1) % _RING
        self._copied[self._turn].synchronize()
        return self._words[self._turn]

    def send(self, size: Size, entries: int) -> None:
        """Copy what is filled in to the device, behind all work launched before."""
        count = self._entries_at(size) + 3 * entries
        self._device[:count].copy_(self._host[self._turn][:count], non_blocking=True)
        self._copied[self._turn].record()

    # ---- host side

    def fill_body(self, words: Words, size: Size, rows: Rows, tiles: Words) -> None:
        """Write one micro-batch's inputs, padded to `size`."""
        tokens, sequences = len(rows.positions), len(rows.slots)
        at = self._draw_words

        def put(values: NDArray[np.int64] | Int32s, room: int, padding: int) -> None:
            nonlocal at
            words[at : at + len(values)] = values
            words[at + len(values) : at + room] = padding
            at += room

        put(rows.positions, size.tokens, 0)
        put(rows.slot_mapping, size.tokens, -1)
        decodes = rows.num_decodes
        words[at : at + decodes] = -1 - rows.slots[:decodes]
        words[at + decodes : at + tokens] = rows.prompt_tokens
        words[at + tokens : at + size.tokens] = 0
        at += size.tokens
        put(rows.slots, size.sequences, 0)
        put(rows.context_lens, size.sequences, 0)
        put(rows.context_lens[:decodes], size.sequences, 0)
        words[at : at + sequences + 1] = rows.query_starts
        words[at + sequences + 1 : at + size.sequences + 1] = tokens
        at += size.sequences + 1
        put(tiles.reshape(-1), 2 * size.tiles, -1)

    def fill_drawing(
        self,
        words: Words,
        uniform: NDArray[np.float64],
        temperature: NDArray[np.float32],
        rows: NDArray[np.int64],
        slots: NDArray[np.int64],
        no_slot: int,
    ) -> None:
        """Write the rows that get a token; every row beyond them draws for `no_slot`."""
        count, room = len(rows), self._max_rows
        numbers = words[: 2 * room].view(np.float64)
        numbers[:count], numbers[count:] = uniform, 0.5
        warmth = words[2 * room : 3 * room].view(np.float32)
        warmth[:count], warmth[count:] = temperature, 0.0
        words[3 * room : 3 * room + count] = rows
        words[3 * room + count : 4 * room] = 0
        words[4 * room : 4 * room + count] = slots
        words[4 * room + count : 5 * room] = no_slot

    def fill_entries(self, words: Words, size: Size, entries: PageEntries) -> None:
        """Write at most `max_entries` page-table entries."""
        at, count = self._entries_at(size), len(entries.slots)
        words[at : at + count] = entries.slots
        words[at + count : at + 2 * count] = entries.columns
        words[at + 2 * count : at + 3 * count] = entries.pages

    # ---- device side

    def body(self, size: Size) -> Body:
        """Where a step of this size finds its inputs."""
        at = self._draw_words

        def take(count: int) -> Tensor:
            nonlocal at
            at += count
            return self._device[at - count : at]

        positions, slot_mapping, ids = (take(size.tokens) for _ in range(3))
        table_rows, context_lens, decode_lens = (take(size.sequences) for _ in range(3))
        return Body(
            positions=positions,
            slot_mapping=slot_mapping,
            ids=ids,
            table_rows=table_rows,
            context_lens=context_lens,
            decode_lens=decode_lens,
            query_starts=take(size.sequences + 1),
            tiles=take(2 * size.tiles).view(size.tiles, 2),
        )

    def drawing(self, count: int) -> Drawing:
        """The first `count` rows that get a token."""
        room, words = self._max_rows, self._device
        return Drawing(
            uniform=words[: 2 * room].view(torch.float64)[:count],
            temperature=words[2 * room : 3 * room].view(torch.float32)[:count],
            rows=words[3 * room : 3 * room + count],
            slots=words[4 * room : 4 * room + count],
        )

    def entries(self, size: Size, count: int) -> Tensor:
        """[3, count]: slots, columns, pages."""
        at = self._entries_at(size)
        return self._device[at : at + 3 * count].view(3, count)

    def _entries_at(self, size: Size) -> int:
        return self._draw_words + 3 * size.tokens + 4 * size.sequences + 1 + 2 * size.tiles
