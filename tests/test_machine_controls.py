"""The machine study's controls, tokenizer and first commands, on batches of real conversations."""

import dataclasses
from typing import NamedTuple

import ml_collections
import numpy as np
import pytest

from configs import machine
from echo_jax.agent.dialects import qwen3_xml
from echo_jax.agent.observations import describe
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.agent.tokenizer import build_tokenizer, chat_template, training_texts
from echo_jax.learner import updates
from echo_jax.policy import Generation
from echo_jax.sandbox import CommandResult
from echo_jax.tasks.generate import demonstration, generate_tasks, usage
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Batch, Role, Rollout, Status
from experiments.machine import control, results, tokenizer_size

GROUPS, SAMPLES = 4, 2


class World(NamedTuple):
    """Tasks on a machine, its tokenizer, and rollouts in which tools are called wrong."""

    config: ml_collections.ConfigDict
    tasks: list
    protocol: Protocol
    rollouts: list[Rollout]


@pytest.fixture(scope='module')
def world(tmp_path_factory) -> World:
    config = machine.get_config()
    config.batch.groups, config.group_size = GROUPS, SAMPLES
    folder = tmp_path_factory.mktemp('world') / 'train'
    tasks = load_tasks(
        generate_tasks(folder, split='train', count=24, seed=1, families=['machine'])
    )
    tokenizer = build_tokenizer(
        training_texts(tasks, 'brief', qwen3_xml), config.model.vocab_size, chat_template()
    )
    protocol = Protocol(tokenizer, config.protocol)
    rollouts = [
        rollout(protocol, tasks[group], group, sample)
        for group in range(GROUPS)
        for sample in range(SAMPLES)
    ]
    return World(config, tasks, protocol, rollouts)


def rollout(protocol: Protocol, task, group: int, sample: int) -> Rollout:
    """Sample 0 calls the first tool wrong and reads its usage line, sample 1 calls it right."""
    conversation = protocol.start(task.instruction)
    right, line = usage(task)
    name, option, file = right.split()
    wrong = f'{name} -{"x" if option != "-x" else "y"} {file}'
    missed = CommandResult('', line, 2, False)
    turns = [(wrong, missed)] if sample == 0 else []
    for command, result in [*turns, (right, CommandResult('', '', 0, False))]:
        ids = protocol.encoder.encode(format_reply('Seal it.', command))
        ids = np.array([*ids, *protocol.turn_end_ids[:1]])
        zeros = np.zeros(len(ids))
        conversation.append_turn(Generation(ids, zeros - 1, zeros.astype(int), 'stop'))
        assert conversation.append_observation(describe(command, result, 1000, 'start'))
    return Rollout(
        tokens=np.array(conversation.tokens, np.int32),
        roles=np.array(conversation.roles, np.uint8),
        rollout_logprobs=np.array(conversation.logprobs, np.float32),
        policy_versions=np.array(conversation.versions, np.int32),
        turn_starts=np.array(conversation.turn_starts, np.int32),
        reward=float(sample),
        status=Status.OK,
        task_id=task.task_id,
        group_id=group,
        sample_id=sample,
    )


def options(world: World):
    return lambda rollout: control.usage_options(rollout, world.protocol.encoder.tokenizer)


def test_options_of_usage_lines_are_found(world):
    for each in world.rollouts:
        found = options(world)(each)
        if each.sample_id == 1:
            assert not len(found)
            continue
        _, line = usage(world.tasks[each.group_id])
        (at,) = found
        assert each.roles[at] == Role.OUTPUT
        decode = world.protocol.encoder.decode
        assert decode(each.tokens[at : at + 1]) == line.split()[2][1:]
        assert decode(each.tokens[at - 5 : at + 3]) == line.strip()
        cut = dataclasses.replace(each, tokens=each.tokens[: at + 1], roles=each.roles[: at + 1])
        assert options(world)(cut).tolist() == [at]
        told = dataclasses.replace(each, roles=np.full_like(each.roles, Role.WRAPPER))
        assert not len(options(world)(told))


def letters(world: World, rollouts: list[Rollout]) -> list[int]:
    return [int(r.tokens[at]) for r in rollouts for at in options(world)(r)]


def test_permuted_rollouts_differ_in_their_options_alone(world):
    before = letters(world, world.rollouts)
    assert len(before) == GROUPS and len({*before}) > 1
    orders = set()
    for seed in range(20):
        told = control.permuted(world.rollouts, options(world), np.random.default_rng(seed))
        orders.add(tuple(letters(world, told)))
        assert sorted(letters(world, told)) == sorted(before)
        for old, new in zip(world.rollouts, told):
            differ = np.flatnonzero(old.tokens != new.tokens)
            assert {*differ} <= {*options(world)(old)}
    assert len(orders) > 5
    assert letters(world, world.rollouts) == before  # what the policy term sees is as it was


