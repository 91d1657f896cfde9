from __future__ import annotations

import msgspec
import numpy as np
import pytest

from serving.core import Admission, SamplingParams, StepPlan
from serving.errors import EngineDeadError
from serving.messages import AllocateKv, ToStage
from serving.stage.mirror import Mirror


def u2(*values: int) -> bytes:
    return np.array(values, dtype="<u2").tobytes()


def u4(*values: int) -> bytes:
    return np.array(values, dtype="<u4").tobytes()


def admit(slot: int, tokens: list[int], computed: int = 0) -> Admission:
    return Admission(
        slot=slot,
        num_tokens=len(tokens),
        computed=computed,
        prompt_len=len(tokens),
        tokens=np.array(tokens, dtype="<i4").tobytes(),
        params=SamplingParams(seed=2**64 - 1, stop_token_ids=[3]),
    )


def first_plan() -> StepPlan:
    """Slot 2: six tokens, all at once. Slot 0: seven tokens, four of them from the cache."""
    return StepPlan(
        number=0,
        prefill_slots=u2(2, 0),
        prefill_lens=u4(6, 2),
        page_slots=u2(2, 2, 0, 0),
        page_columns=u4(0, 1, 0, 1),
        page_ids=u4(7, 3, 5, 1),
        admitted=[admit(2, [10, 11, 12, 13, 14, 15]), admit(0, [20, 21, 22, 23, 24, 25, 26], 4)],
    )


def test_a_plan_survives_its_encoding() -> None:
    decoder: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
    for message in (first_plan(), AllocateKv(5, 100)):
        assert decoder.decode(msgspec.msgpack.encode(message)) == message


def test_prefill_chunks_then_decodes() -> None:
    mirror = Mirror(4, 32, 4, holds_tokens=True)
    rows = mirror.apply(first_plan())
    assert rows.num_decodes == 0
    assert rows.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    assert rows.prompt_tokens.tolist() == [10, 11, 12, 13, 14, 15, 24, 25]
    assert rows.slot_mapping.tolist() == [28, 29, 30, 31, 12, 13, 4, 5]
    assert rows.query_starts.tolist() == [0, 6, 8]
    assert rows.context_lens.tolist() == [6, 6]
    assert rows.page_tables.tolist() == [[7, 3], [5, 1]]
    assert rows.sampled_slots.tolist() == [2]  # slot 0 has a token of its prompt left
    assert rows.sampled_tokens.tolist() == [5]
    assert rows.sampled_positions.tolist() == [6]
    assert rows.reads_from == -1

    rows = mirror.apply(
        StepPlan(number=1, decode_slots=u2(2), prefill_slots=u2(0), prefill_lens=u4(1))
    )
    assert rows.num_decodes == 1
    assert rows.slots.tolist() == [2, 0]
    assert rows.positions.tolist() == [6, 6]
    assert rows.prompt_tokens.tolist() == [26]
    assert rows.sampled_slots.tolist() == [2, 0]
    assert rows.sampled_tokens.tolist() == [0, 1]
    assert rows.reads_from == 0

    rows = mirror.apply(StepPlan(number=2, decode_slots=u2(0, 2)))
    assert rows.positions.tolist() == [7, 7]
    assert rows.reads_from == 1


def test_a_released_slot_starts_anew() -> None:
    mirror = Mirror(4, 32, 4, holds_tokens=True)
    mirror.apply(first_plan())
    rows = mirror.apply(
        StepPlan(
            number=1,
            released=u2(2),
            admitted=[admit(2, [30, 31])],
            page_slots=u2(2),
            page_columns=u4(0),
            page_ids=u4(6),
            prefill_slots=u2(2),
            prefill_lens=u4(2),
        )
    )
    assert rows.prompt_tokens.tolist() == [30, 31]
    assert rows.slot_mapping.tolist() == [24, 25]
    assert rows.sampled_positions.tolist() == [2]
    assert rows.reads_from == -1


@pytest.mark.parametrize("number", [0, 2])
def test_a_gap_or_a_repeat_is_fatal(number: int) -> None:
    mirror = Mirror(4, 32, 4, holds_tokens=True)
    mirror.apply(first_plan())
    with pytest.raises(EngineDeadError, match=f"Plan {number} arrived where plan 1 was due"):
        mirror.apply(StepPlan(number=number, decode_slots=u2(2)))


def test_a_stage_in_the_middle_needs_no_tokens() -> None:
    plan = first_plan()
    bare = [msgspec.structs.replace(a, tokens=b"", params=None) for a in plan.admitted]
    mirror = Mirror(4, 32, 4, holds_tokens=False)
    rows = mirror.apply(msgspec.structs.replace(plan, admitted=bare))
    assert rows.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    assert len(rows.prompt_tokens) == 0
