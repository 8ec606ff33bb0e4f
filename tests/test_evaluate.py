"""evaluate as a process, and its numbers by hand."""

import json
import shutil

import numpy as np
import pytest

from configs.tiny import get_config
from echo_jax.run.heldout import eval_metrics, evaluation_metrics, summary
from echo_jax.run.intervals import mean_of_shares
from echo_jax.run.measures import env_ce, pass_at_k
from echo_jax.run.workdir import Workdir
from echo_jax.tasks.generate import FAMILIES, generate_tasks
from echo_jax.tasks.parquet import write_parquet
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Role, Rollout, Status
from tests.support.small_run import HELDOUT, SETTINGS, config_flags, metrics, wait_for
from tests.support.task_folders import write

STEPS = SETTINGS['num_steps']
RESULT = {'task_id', 'sample_id', 'reward', 'correct', 'status', 'reason', 'turns'}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A task of every family."""
    folder = tmp_path_factory.mktemp('tasks') / 'heldout'
    return generate_tasks(folder, split='heldout', count=len(FAMILIES), seed=3)


def evaluate(programs, output, *flags) -> tuple[dict, str]:
    done = programs.run('evaluate', '--config=configs/tiny.py', f'--output={output}', *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


@pytest.mark.parametrize('agent, reward', [('oracle', 1.0), ('nop', 0.0)])
def test_agents_without_a_model(programs, tasks, tmp_path, agent, reward):
    output = tmp_path / 'new' / 'eval.json'
    document, said = evaluate(programs, output, f'--tasks={tasks}', f'--agent={agent}')
    assert [result.keys() for result in document['results']] == [RESULT] * len(FAMILIES)
    names = sorted(path.name for path in tasks.iterdir() if path.is_dir())
    assert [result['task_id'] for result in document['results']] == names
    got = {(r['reward'], r['correct'], r['status']) for r in document['results']}
    assert got == {(reward, bool(reward), 'ok')}
    rate = mean_of_shares([reward] * 10)._asdict()
    assert document['pass@k'] == {'1': rate} and document['env_ce'] == {}
    assert document['left_out'] == [] and {r['reason'] for r in document['results']} == {''}
    shown = f'{reward:.1%} ({rate["low"]:.1%} to {rate["high"]:.1%})'
    assert f'10 tasks, {agent}: pass@1 {shown}; 0 with an error status' in said
    assert not programs.alive()


def test_samples_of_a_parquet(programs, tasks, tmp_path):
    file = tmp_path / 'set.parquet'
    write_parquet(load_tasks(tasks)[:3], file)
    flags = [f'--tasks={file}', '--agent=oracle', '--samples=2']
    document, said = evaluate(programs, tmp_path / 'eval.json', *flags)
    got = [(r['task_id'], r['sample_id'], r['reward'], r['turns']) for r in document['results']]
    assert got == [(t.task_id, i, 1.0, 0) for t in load_tasks(tasks)[:3] for i in range(2)]
    assert {k: rate['mean'] for k, rate in document['pass@k'].items()} == {'1': 1.0, '2': 1.0}
    assert '3 tasks, oracle: pass@1 100.0% (' in said


def test_the_tasks_of_a_run_without_a_model(programs, tmp_path):
    config = get_config()
    config.tasks.heldout_count = 2
    run = Workdir(tmp_path / 'run', config)
    flags = ['--config.tasks.heldout_count=2', f'--workdir={run.path}', '--agent=nop']
    document, _ = evaluate(programs, tmp_path / 'eval.json', *flags)
    assert [r['task_id'] for r in document['results']] == [t.task_id for t in run.tasks('heldout')]
    assert {r['reward'] for r in document['results']} == {0.0}


def test_one_task_without_a_sandbox_does_not_end_the_check(programs, tasks, tmp_path):
    folder = shutil.copytree(tasks, tmp_path / 'set')
    broken = sorted(path for path in folder.iterdir() if path.is_dir())[4]
    (broken / 'environment' / 'Dockerfile').write_text('FROM x\nRUN exit 3\n')
    write(folder / 'compose', '[environment]\ngpus = 1\n')
    write(folder / 'unreadable', '[environment')
    output = tmp_path / 'eval.json'
    flags = ['--config=configs/tiny.py', f'--tasks={folder}', f'--output={output}']
    done = programs.run('evaluate', *flags, '--agent=oracle', COLUMNS='300')
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last == 'error: 1 of 10 results are an infra_error; see their reasons'
    assert f'{broken.name}: ' in done.stdout and 'ended with 3' in done.stdout
    document = json.loads(output.read_text())
    results, left_out = document['results'], document['left_out']
    assert [one['task_id'] for one in left_out] == ['unreadable', 'compose']
    assert left_out[1]['reason'] == "needs [environment] gpus; sandbox.backend='harbor' runs it"
    assert '(2 more left out)' in done.stdout
    lost = [r for r in results if r['status'] == 'infra_error']
    assert [(r['task_id'], r['reward'], r['correct']) for r in lost] == [(broken.name, 0.0, False)]
    assert 'Dockerfile:2: RUN ' in lost[0]['reason'] and 'ended with 3' in lost[0]['reason']
    assert all(r['reward'] == 1 and r['status'] == 'ok' for r in results if r not in lost)


def test_policy_of_a_run(programs, finished, tmp_path):
    flags = [f'--workdir={finished}', *config_flags(SETTINGS), '--samples=2']
    document, _ = evaluate(programs, tmp_path / 'eval.json', *flags)
    drawn = [(r['task_id'].split('-')[1], r['sample_id']) for r in document['results']]
    assert drawn == [(f'{task:05d}', sample) for task in range(HELDOUT) for sample in range(2)]
    assert all(1 <= result['turns'] <= 4 for result in document['results'])
    assert {result['status'] for result in document['results']} <= {'ok', 'truncated'}
    solved = np.mean([result['correct'] for result in document['results']])
    assert document['pass@k'].keys() == {'1', '2'} and document['version'] == STEPS
    assert document['pass@k']['1']['mean'] == pytest.approx(solved)
    # The newest weights: their CE is of the kind that the run ended with.
    ended = json.loads((finished / 'summary.json').read_text())['env_ce_after']
    assert document['env_ce']['all'] == pytest.approx(ended, abs=0.3)
    assert document['env_ce'].keys() <= {'all', 'warning', 'feedback', 'wrapper', 'output'}
    assert 0 <= document['imagined'] <= 1


def test_without_weights_or_a_run(programs, finished, tmp_path):
    flags = ['--config=configs/tiny.py', *config_flags(SETTINGS)]
    line = programs.fails('evaluate', *flags, f'--workdir={tmp_path / "typo"}')
    assert f'{tmp_path}/typo holds no run' in line and not (tmp_path / 'typo').exists()
    (tmp_path / 'run').mkdir()
    shutil.copy(finished / 'config.json', tmp_path / 'run')
    line = programs.fails('evaluate', *flags, f'--workdir={tmp_path / "run"}')
    assert 'has published no weights yet' in line
    line = programs.fails('evaluate', *flags, '--agent=oracle')
    assert '--agent=oracle needs --tasks' in line
    (tmp_path / 'no_model').mkdir()
    line = programs.fails('evaluate', *flags, f'--model={tmp_path / "no_model"}')
    assert f'{tmp_path}/no_model is neither a run nor a model' in line
    line = programs.fails('evaluate', *flags)
    assert '--agent=policy needs a model: --model, a run or' in line
    line = programs.fails('evaluate', *flags, '--agent=nop', '--step=3')
    assert '--step has no effect with --agent=nop' in line
    line = programs.fails('evaluate', *flags, '--agent=nop', f'--output={tmp_path}/eval.jsonl')
    assert 'eval.jsonl: results are kept under that name until all are there' in line
    line = programs.fails('evaluate', *flags, f'--workdir={finished}', '--by=level')
    assert "no task has ['level']; there are ['family', 'source']" in line
    line = programs.fails(
        'evaluate', *flags, f'--workdir={finished}', f'--rollouts={tmp_path}/typo', '--samples=0'
    )
    assert f'--rollouts={tmp_path}/typo holds no rollouts' in line


def test_a_model_directory_gives_the_runs_own_numbers(programs, finished, tmp_path):
    model = tmp_path / 'model'
    done = programs.run('export', f'--workdir={finished}', f'--output={model}')
    assert done.returncode == 0, done.stderr
    fixed = f'--rollouts={finished}/heldout_before'
    common = [*config_flags(SETTINGS), fixed, '--by=family']
    run, _ = evaluate(programs, tmp_path / 'run.json', f'--workdir={finished}', *common)
    flags = [f'--model={model}', f'--tasks={finished}/tasks/heldout', *common]
    against = f'--against={tmp_path / "run.json"}'
    directory, said = evaluate(programs, tmp_path / 'model.json', *flags, against)
    same = ('results', 'pass@k', 'by', 'env_ce', 'env_ce_fixed', 'imagined')
    assert {key: directory[key] for key in same} == {key: run[key] for key in same}
    assert directory['version'] == 0 and run['version'] == STEPS
    assert directory['against']['gained'] == directory['against']['lost'] == []
    assert 'inside the noise, the interval holds 0' in said and 'by family' in said
    assert sum(one['tasks'] for one in run['by']['family'].values()) == HELDOUT
    ended = json.loads((finished / 'summary.json').read_text())['env_ce_after']
    assert run['env_ce_fixed']['all'] == pytest.approx(ended, abs=1e-9)
    # A saved step, on the fixed rollouts alone: the environment CE that the run logged then.
    saved = [f'--model={finished}', '--step=4', '--samples=0', *config_flags(SETTINGS), fixed]
    document, said = evaluate(programs, tmp_path / 'saved.json', *saved, against)
    logged = {row['step']: row for row in metrics(finished)}[4]['eval/env_ce']
    assert document['env_ce_fixed']['all'] == pytest.approx(logged, abs=1e-9)
    assert document['results'] == [] and document['pass@k'] == {}
    assert 'against' not in document and 'nothing is compared' in ' '.join(said.split())
    # Results of other tasks.
    write(tmp_path / 'others' / 'strange')
    line = programs.fails(
        'evaluate', '--config=configs/tiny.py', f'--tasks={tmp_path}/others', '--agent=nop', against
    )
    assert f'error: --against={tmp_path}/run.json: not of the same tasks: 1 are only here (' in line


def test_it_goes_on_where_it_was_stopped(programs, finished, tmp_path):
    flags = ['--config=configs/tiny.py', f'--workdir={finished}', *config_flags(SETTINGS)]
    output = tmp_path / 'eval.json'
    process = programs.start('evaluate', *flags, f'--output={output}')
    lines = output.with_suffix('.jsonl')

    def drawn() -> list[str]:
        return lines.read_text().splitlines()[1:] if lines.exists() else []

    wait_for(lambda: drawn() or process.poll() is not None, poll=0.001)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and 'the same command goes on from here' in stderr
    assert 0 < len(drawn()) < HELDOUT and not output.exists()
    some = {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'eval.rollouts').rglob('0*')}
    assert some
    document, _ = evaluate(programs, output, *flags[1:])
    for file in (tmp_path / 'eval.rollouts').rglob('0*'):  # none is drawn twice
        assert some.pop(file.name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    whole, _ = evaluate(programs, tmp_path / 'whole.json', *flags[1:])
    assert document == whole and len(drawn()) == HELDOUT
    line = programs.fails('evaluate', *flags, f'--output={output}', '--samples=2')
    assert f'{lines} holds results of another evaluation (samples is 1 there, 2 here)' in line
    # Results of two versions would be one number, and nobody would know.
    line = programs.fails('evaluate', *flags, f'--output={output}', '--step=4')
    assert f'results of another evaluation (version is {STEPS} there, 4 here)' in line


def test_pass_at_k_by_hand():
    # 5 samples, 2 solved. Of the C(5,2) = 10 pairs, C(3,2) = 3 hold no solved one.
    solved = [True, False, True, False, False]
    assert pass_at_k(solved, 1) == pytest.approx(2 / 5)
    assert pass_at_k(solved, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(solved, 3) == pytest.approx(1 - 1 / 10)  # one triple of the ten
    assert pass_at_k(solved, 4) == 1  # any four hold one
    assert pass_at_k([False] * 4, 4) == 0


def rollout(roles: list[Role], reward=0.0, sample=0, task=0) -> Rollout:
    n = len(roles)
    return Rollout(
        tokens=np.arange(1, n + 1, dtype=np.int32),
        roles=np.array(roles, np.uint8),
        rollout_logprobs=np.zeros(n, np.float32),
        policy_versions=np.full(n, -1, np.int32),
        turn_starts=np.zeros(0, np.int32),
        reward=reward,
        status=Status.OK,
        task_id=f'task{task}',
        group_id=task,
        sample_id=sample,
    )


@pytest.mark.parametrize('rows_a_batch', [1, 2])
def test_env_ce_by_hand(rows_a_batch):
    config = get_config()
    config.batch.groups, config.group_size, config.batch.micro_rows = 1, rows_a_batch, 1
    config.batch.seq_len = 8
    rollouts = [
        rollout([Role.PROMPT, Role.ACTION, Role.WARNING, Role.WRAPPER, Role.OUTPUT, Role.OUTPUT]),
        rollout([Role.PROMPT, Role.ACTION, Role.OUTPUT], sample=1),
    ]

    def score(batch):  # token n has log-probability -n / 10
        return -batch.tokens / 10

    # First: WARNING is token 3, WRAPPER 4, OUTPUT 5 and 6; second: OUTPUT is token 3.
    by_role = {'warning': 0.3, 'wrapper': 0.4, 'output': (0.5 + 0.6 + 0.3) / 3}
    targets = {'released': (0.4 + 0.5 + 0.6 + 0.3) / 4, 'output': by_role['output'], 'warning': 0.3}
    for name, mean in targets.items():
        config.loss.targets = name
        found = env_ce(score, rollouts, config)
        assert found == pytest.approx({'all': mean, **by_role})
    assert eval_metrics({'all': 1.0, 'output': 2.0}) == {
        'eval/env_ce': 1.0,
        'eval/env_ce/output': 2.0,
    }


def test_the_summary_of_heldout_rollouts():
    rollouts = [rollout([Role.PROMPT], reward, task=task) for task, reward in enumerate((0, 0, 1))]
    rollouts[0].metrics['imagined'] = 0.25  # and an INFRA_ERROR has no such number
    rollouts[2].metrics['imagined'] = 0.5
    rate, low, high = mean_of_shares([0, 0, 1])
    found = summary('after', rollouts, {'all': 0.7})
    assert found == pytest.approx(
        {
            'solve_rate_after': 1 / 3,
            'solve_rate_low_after': low,
            'solve_rate_high_after': high,
            'env_ce_after': 0.7,
            'imagined_after': 0.25,
        }
    )
    assert rate == 1 / 3
    assert summary('before', rollouts, {'all': 0.7, 'output': 0.9})['env_ce_output_before'] == 0.9


def test_a_solve_rate_counts_half_a_reward_as_solved_and_no_infra_error():
    rollouts = [rollout([Role.PROMPT], r, task=i) for i, r in enumerate((0.0, 0.49, 0.5, 1.0, 0.0))]
    rollouts[-1].status = Status.INFRA_ERROR
    assert summary('after', rollouts, {'all': 0.0})['solve_rate_after'] == 0.5


def test_metrics_of_an_evaluation():
    rollouts = [
        rollout([Role.PROMPT, Role.ACTION], reward, sample, task=task)
        for task, rewards in enumerate([(1, 0), (0, 0), (1, 1)])
        for sample, reward in enumerate(rewards)
    ]
    for number, one in enumerate(rollouts):
        one.policy_versions[1] = 20 + (number > 3)  # a worker took new weights in between
    found = evaluation_metrics(rollouts)
    _, low, high = mean_of_shares([0.5, 0, 1])
    assert found == pytest.approx(
        {
            'eval/solve_rate': 0.5,
            'eval/solve_rate/low': low,
            'eval/solve_rate/high': high,
            'eval/pass@2': 2 / 3,
            'eval/version': 20,
            'eval/version_newest': 21,
        }
    )
