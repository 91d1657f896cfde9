"""Every field of a step finds its place in the one buffer, at its size and at a padded one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.stage.gpu.graphs import BUCKETS, bucket_of
from serving.stage.gpu.staging import Cut, PageEntries, Size, Staging
from serving.stage.mirror import Rows


class _NoEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _NoEvent)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


CONTEXT = np.array([5, 9, 33, 7, 6], dtype=np.int32)
ROWS = Rows(
    number=0,
    slots=np.array([4, 2, 9, 1, 0]),
    num_decodes=3,
    positions=np.arange(14),
    slot_mapping=np.arange(14) * 3,
    query_starts=np.array([0, 1, 2, 3, 8, 14], dtype=np.int32),
    context_lens=CONTEXT,
    page_tables=np.zeros((1, 1), dtype=np.int32),
    prompt_tokens=np.arange(100, 111),
    sampled_slots=np.array([4, 2, 9, 1, 0]),
    sampled_tokens=np.array([0, 1, 2, 7, 13]),
    sampled_positions=CONTEXT.astype(np.int64),
    reads_from=-1,
)
SHARES = np.arange(12, dtype=np.int32).reshape(3, 4)
TILES = np.arange(6, dtype=np.int32).reshape(3, 2)


@pytest.mark.parametrize("size", [Size(14, 5, 3, 3), Size(16, 15, 12, 5)])
def test_fields_keep_their_values_and_pad_with_nothing(size: Size) -> None:
    staging = Staging(Size(64, 16, 40, 9), 10, 50, torch.device("cpu"), 4)
    for _ in range(6):  # more than the ring has buffers
        words = staging.open()
        words[:] = 77  # what an earlier step left
        cut = Cut(SHARES, np.array([0, 1, 2, 3], dtype=np.int32), TILES)
        staging.fill_body(words, size, ROWS, cut)
        uniform = np.linspace(0.1, 0.9, 5)
        staging.fill_drawing(
            words, uniform, np.ones(5, np.float32), ROWS.sampled_tokens, ROWS.sampled_slots, 10
        )
        entries = PageEntries(
            np.array([1, 2], np.uint16), np.array([3, 4], np.uint32), np.array([7, 8], np.uint32)
        )
        staging.fill_entries(words, size, entries)
        staging.send(size, 2)
    body, drawing = staging.body(size), staging.drawing(8)
    more = size.tokens - 14
    assert body.positions.tolist() == [*range(14), *[0] * more]
    assert body.slot_mapping.tolist() == [*range(0, 42, 3), *[-1] * more]
    assert body.ids.tolist() == [-5, -3, -10, *range(100, 111), *[0] * more]
    rest = size.sequences - 5
    assert body.table_rows.tolist() == [4, 2, 9, 1, 0, *[0] * rest]
    assert body.context_lens.tolist() == [*CONTEXT.tolist(), *[0] * rest]
    assert body.query_starts.tolist() == [0, 1, 2, 3, 8, 14, *[14] * rest]
    assert body.part_starts.tolist() == [0, 1, 2, 3, *[3] * (size.sequences - 3)]
    assert body.shares[:3].tolist() == SHARES.tolist()
    assert (body.shares[3:] == -1).all()
    assert body.tiles[:3].tolist() == TILES.tolist()
    assert (body.tiles[3:] == -1).all()
    assert drawing.uniform.tolist() == [*uniform.tolist(), 0.5, 0.5, 0.5]
    assert drawing.temperature.tolist() == [1.0] * 5 + [0.0] * 3
    assert drawing.rows.tolist() == [0, 1, 2, 7, 13, 0, 0, 0]
    assert drawing.slots.tolist() == [4, 2, 9, 1, 0, 10, 10, 10]
    assert staging.entries(size, 2).tolist() == [[1, 2], [3, 4], [7, 8]]
    fields = (*vars(body).values(), *vars(drawing).values())
    assert all(field.storage_offset() * field.element_size() % 16 == 0 for field in fields)


def test_buckets() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 5, 64, 65, 256, 257, 512)] == [
        1, 2, 4, 8, 64, 80, 256, 320, 512,
    ]  # fmt: skip
    assert bucket_of(513) is None
    assert list(BUCKETS) == sorted(set(BUCKETS))
