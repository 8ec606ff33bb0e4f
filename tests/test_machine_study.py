"""The machine study: its statistics by hand arithmetic, its controls, runs and report for real."""

import dataclasses
import json
import math
import pathlib
import re
from typing import NamedTuple

import ml_collections
import numpy as np
import pytest
from scipy import stats as scipy_stats

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
from experiments.machine import control, report, results, stats, tokenizer_size
from experiments.machine.arms import ARMS, SEEDS, Arm, Run, runs
from experiments.machine.study import Study
from tests.support.small_run import config_flags

# ------------------------------------------------------------------------------------- statistics


def test_paired_by_hand():
    # Differences 1, 1, 0, -1: mean 1/4; variance ((3/4)^2 * 2 + (1/4)^2 + (5/4)^2) / 3 = 11/12.
    found = stats.paired([1, 1, 1, 0], [0, 0, 1, 1])
    assert found.difference == 0.25
    assert found.error == pytest.approx(math.sqrt(11 / 12 / 4))
    assert (found.only_first, found.only_second) == (2, 1)
    # Of three tasks two or more on one side: 2 * (3 + 1) / 8.
    assert found.p == pytest.approx(1.0)
    # 37 tasks of 192 that the first alone solves, none the other way.
    found = stats.paired([1] * 138 + [0] * 54, [1] * 101 + [0] * 91)
    share = 37 / 192
    assert found.difference == pytest.approx(share)
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / 191))
    assert found.p == pytest.approx(2 * 0.5**37)


def test_the_sign_test_leaves_ties_out():
    assert stats.sign_test([0.1, 0.2, 0.3, 0.1, 0.2]) == pytest.approx(2 / 32)
    assert stats.sign_test([0.1, -0.2, 0.0, 0.1, 0.2]) == pytest.approx(2 * (1 + 4) / 16)
    assert stats.sign_test([0.0, 0.0]) == 1.0


def test_the_interval_over_seeds_by_hand():
    # Mean 2, standard deviation 1, t of 0.975 with 2 degrees of freedom 4.303.
    found = stats.interval([1.0, 2.0, 3.0])
    half = scipy_stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found == pytest.approx((2.0, 2 - half, 2 + half))
    assert stats.interval([0.5]).mean == 0.5 and math.isnan(stats.interval([0.5]).low)


def test_steps_to_the_last_rate():
    slow = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]  # the last two: 0.45
    fast = [0.0, 0.3, 0.5, 0.5, 0.6, 0.6]  # means of two: 0.15, 0.4, 0.5
    assert stats.steps_to_last(fast, slow, window=2) == 4
    assert stats.steps_to_last(slow, slow, window=2) == 6
    assert stats.steps_to_last(slow, fast, window=2) is None
    assert stats.steps_to_last([0.2, 0.6], [0.1, 0.5], window=10) == 2


def test_rates_by_the_number_of_tools():
    assert stats.by_count([1, 0, 0, 1, 1, 0], [1, 2, 3, 1, 2, 3]) == [1.0, 0.5, 0.0]
    assert np.allclose(stats.smoothed([1.0, 2.0, 3.0, 4.0], 2), [1.5, 2.5, 3.5])
    assert np.allclose(stats.smoothed([1.0, 2.0], 10), [1.5])


# --------------------------------------------------------------------------------------- controls

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


# ------------------------------------------------------------------------------ arms, runs, report

SMALL = dict(
    num_steps=2,
    group_size=2,
    batch=dict(groups=2),
    model=dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
    ),
    policy=dict(slots=4),
    sandbox=dict(at_once=4),
    tasks=dict(train_count=24, heldout_count=6),
    warm_start=dict(steps=2, explore_steps=2, rollouts=4, explorations=6, save_every=2),
    eval=dict(every=1),
    checkpoint=dict(every=1),
)


class SmallArm(Arm):
    """The same arm with a model and counts as small as they can be."""

    def config(self, seed: int) -> ml_collections.FrozenConfigDict:
        config = ml_collections.ConfigDict(super().config(seed))
        config.update(SMALL)
        return ml_collections.FrozenConfigDict(config)

    def flags(self, seed: int, folder: pathlib.Path) -> list[str]:
        return [*super().flags(seed, folder), *config_flags(SMALL)]


