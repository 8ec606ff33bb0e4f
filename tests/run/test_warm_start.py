"""What the warm start reads in which step, and which of them are logged."""

import pytest

from configs import tiny
from echo_jax.run.warm_start import LOG_EVERY, lesson


@pytest.mark.parametrize('explore_steps', [140, 141])
def test_both_kinds_of_steps_are_logged(explore_steps):
    steps = tiny.get_config().warm_start.steps
    logged = range(LOG_EVERY, steps + 1, LOG_EVERY)
    kinds = [lesson(done - 1, explore_steps)[0] for done in logged]
    assert {*kinds[: explore_steps // LOG_EVERY]} == {'explore'}
    assert {*kinds[explore_steps // LOG_EVERY + 1 :]} == {'explore', 'practice'}


def test_practice_and_exploration_take_turns():
    read = [lesson(done, explore_steps=3)[:2] for done in range(8)]
    assert read[:3] == [('explore', 0), ('explore', 1), ('explore', 2)]
    assert read[3:] == [*zip(['practice', 'explore'] * 2, [0, 3, 1, 4]), ('practice', 2)]
