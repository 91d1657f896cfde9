"""What a step needs from the host, in one pinned buffer and one copy to the device.

```
int32 words:  | drawing: 5 words a row | body: tokens, sequences, shares, tiles | page entries |
```

The place of every field follows from a `Size` alone, so a recorded step of that size finds its
inputs where it found them when it was recorded. Every field starts at a multiple of 16 bytes, as
kernels are compiled once for aligned addresses and once more for others. Fields are filled up to
the size with values that do nothing: slots of -1 are not written, shares and tiles of sequence -1
are skipped, and drawn rows beyond the last go to a slot that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.stage.mirror import Int32s, Rows

__all__ = ["Body", "Cut", "Drawing", "PageEntries", "Size", "Staging"]

Words = NDArray[np.int32]

_DRAW_WORDS = 5


@dataclass(frozen=True)
class Size:
    """Padded numbers of tokens, sequences, decode shares and prefill tiles of a step."""

    tokens: int
    sequences: int
    shares: int
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
    query_starts: Tensor
    part_starts: Tensor
    shares: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class Cut:
    """How a micro-batch's attention is cut up, on the host; see `serving.kernels.triton`."""

    shares: Words
    part_starts: Words
    tiles: Words


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
    """A ring of pinned buffers and the one device buffer that all steps read.

    `ring` is more than the steps that can be in flight on one stage. `max_rows` is 0 on stages that
    draw no tokens.
    """

    def __init__(
        self,
        most: Size,
        max_rows: int,
        max_entries: int,
        device: torch.device,
        ring: int,
    ) -> None:
        max_rows = _aligned(max_rows)
        self._draw_words = _DRAW_WORDS * max_rows
        self._max_rows, self.max_entries = max_rows, max_entries
        words = self._entries_at(most) + 3 * max_entries
        self._host = [torch.zeros(words, dtype=torch.int32).pin_memory() for _ in range(ring)]
        self._words: list[Words] = [host.numpy() for host in self._host]
        self._copied = [
            torch.cuda.Event()  # type: ignore[no-untyped-call]
            for _ in range(ring)
        ]
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._turn = 0

    def open(self) -> Words:
        """The next host buffer; its last copy has long been made, or is waited for."""
        self._turn = (self._turn + 1) % len(self._host)
        self._copied[self._turn].synchronize()
        return self._words[self._turn]

    def send(self, size: Size, entries: int) -> None:
        """Copy what is filled in to the device, behind all work launched before."""
        count = self._entries_at(size) + 3 * entries
        self._device[:count].copy_(self._host[self._turn][:count], non_blocking=True)
        self._copied[self._turn].record()

    # ---- host side

    def fill_body(self, words: Words, size: Size, rows: Rows, cut: Cut) -> None:
        """Write one micro-batch's inputs, padded to `size`."""
        tokens = len(rows.positions)
        at = self._draw_words

        def put(values: NDArray[np.int64] | Int32s, room: int, padding: int) -> None:
            nonlocal at
            words[at : at + len(values)] = values
            words[at + len(values) : at + room] = padding
            at += _aligned(room)

        put(rows.positions, size.tokens, 0)
        put(rows.slot_mapping, size.tokens, -1)
        decodes = rows.num_decodes
        words[at : at + decodes] = -1 - rows.slots[:decodes]
        # Stages after the first have no ids of prompts, and need none.
        held = decodes + len(rows.prompt_tokens)
        words[at + decodes : at + held] = rows.prompt_tokens
        words[at + held : at + size.tokens] = 0
        at += _aligned(size.tokens)
        put(rows.slots, size.sequences, 0)
        put(rows.context_lens, size.sequences, 0)
        put(rows.query_starts, size.sequences + 1, tokens)
        put(cut.part_starts, size.sequences + 1, int(cut.part_starts[-1]))
        put(cut.shares.reshape(-1), 4 * size.shares, -1)
        put(cut.tiles.reshape(-1), 2 * size.tiles, -1)

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
            start, at = at, at + _aligned(count)
            return self._device[start : start + count]

        positions, slot_mapping, ids = (take(size.tokens) for _ in range(3))
        table_rows, context_lens = take(size.sequences), take(size.sequences)
        return Body(
            positions=positions,
            slot_mapping=slot_mapping,
            ids=ids,
            table_rows=table_rows,
            context_lens=context_lens,
            query_starts=take(size.sequences + 1),
            part_starts=take(size.sequences + 1),
            shares=take(4 * size.shares).view(size.shares, 4),
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
        tokens, sequences = _aligned(size.tokens), _aligned(size.sequences)
        starts = _aligned(size.sequences + 1)
        cut = 4 * size.shares + _aligned(2 * size.tiles)
        return self._draw_words + 3 * tokens + 2 * sequences + 2 * starts + cut


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
