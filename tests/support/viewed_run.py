"""Runs to look at, as a learner and its workers leave them, with conversations written by hand."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np
import transformers

from echo_jax.learner.unpredictable import token_bytes
from echo_jax.run.workdir import Workdir
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.scores import ScoreStore
from echo_jax.types import Role, Rollout, Status, TokenScores
from tests.support.random_rollouts import make_rollout, small_config
from tests.support.tokenizers import TINY, build

# (role as in random_rollouts.LETTERS, text) of the parts of a conversation.
OPENING = (
    ('P', '<|im_start|>system\nSolve the task in bash.<|im_end|>\n<|im_start|>user\nFind it.'),
    ('P', '<|im_end|>\n<|im_start|>assistant\n'),
)
TURN = (
    ('A', '<think>\nlook\n</think>\n\n<tool_call>\n<function=bash>\n<parameter=command>\nls'),
    ('A', '\n</parameter>\n</function>\n</tool_call><|im_end|>'),
    ('S', '\n<|im_start|>user\n<tool_response>\n'),
    ('R', "Command 'ls' executed successfully. Output: "),
)
ANSWER = (
    ('R', '\n\n(exit_code=0)\n'),
    ('S', '</tool_response><|im_end|>\n<|im_start|>assistant\n'),
)
ENDING = (('A', '<think>\ndone\n</think>\n\n<tool_call>\n<function=done>\n</function><|im_end|>'),)
METRICS = {'turns': 2.0, 'stop/done': 1.0, 'stop/max_turns': 0.0, 'correct': 1.0}


def conversation(*outputs: str | bytes, **options) -> Rollout:
    """An episode in which one `ls` after another gives `outputs`; `options` of `make_rollout`.

    Bytes become one token each, so that they need not be UTF-8.
    """
    parts = list(OPENING)
    for output in outputs:
        parts += [*TURN, ('O', output), *ANSWER]
    return of_parts([*parts, *ENDING], **options)


def of_parts(parts: Sequence[tuple[str, str | bytes]], **options) -> Rollout:
    tokenizer = build(TINY)
    encoded = [(letter, _encode(tokenizer, text)) for letter, text in parts]
    rollout = make_rollout(''.join(letter * len(ids) for letter, ids in encoded), **options)
    rollout.tokens = np.array([i for _, ids in encoded for i in ids], np.int32)
    rollout.metrics = dict(METRICS)
    return rollout


def _encode(tokenizer: transformers.PreTrainedTokenizerFast, text: str | bytes) -> list[int]:
    if isinstance(text, str):
        return tokenizer.encode(text, add_special_tokens=False)
    table = token_bytes(tokenizer)  # all bytes are tokens of the vocabulary
    ids = {byte: table.index(bytes([byte])) for byte in {*text}}
    return [ids[byte] for byte in text]


def scores_of(rollout: Rollout, ce: float = 0.5) -> TokenScores:
    """Scores that tell tokens apart: token i has the environment CE `ce` + i / 100 nats."""
    steps = np.arange(len(rollout.tokens)) / 100
    return TokenScores(
        logprobs=np.asarray(-0.25 - steps, np.float16),
        logprobs_t1=np.asarray(-ce - steps, np.float16),
        entropy=np.asarray(0.125 + steps, np.float16),
    )


def make_run(folder: pathlib.Path, backend: str = 'jax', **loss) -> Workdir:
    """A run without a step: two groups of three rollouts a step, a tokenizer, a config."""
    config = small_config(groups=2, group_size=3, seq_len=4096, **loss)
    config.num_steps, config.model.vocab_size = 10, len(build(TINY))
    config.policy.backend = backend
    work = Workdir(folder, ml_collections.FrozenConfigDict(config))
    build(TINY).save_pretrained(folder / 'tokenizer')
    return work


def write_group(work: Workdir, group_id: int, store: str = 'train', scored: bool = False) -> list:
    """Three rollouts of `task-N`, N = group_id modulo 4: rewards 1, 0, and an INFRA_ERROR's."""
    task = f'task-{group_id % 4}'
    group = [
        conversation(f'notes-{group_id}.txt\n', reward=1.0, sample=0),
        conversation('', 'ls: nothing\n', reward=0.0, sample=1, status=Status.TRUNCATED),
        conversation(sample=2, status=Status.INFRA_ERROR),
    ]
    group[1].metrics |= {'stop/done': 0.0, 'stop/max_turns': 1.0}
    group[2] = dataclasses.replace(group[2], reason='the sandbox did not start')
    for rollout in group:
        rollout.task_id, rollout.group_id = task, group_id
        rollout.tests_output = f'1 passed in group {group_id}\n'
        rollout.policy_versions = np.where(rollout.roles == Role.ACTION, 7, -1).astype(np.int32)
    RolloutStore(work.url('rollouts', store)).write_group(group)
    if scored:
        write_scores(work, group)
    return group


def write_scores(work: Workdir, group: Sequence[Rollout], ce: float = 0.5) -> None:
    scores = {rollout.sample_id: scores_of(rollout, ce) for rollout in group}
    ScoreStore(work.url('scores', 'train')).write_group(group[0].group_id, scores)


def write_rows(work: Workdir, first: int, last: int, **more: float) -> None:
    """Appends rows of metrics.jsonl for these steps; the reward of step s is s / 10."""
    with (work.path / 'metrics.jsonl').open('a') as file:
        for step in range(first, last + 1):
            row = {
                'step': step,
                'rollout/reward': step / 10,
                'train/env_ce/output': 2.0 / step,
                'train/entropy': 0.5,
                'rollout/staleness': 0.5,
                'rollout/max_staleness': 1.0,
                'rollout/status/ok': 4.0,
                'rollout/status/infra_error': 2.0,
                'time/sampling': 3.0,
                'time/learning': 1.0,
                **more,
            }
            if step % 2 == 0:
                row |= {'eval/solve_rate': 0.5, 'eval/solve_rate/low': 0.4}
                row |= {'eval/solve_rate/high': 0.6}
            file.write(json.dumps(row) + '\n')
