"""What a person sees: rows that a resume takes back, hostile text, curves."""

import io
import json

import matplotlib.image
import numpy as np
import pytest
import rich.console

from echo_jax.agent.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer
from echo_jax.run import report
from echo_jax.types import Role, Rollout, Status

# What a terminal would obey: colours, a title, a new clipboard, a lost line, writing right to left.
WHEN = ('before', 'after')
HOSTILE = '\x1b[31mred\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07\rgone\x9b2Jbell\x07\u202eleft\x00\x7f'


@pytest.fixture
def terminal(monkeypatch):
    """What a colour terminal gets from the report."""
    screen = io.StringIO()
    console = rich.console.Console(
        file=screen, force_terminal=True, color_system='truecolor', highlight=False, width=400
    )
    monkeypatch.setattr(report, 'CONSOLE', console)
    return screen


@pytest.fixture(scope='module')
def tokenizer():
    alphabet = 256 + len(SPECIAL_TOKENS) + len(ADDED_TOKENS)
    return build_tokenizer([''], alphabet, '')


def test_a_resume_takes_back_later_rows_and_a_torn_one(tmp_path):
    metrics = report.Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step, {'train/loss': step / 4})
    metrics.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "train/lo')  # killed as it wrote
    metrics = report.Metrics(tmp_path)
    assert [row['step'] for row in metrics.rows()] == [1, 2, 3, 4, 5]
    metrics.resume(3)
    metrics.write(4, {'train/loss': 9.0})
    metrics.close()
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['train/loss'] for line in lines] == [0.25, 0.5, 0.75, 9.0]
    assert [path.name for path in tmp_path.glob('*partial*')] == []


def test_a_first_run_has_no_rows(tmp_path):
    metrics = report.Metrics(tmp_path)
    metrics.resume(0)
    assert metrics.rows() == []
    metrics.close()


def roll(tokenizer, task_id: str) -> Rollout:
    pieces = [
        (Role.PROMPT, 'look[/bold]'),
        (Role.ACTION, 'cat f'),
        (Role.OUTPUT, HOSTILE + 'é\n[red]markup[/red]'),
    ]
    ids = [tokenizer.encode(text, add_special_tokens=False) for _, text in pieces]
    ids[1] += [tokenizer.encode('é', add_special_tokens=False)[0]]  # half a character
    roles = np.concatenate([[role] * len(i) for (role, _), i in zip(pieces, ids)])
    tokens = np.concatenate(ids).astype(np.int32)
    n = len(tokens)
    return Rollout(
        tokens=tokens,
        roles=roles.astype(np.uint8),
        rollout_logprobs=np.zeros(n, np.float32),
        policy_versions=np.full(n, -1, np.int32),
        turn_starts=np.array([len(ids[0])], np.int32),
        reward=1.0,
        status=Status.OK,
        task_id=task_id,
        group_id=0,
        sample_id=0,
    )


def test_no_control_code_of_a_rollout_reaches_the_terminal(terminal, tokenizer):
    report.show_rollout(tokenizer, roll(tokenizer, f'task[red]{HOSTILE}'))
    shown = terminal.getvalue()
    # The only escape sequences are colours of ours, which end at once in an `m`.
    pieces = shown.split('\x1b')[1:]
    assert pieces and all(
        piece[0] == '[' and piece[1:].split('m')[0].replace(';', '').isdigit() for piece in pieces
    )
    assert '\x1b[31mred' not in shown
    for code in ('\x07', '\r', '\x9b', '\u202e', '\x00', '\x7f', '\x08'):
        assert code not in shown
    for text in ('gone', 'left', 'é', '[red]markup[/red]', 'look[/bold]', 'task[red]'):
        assert text in shown  # the words themselves stay, and no markup is read in them


def test_curves_show_the_numbers(tmp_path):
    def image(rows):
        report.curves(tmp_path / 'curves.png', rows)
        return matplotlib.image.imread(tmp_path / 'curves.png')[..., :3]

    empty = image([])
    flat = image([{'step': s, 'rollout/reward': 0.5, 'train/env_ce': 2.0} for s in range(9)])
    rising = image([{'step': s, 'rollout/reward': s / 8, 'train/env_ce': 2.0} for s in range(9)])
    left, right = np.split(np.abs(flat - rising).max(-1) > 0.1, 2, axis=1)
    assert left.sum() > 200  # the reward differs
    assert not right.any()  # the CE does not
    assert (np.abs(flat - empty).max(-1) > 0.1)[:, 600:].sum() > 200
    # Once a command has printed something, the CE is that of the output.
    output = [{'step': s, 'train/env_ce/output': s, 'eval/env_ce/output': s / 2} for s in range(9)]
    shown = image(output)
    other = image([row | {'train/env_ce': 9.0, 'eval/env_ce': 9.0} for row in output])
    assert (np.abs(shown - empty).max(-1) > 0.1)[:, 600:].sum() > 200
    np.testing.assert_array_equal(shown, other)


def test_the_table_leaves_out_what_a_run_does_not_know(terminal):
    summary = {'steps': 3, 'solve_rate_before': 0.25, 'solve_rate_after': 0.5}
    summary |= {f'{name}_{when}': 0.125 for name in ('env_ce', 'imagined') for when in WHEN}
    report.show_summary(summary)
    without = terminal.getvalue()
    assert '50.0%' in without and '12.5%' in without and 'output alone' not in without
    report.show_summary(summary | {f'env_ce_output_{when}': 0.75 for when in WHEN})
    assert 'output alone' in terminal.getvalue() and '0.750' in terminal.getvalue()


def test_progress_leaves_lines_where_no_terminal_is(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(report, 'CONSOLE', rich.console.Console(file=screen, width=100))
    with report.Progress('train', 2) as progress:
        progress.show(1, reward=0.25)
        progress.show(2, reward=0.5)
    assert screen.getvalue().splitlines()[-1].startswith('train 2/2  reward 0.5')
