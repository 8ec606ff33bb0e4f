"""The meter of an engine, by hand: a clock that is set, turns and swaps that overlap."""

import pytest

from echo_jax.policy.meter import Meter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def test_overlapping_turns_and_swaps_by_hand(clock):
    meter = Meter(clock)
    clock.wait(4)  # idle
    with meter.turn():
        clock.wait(2)
        with meter.turn():
            clock.wait(3)
            with meter.still():  # both turns are paused
                clock.wait(1)
        assert meter.turns == 1
        clock.wait(2)
    meter.sampled(30)
    clock.wait(1)  # idle
    with meter.still():  # a swap of an empty engine is no idle time
        clock.wait(3)
        with meter.still():
            clock.wait(1)
        clock.wait(2)
    clock.wait(1)  # idle
    found = meter.read()
    # 20 s: idle 4 + 1 + 1, swapping 1 + 3 + 1 + 2, and 7 in which one turn or two were sampled.
    assert found['seconds'] == 20 and found['sampled_tokens'] == 30
    assert found['idle'] == found['idle_now'] == 6 / 20
    assert found['swapping'] == found['swapping_now'] == 7 / 20
    assert found['tokens_per_sec'] == 30 / 20


def test_now_is_of_the_last_minute(clock):
    meter = Meter(clock)
    for _ in range(20):  # 100 s idle, read every 5 s
        clock.wait(5)
        meter.read()
    with meter.turn():
        clock.wait(30)
    meter.sampled(65)
    clock.wait(5)
    found = meter.read()
    # 135 s in all, idle 105. Reads were at 5, 10, ..., 100 s: the youngest that is a minute old was
    # at 75 s, so the newest numbers are of 60 s, of which 30 were idle.
    assert found['idle'] == pytest.approx(105 / 135) and found['idle_now'] == pytest.approx(30 / 60)
    assert found['tokens_per_sec'] == pytest.approx(65 / 60)


def test_a_turn_that_fails_is_over(clock):
    meter = Meter(clock)
    with pytest.raises(ValueError), meter.turn():
        raise ValueError
    with pytest.raises(ValueError), meter.still():
        raise ValueError
    clock.wait(2)
    assert (meter.turns, meter.read()['idle']) == (0, 1.0)