def test_the_runs_of_the_study():
    found = runs(list(ARMS), SEEDS)
    assert len(found) == len({*found}) == sum(arm.seeds for arm in ARMS.values()) == 35
    assert {run.arm for run in found[:15]} == {'echo', 'grpo', 'shuffled'}
    assert [run.seed for run in found[:4]] == [0, 0, 0, 1]
    assert runs(['grpo_no_kl', 'grpo'], [1, 4]) == [
        Run('grpo', 1),
        Run('grpo', 4),
        Run('grpo_no_kl', 1),
    ]
    with pytest.raises(ValueError, match=r"\['nope'\] are no arms or seeds"):
        runs(['echo', 'nope'], [0])
    with pytest.raises(ValueError, match=r'\[5\] are no arms or seeds'):
        runs(['echo'], [5])


@pytest.mark.parametrize('name', ARMS)
def test_an_arm_says_what_its_run_is(name):
    arm, config = ARMS[name], ARMS[name].config(3)
    assert config.seed == 3
    # A run takes over the warm start of an arm that makes the same one, and is compared with GRPO
    # on the same tasks.
    source, against = (ARMS[other].config(3) for other in (arm.warm_start, arm.against))
    assert source.warm_start == config.warm_start and source.model == config.model
    assert against.tasks == config.tasks and against.loss.env_coef == 0
    assert ARMS[arm.warm_start].warm_start == arm.warm_start


def test_a_new_machine_has_the_same_tokenizer_and_sessions(world, tmp_path):
    """So the runs on new machines may take over the warm start."""
    folder = tmp_path / 'train'
    generate_tasks(folder, split='train', count=24, seed=1, families=['new_machine'])
    texts = training_texts(load_tasks(folder), 'brief', qwen3_xml)
    tokenizer = build_tokenizer(texts, world.config.model.vocab_size, chat_template())
    assert tokenizer.get_vocab() == world.protocol.encoder.tokenizer.get_vocab()


@pytest.mark.timeout(900)  # three runs in processes of their own
def test_the_study_for_real(programs, monkeypatch, tmp_path):
    for name, arm in ARMS.items():
        monkeypatch.setitem(ARMS, name, SmallArm(*arm))
    for key in ('JAX_COMPILATION_CACHE_DIR', 'PATH'):
        monkeypatch.setenv(key, programs.environment[key])
    monkeypatch.setattr('experiments.machine.study.POLL_SECONDS', 0.2)
    wanted = runs(['new_machine_grpo', 'echo', 'shuffled'], [0])
    folder = tmp_path / 'runs'
    study = Study(folder, wanted)
    assert [run.name for run in wanted if study.is_ready(run)] == ['echo_0']
    study.make(jobs=2)
    assert all(study.is_done(run) for run in wanted) and study.steps() == 6

    logs = {run.arm: (folder / f'{run.name}.log').read_text() for run in wanted}
    assert [arm for arm in logs if 'warm start 2/2' in logs[arm]] == ['echo']
    before = {
        run.arm: sorted(f.stat().st_ino for f in (folder / run.name).glob('rollouts/*/groups/*'))
        for run in wanted
    }
    assert len(set(before['echo']) & set(before['shuffled'])) == 6
    assert not set(before['echo']) & set(before['new_machine_grpo'])

    kept = {result['arm']: result for result in study.results()}
    assert list(kept) == ['echo', 'shuffled', 'new_machine_grpo']
    for result in kept.values():
        assert result['heldout']['tools'] == [1, 2, 3, 1, 2, 3]
        for when in ('before', 'after'):
            solved = result['heldout'][when]['solved']
            assert np.mean(solved) == result['summary'][f'solve_rate_{when}']
        for key in ('rollout/reward', 'rollout/first_right', 'train/grad_norm'):
            assert [step for step, _ in result['series'][key]] == [1, 2]
    assert kept['echo']['heldout']['before'] == kept['shuffled']['heldout']['before']

    # What is done is not repeated, and what fails is named.
    times = {file: file.stat().st_mtime_ns for file in folder.glob('*/*')}
    study.make(jobs=1)
    assert times == {file: file.stat().st_mtime_ns for file in folder.glob('*/*')}
    (folder / 'grpo_1').mkdir()
    (folder / 'grpo_1' / 'config.json').write_text('{"seed": 7}')
    with pytest.raises(SystemExit, match=r'is a run of another config.*\n.*grpo_1 failed'):
        Study(folder, [Run('grpo', 1)]).make(jobs=1)
    assert len(Study(folder, wanted).results()) == 3

    (tmp_path / 'results.json').write_text(results.dumps(study.results()))
    assert json.loads((tmp_path / 'results.json').read_text()) == study.results()
    (tmp_path / 'README.md').write_text('# A\n<!-- tables -->\nold\n<!-- end of tables -->\nend\n')
    text = report.write(tmp_path)
    page = (tmp_path / 'README.md').read_text()
    assert page == f'# A\n<!-- tables -->\n{text}\n<!-- end of tables -->\nend\n'
    for arm in kept:
        assert len(re.findall(rf'^\| {re.escape(ARMS[arm].title)} \| [01] \| ', text, re.M)) == 2
    for figure in ('result.png', 'curves.png'):
        assert (tmp_path / figure).read_bytes().startswith(b'\x89PNG')


