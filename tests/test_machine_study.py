"""The machine study: its statistics and tables by hand arithmetic, its runs for real."""

import json
import math
import pathlib
import re

import ml_collections
import numpy as np
import pytest
from scipy import stats as scipy_stats

from echo_jax.run.intervals import mean_of_values
from echo_jax.types import Status
from experiments.machine import beside, report, results, stats
from experiments.machine.arms import ARMS, SEEDS, WORKER_PYTHON, Arm, Run, runs
from experiments.machine.study import Study
from tests.support.processes import soon
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
    found = mean_of_values([1.0, 2.0, 3.0])
    half = scipy_stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found == pytest.approx((2.0, 2 - half, 2 + half))
    assert mean_of_values([0.5]).mean == 0.5 and math.isnan(mean_of_values([0.5]).low)


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
        head_dim=32,  # on a CPU vLLM refuses 16
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

    def programs(self, seed: int, folder: pathlib.Path) -> list[list[str]]:
        return [[*command, *config_flags(SMALL)] for command in super().programs(seed, folder)]


def test_the_runs_of_the_study():
    found = runs(list(ARMS), SEEDS)
    assert len(found) == len({*found}) == sum(arm.seeds for arm in ARMS.values()) == 51
    on_five_seeds = {'echo', 'grpo', 'shuffled', 'four_ahead', 'tiny', 'tiny_four_ahead'}
    assert {run.arm for run in found[:30]} == on_five_seeds
    assert [run.seed for run in found[:7]] == [0, 0, 0, 0, 0, 0, 1]
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


@pytest.fixture
def small_arms(programs, monkeypatch):
    """The arms with small runs, whose processes `programs` finds."""
    for name, arm in ARMS.items():
        monkeypatch.setitem(ARMS, name, SmallArm(*arm))
    for key in ('JAX_COMPILATION_CACHE_DIR', 'PATH', 'VLLM_PROCESS_NAME_PREFIX'):
        monkeypatch.setenv(key, programs.environment[key])
    monkeypatch.setattr('experiments.machine.study.POLL_SECONDS', 0.2)
    return programs


@pytest.mark.timeout(900)  # three runs in processes of their own
def test_the_study_for_real(small_arms, tmp_path):
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
        for key in ('rollout/reward', 'rollout/first_right', 'train/grad_norm_env'):
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

    # A single run beside a published one.
    published = tmp_path / 'published.json'
    published.write_text(results.dumps([kept['shuffled'] | {'arm': 'grpo', 'seed': 0}]))
    two = beside.both(folder / 'echo_0', published)
    assert two.run('echo', 0) == kept['echo']
    _, start, echo, grpo = (list(column.cells) for column in beside.table(two).columns)
    assert len(start) == len(echo) == len(grpo) == 6
    shown = (start, 'echo', 'before'), (echo, 'echo', 'after'), (grpo, 'grpo', 'after')
    for column, arm, when in shown:
        assert column[0] == f'{np.mean(two.solved(arm, 0, when)):.1%}'
    published.write_text(results.dumps([kept['shuffled'] | {'arm': 'grpo', 'seed': 3}]))
    with pytest.raises(ValueError, match=r'seed 0; GRPO is published for \[3\]'):
        beside.both(folder / 'echo_0', published)

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

    # A run that the machine was too busy for counts neither while it is made nor afterwards.
    late = {f'rollout/status/{status}': 3 * (status == 'agent_timeout') for status in Status}
    with (folder / 'echo_0' / 'metrics.jsonl').open('a') as file:
        file.write(json.dumps({'step': 3, **late}) + '\n')
    reason = 'echo_0 does not count: episodes of steps 3 to 3 ended 3 with agent_timeout'
    with pytest.raises(SystemExit, match=reason):
        study.results()
    (folder / 'echo_0' / 'summary.json').unlink()
    with pytest.raises(SystemExit, match=reason):
        Study(folder, [Run('echo', 0)]).make(jobs=1)
    assert soon(lambda: small_arms.alive() == [])  # a tracker of resources ends a moment later


@pytest.mark.timeout(600)
@pytest.mark.skipif(not WORKER_PYTHON.exists(), reason=f'no {WORKER_PYTHON}: `make rollout`')
def test_a_run_with_a_worker_for_real(small_arms, monkeypatch, tmp_path):
    study = Study(tmp_path, [Run('four_ahead', 0)])
    study.make(jobs=1)
    (kept,) = study.results()
    for key in ('rollout/reward', 'rollout/first_right'):
        assert [step for step, _ in kept['series'][key]] == [1, 2]
    assert soon(lambda: small_arms.alive() == [])  # a tracker of resources ends a moment later
    # vLLM says at every swap that layers without weights failed to load them, and at its end that
    # a destructor failed.
    log = (tmp_path / 'four_ahead_0.log').read_text()
    assert 'Failed to load' not in log and 'Exception ignored' not in log
    # A worker that fails ends its run; one that cannot be started is named before anything runs.
    monkeypatch.setattr('experiments.machine.arms.WORKER_PYTHON', pathlib.Path('/bin/false'))
    with pytest.raises(SystemExit, match='four_ahead_1 failed'):
        Study(tmp_path, [Run('four_ahead', 1)]).make(jobs=1)
    assert soon(lambda: small_arms.alive() == [])  # a tracker of resources ends a moment later
    monkeypatch.setattr('experiments.machine.arms.WORKER_PYTHON', tmp_path / 'nothing')
    with pytest.raises(SystemExit, match=r'error: four_ahead_2: .*`make rollout`'):
        Study(tmp_path, [Run('four_ahead', 0), Run('four_ahead', 2)]).make(jobs=1)


