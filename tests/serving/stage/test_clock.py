from __future__ import annotations

import threading

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