def test_a_study_that_is_stopped_ends_its_runs(programs, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', programs.environment['PATH'])  # by which `programs` finds them
    alive = []

    def stop(seconds: float) -> None:
        alive.extend(programs.alive())
        raise KeyboardInterrupt

    monkeypatch.setattr('experiments.machine.study.time.sleep', stop)
    with pytest.raises(KeyboardInterrupt):
        Study(tmp_path, runs(['echo', 'tiny'], [0])).make(jobs=2)
    assert len(alive) == 2 and programs.alive() == []


def test_the_page_shows_the_results_that_are_stored():
    stored = report.Results(json.loads((report.HERE / 'results.json').read_text()))
    assert report.tables(stored) in (report.HERE / 'README.md').read_text()


def stored(arm: str, seed: int, solved: list[int], rewards: list[float]) -> dict:
    """A run of six held-out tasks, of which none was solved before training."""
    before = {'solved': [0] * 6, 'first_right': [1, 0, 0, 0, 0, 0]}
    after = {'solved': solved, 'first_right': [1, 1, 1, 0, 0, 0]}
    return {
        'arm': arm,
        'seed': seed,
        'summary': {'env_ce_before': 0.5, 'env_ce_after': 0.25 + seed, 'train_minutes': 12.4},
        'series': {'rollout/reward': [[step, r] for step, r in enumerate(rewards, 1)]},
        'heldout': {'tools': [1, 2, 3, 1, 2, 3], 'before': before, 'after': after},
    }


def test_the_tables_by_hand():
    slow, fast = [0.1] * 10 + [0.2] * 5, [0.1] * 3 + [0.4] * 12
    text = report.tables(
        report.Results(
            [
                stored('echo', 0, [1, 1, 0, 1, 1, 0], fast),  # 4 of 6
                stored('grpo', 0, [1, 0, 0, 1, 0, 0], slow),  # 2 of 6
                stored('echo', 1, [1, 1, 1, 1, 1, 1], slow),
                stored('grpo', 1, [1, 1, 0, 0, 0, 0], fast),
                stored('grpo_no_kl', 1, [1, 0, 0, 0, 0, 0], fast),
            ]
        )
    )
    rows = text.splitlines()
    # Differences of 1/3 and 2/3: mean 1/2, standard error 1/6, t of one degree of freedom 12.706.
    assert (
        '| ECHO, 0.3 | 2 | 0.000 | 0.833 | 1.00 / 1.00 / 0.50 | 0.17 to 0.50 | 0.50 to 0.75 '
        '| +0.500 (-1.618 to +2.618) |'
    ) in rows
    assert (
        '| GRPO without KL | 1 | 0.000 | 0.167 | 0.50 / 0.00 / 0.00 | 0.17 to 0.50 | 0.50 to 1.25 '
        '| -0.167 |'
    ) in rows
    # Seed 0: ECHO alone solves two. The variance of the differences is (4 / 9 + 8 / 9) / 5. Means
    # of ten of its rewards reach 0.15, GRPO's last, at step 10: (3 * 0.1 + 7 * 0.4) / 10 = 0.31.
    error = math.sqrt((2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2) / 5 / 6)
    assert f'| 0 | 0.667 | 0.333 | +0.333 ({error:.3f}) | 2, 0 | 0.5 | 10 |' in rows
    # Seed 1: four alone, 2 / 2**4. ECHO's means end at 0.15, GRPO's at 0.4.
    assert any(r.startswith('| 1 | 1.000 | 0.333 | +0.667 (') for r in rows)
    assert any(r.endswith('| 4, 0 | 0.12 | never |') for r in rows)
    assert '| mean |  |  | +0.500 (-1.618 to +2.618) |  | 0.5, over seeds |  |' in rows
    assert '| GRPO | 1 | 0.000 | 0.333 | 0.50 / 0.50 / 0.00 |' in text  # and every run
