from __future__ import annotations

import threading
import time

from serving.stage.clock import StageClock


def test_all_time_is_in_one_of_four_states() -> None:
    clock = StageClock()
    with clock.waiting("idle"):
        threading.Event().wait(0.02)
    with clock.waiting("wait_input"):
        threading.Event().wait(0.01)
    clock.add("wait_link", 0.001)
    seconds = clock.seconds()
    assert seconds.idle >= 0.02
    assert seconds.wait_input >= 0.01
    assert seconds.wait_link == 0.001
    assert seconds.busy >= 0


def test_a_step_is_from_having_its_input_to_its_end() -> None:
    clock = StageClock()
    with clock.waiting("idle"):
        threading.Event().wait(0.01)
    clock.begin()
    threading.Event().wait(0.01)  # what is prepared meanwhile
    with clock.waiting("wait_input"):
        threading.Event().wait(0.02)
    there = time.monotonic()
    threading.Event().wait(0.005)
    clock.add("wait_link", 0.001)
    step = clock.step(7)
    now = time.monotonic()
    assert step.number == 7
    assert there - 0.001 < step.began <= there
    assert step.began + 0.004 <= step.ended <= now - 0.001
    # Both parts of its work, and no wait.
    assert 0.014 <= step.busy <= now - there + 0.5
    assert step.busy > step.ended - step.began
    clock.begin()
    began = time.monotonic()
    again = clock.step(8)
    assert again.began <= began
    assert again.busy < step.busy + 0.5
