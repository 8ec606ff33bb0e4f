"""What the warm start reads in which step, and which of them are logged."""

import pytest

from configs import tiny
from echo_jax.agent.protocol import Protocol
from echo_jax.run import entry
from echo_jax.run.warm_start import LOG_EVERY, lesson, write_transcripts
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox import SandboxError
from echo_jax.types import Status
from tests.support.bad_tasks import break_user


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


@pytest.mark.slow
def test_transcripts_that_all_failed_are_drawn_again(tmp_path):
    config = tiny.get_config()
    config.warm_start.update(steps=2, explore_steps=2, explorations=2)
    config.tasks.train_count = 40
    work = Workdir(tmp_path / 'run', config)
    tokenizer, stop = work.tokenizer(), entry.Stop()
    protocol = Protocol(tokenizer, config.protocol)
    dockerfiles = [task.path / 'environment' / 'Dockerfile' for task in work.tasks('explore')]
    texts = [file.read_text() for file in dockerfiles]
    for file in dockerfiles:
        break_user(file.parents[1])
    with pytest.raises(SandboxError, match=r'every transcript in .* is an INFRA_ERROR'):
        write_transcripts(work, tokenizer, protocol, stop)
    for file, text in zip(dockerfiles, texts):
        file.write_text(text)
    (found,) = write_transcripts(work, tokenizer, protocol, stop).values()
    assert len(found) == 2 and all(r.status != Status.INFRA_ERROR for r in found)