def weighted(batch: Batch, weights: np.ndarray) -> dict[tuple, float]:
    """The sum of the weights over each (token with the four before it, advantage)."""
    sums: dict[tuple, float] = {}
    for row, column in zip(*np.nonzero(weights)):
        tokens = batch.tokens[row, column - 4 : column + 1]
        key = (*tokens.tolist(), float(batch.advantages[row, column]))
        sums[key] = sums.get(key, 0.0) + float(weights[row, column])
    return sums


def test_the_shuffled_control_changes_what_the_environment_term_predicts_alone(world):
    config = world.config
    (plain,) = updates.mini_batches(world.rollouts, config, 3)
    mini_batches = control.shuffled(updates.mini_batches, options(world))
    (batch,) = mini_batches(world.rollouts, config, 3)
    assert len(batch.tokens) == 2 * len(plain.tokens)
    assert not np.any((batch.policy_weight > 0) & (batch.env_weight > 0).any(1, keepdims=True))
    # The policy term is the same sum.
    assert weighted(batch, batch.policy_weight) == pytest.approx(
        weighted(plain, plain.policy_weight)
    )
    # The environment term has the same weights, on other letters and on what follows them.
    ours, theirs = (weighted(b, b.env_weight) for b in (batch, plain))
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()))
    assert ours != pytest.approx(theirs)
    (dash,) = world.protocol.encoder.encode(' -')
    assert all(dash in key for key in {*ours} ^ {*theirs})
    # Rows without a token are last, and each step permutes anew.
    used = (batch.segment_ids > 0).any(axis=1)
    assert np.all(used[: used.sum()])
    again = mini_batches(world.rollouts, config, 3)[0]
    others = [mini_batches(world.rollouts, config, step)[0] for step in range(4, 14)]
    assert np.array_equal(again.tokens, batch.tokens)
    assert any(not np.array_equal(other.tokens, batch.tokens) for other in others)


def test_env_only_has_no_advantage_and_the_same_environment_term(world):
    (plain,) = updates.mini_batches(world.rollouts, world.config, 3)
    (batch,) = control.env_only(updates.mini_batches)(world.rollouts, world.config, 3)
    assert np.abs(plain.advantages).max() > 0.5 and not batch.advantages.any()
    assert np.array_equal(batch.env_weight, plain.env_weight)
    assert np.array_equal(batch.policy_weight, plain.policy_weight)  # the KL term's, too


# ------------------------------------------------------------------------------- tokenizer, calls


def test_the_size_of_the_tokenizer_is_the_smallest_that_fits(world, monkeypatch):
    monkeypatch.setattr(tokenizer_size, 'SIZES', range(400, 448, 16))
    found = tokenizer_size.sizes(world.tasks, world.config)
    assert list(found) == [400, 416, 432]
    assert (
        tokenizer_size.smallest([found], world.config.protocol)
        == machine.get_config().model.vocab_size
    )
    tight = ml_collections.ConfigDict(world.config.protocol)
    tight.max_total_tokens = found[432].episode - 1
    with pytest.raises(ValueError, match='no size fits'):
        tokenizer_size.smallest([found], tight)
    # The measure of a real episode: a prompt, a wrong call and its answer, as they are appended.
    task = max(world.tasks[:GROUPS], key=lambda task: len(task.instruction))
    wrong = next(r for r in world.rollouts if r.task_id == task.task_id)
    end = wrong.turn_starts[1]
    measured = tokenizer_size.measure(
        [task], world.protocol.encoder.tokenizer, world.config.protocol
    )
    assert measured.prompt + measured.turn + measured.answer == end


def test_the_first_command_of_a_rollout(world):
    for each in world.rollouts:
        command = results.first_command(each, world.protocol)
        right = demonstration(world.tasks[each.group_id])[0][1]
        assert (command == right) == (each.sample_id == 1)
        assert command.split()[0] == right.split()[0]


def test_a_new_machine_has_the_same_tokenizer_and_sessions(world, tmp_path):
    """So the runs on new machines may take over the warm start."""
    folder = tmp_path / 'train'
    generate_tasks(folder, split='train', count=24, seed=1, families=['new_machine'])
    texts = training_texts(load_tasks(folder), 'brief', qwen3_xml)
    tokenizer = build_tokenizer(texts, world.config.model.vocab_size, chat_template())
    assert tokenizer.get_vocab() == world.protocol.encoder.tokenizer.get_vocab()
