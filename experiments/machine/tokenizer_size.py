"""Finds the size of the tokenizer of configs/machine.py, `model.vocab_size`.

    python -m experiments.machine.tokenizer_size

It is the first multiple of 16 with which a usage line is cut into whole words, its letter alone,
and the longest episode fits the recipe's token limits. Each size is a row of what is printed: the
most tokens that tasks of --seeds take. Larger sizes than the last cannot be had: the tokenizer's
texts hold too few pairs to fill them.
"""

import pathlib
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import transformers
from absl import app, flags

from configs import machine
from echo_jax.agent.dialects import find_dialect
from echo_jax.agent.observations import describe
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.agent.tokenizer import build_tokenizer, chat_template, training_texts
from echo_jax.run.workdir import TOKENIZER_TASKS
from echo_jax.sandbox import CommandResult
from echo_jax.tasks.generate import demonstration, generate_tasks, usage
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Task

SIZES = range(336, 464, 16)
# `usage`, `: `, a name of two syllables, ` -`, the letter, ` `, `FILE` and the end of the line.
USAGE_TOKENS = 9


class Measured(NamedTuple):
    """The most tokens that tasks take with a tokenizer."""

    usage: int  # a usage line
    prompt: int
    turn: int  # what the agent writes in one turn
    answer: int  # the observation after a wrong call
    episode: int  # a prompt and `protocol.max_turns` wrong calls

    def fits(self, protocol: ml_collections.ConfigDict) -> bool:
        return (
            self.usage == USAGE_TOKENS
            and self.prompt <= protocol.max_prompt_tokens
            and self.turn <= protocol.max_turn_tokens
            and self.episode <= protocol.max_total_tokens
        )


def measure(
    tasks: Sequence[Task],
    tokenizer: transformers.PreTrainedTokenizerFast,
    config: ml_collections.ConfigDict,
) -> Measured:
    """The most tokens that `tasks` take; config: `protocol` of a recipe."""
    protocol = Protocol(tokenizer, config)
    encoder = protocol.encoder
    replies = {
        format_reply(*turn, protocol.dialect) for task in tasks for turn in demonstration(task)
    }
    misuses = {misuse for task in tasks if (misuse := usage(task))}
    answers = [
        describe(command, CommandResult('', line, 2, False), config.max_output_chars, 'start')
        for command, line in misuses
    ]
    prompt = max(protocol.count_prompt_tokens(task.instruction) for task in tasks)
    turn = max(len(encoder.encode(reply)) for reply in replies) + len(protocol.turn_end_ids)
    answer = max(len(encoder.encode_framed(encoder.observation_frame, a).ids) for a in answers)
    return Measured(
        usage=max(len(encoder.encode(line)) for _, line in misuses),
        prompt=prompt,
        turn=turn,
        answer=answer,
        episode=prompt + config.max_turns * (turn + answer),
    )


def sizes(tasks: Sequence[Task], config: ml_collections.ConfigDict) -> dict[int, Measured]:
    """What is measured with each of SIZES that the texts of `tasks` fill; config: a recipe."""
    dialect = find_dialect(config.protocol.dialect)
    texts = [*training_texts(tasks[:TOKENIZER_TASKS], config.protocol.system_prompt, dialect)]
    found = {}
    for size in SIZES:
        try:
            tokenizer = build_tokenizer(texts, size, chat_template())
        except ValueError:  # the texts do not fill it
            break
        found[size] = measure(tasks, tokenizer, config.protocol)
    return found


def smallest(seeds: Sequence[dict[int, Measured]], protocol: ml_collections.ConfigDict) -> int:
    """The first size that fits on every seed. Raises ValueError if there is none."""
    for size in SIZES:
        if all(size in found and found[size].fits(protocol) for found in seeds):
            return size
    raise ValueError('no size fits: the texts are too few, or the limits too tight')


def main(_) -> None:
    config = machine.get_config()
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, _SEEDS.value):
            made = generate_tasks(
                pathlib.Path(folder, str(seed)),
                split='train',
                count=config.tasks.train_count,
                seed=seed,
                families=list(config.tasks.families),
            )
            seeds.append(sizes(load_tasks(made), config))
    print('| tokens | usage line | prompt | turn | answer to a wrong call | episode |')
    print('|---|---|---|---|---|---|')
    for size in sorted(set.intersection(*map(set, seeds))):
        print(f'| {size} |', ' | '.join(str(max(v)) for v in zip(*(s[size] for s in seeds))), '|')
    print(f'smallest that fits: {smallest(seeds, config.protocol)}')


if __name__ == '__main__':
    _SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2', '3', '4'], 'Seeds of tasks.')
    app.run(main)