def test_what_a_busy_machine_spoils(tmp_path):
    rows = [
        dict(step=1, agent_timeout=0.0, verifier_error=0.0, infra_error=0.0),
        dict(step=2, agent_timeout=2.0, verifier_error=0.0, infra_error=0.0),
        dict(step=3, agent_timeout=0.0, verifier_error=0.0, infra_error=0.0),
        dict(step=4, agent_timeout=1.0, verifier_error=0.0, infra_error=4.0),
    ]
    prefixed = [
        {key if key == 'step' else f'rollout/status/{key}': row[key] for key in row} for row in rows
    ]
    lines = [json.dumps(row) + '\n' for row in prefixed]
    assert results.spoiled(tmp_path) == ''
    (tmp_path / 'metrics.jsonl').write_text(lines[0])
    assert results.spoiled(tmp_path) == ''
    (tmp_path / 'metrics.jsonl').write_text(''.join(lines))
    told = results.spoiled(tmp_path)
    assert told.startswith(
        'episodes of steps 2 to 4 ended 3 with agent_timeout, 4 with infra_error:'
    )


def test_a_study_that_is_stopped_ends_its_runs(programs, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', programs.environment['PATH'])  # by which `programs` finds them
    alive = []

    def stop(seconds: float) -> None:
        alive.extend(programs.alive())
        raise KeyboardInterrupt

    monkeypatch.setattr('experiments.machine.study.time.sleep', stop)
    with pytest.raises(KeyboardInterrupt):
        Study(tmp_path, runs(['echo', 'tiny'], [0])).make(jobs=2)
    assert len(alive) == 2 and soon(lambda: programs.alive() == [])


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
        'summary': {
            'env_ce_output_before': 0.5,
            'env_ce_output_after': 0.25 + seed,
            'train_minutes': 12.4,
        },
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
                stored('echo', 2, [1, 1, 1, 1, 0, 0], slow),
                stored('grpo', 2, [1, 0, 0, 0, 0, 0], slow),
                stored('grpo_no_kl', 0, [1, 0, 0, 0, 0, 0], fast),
                stored('grpo_no_kl', 1, [1, 0, 0, 0, 0, 0], fast),
            ]
        )
    )
    rows = text.splitlines()
    # Differences of 1/3, 2/3 and 1/2: mean 1/2, standard deviation 1/6, t of 0.975 with two degrees
    # of freedom 4.303, half the interval 0.414.
    assert (
        '| ECHO, 0.3 | 3 | 0.000 | 0.778 | 1.00 / 0.83 / 0.50 | 0.17 to 0.50 | 0.50 to 1.25 '
        '| +0.500 (+0.086 to +0.914) |'
    ) in rows
    # Two equal differences would give an interval of no width.
    assert (
        '| GRPO without KL | 2 | 0.000 | 0.167 | 0.50 / 0.00 / 0.00 | 0.17 to 0.50 | 0.50 to 0.75 '
        '| -0.167 (-0.167, -0.167) |'
    ) in rows
    # Seed 0: ECHO alone solves two. The variance of the differences is (4 / 9 + 8 / 9) / 5. Means
    # of ten of its rewards reach 0.15, GRPO's last, at step 10: (3 * 0.1 + 7 * 0.4) / 10 = 0.31.
    error = math.sqrt((2 * (2 / 3) ** 2 + 4 * (1 / 3) ** 2) / 5 / 6)
    assert f'| 0 | 0.667 | 0.333 | +0.333 ({error:.3f}) | 2, 0 | 0.5 | 10 |' in rows
    # Seed 1: four alone, 2 / 2**4. ECHO's means end at 0.15, GRPO's at 0.4.
    assert any(r.startswith('| 1 | 1.000 | 0.333 | +0.667 (') for r in rows)
    assert any(r.endswith('| 4, 0 | 0.12 | never |') for r in rows)
    assert '| mean |  |  | +0.500 (+0.086 to +0.914) |  | 0.25, over seeds |  |' in rows
    assert '| GRPO | 1 | 0.000 | 0.333 | 0.50 / 0.50 / 0.00 |' in text  # and every run


def test_a_report_of_an_arm_that_no_figure_shows(tmp_path):
    alone = [stored('one_ahead', 0, [1, 1, 0, 1, 1, 0], [0.1] * 15)]
    (tmp_path / 'results.json').write_text(results.dumps(alone))
    assert '| ECHO, 0.3, one step ahead | 1 | 0.000 | 0.667 |' in report.write(tmp_path)
    assert (tmp_path / 'result.png').read_bytes().startswith(b'\x89PNG')
