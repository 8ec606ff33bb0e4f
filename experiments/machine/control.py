r"""echo_jax.train with one part exchanged: the controls that no recipe can ask for.

    python -m experiments.machine.control --control=shuffled --config=configs/machine.py \
        --workdir=runs/shuffled

'shuffled': the environment term sees the rollouts of a step with the options of all their usage
lines permuted among each other; the policy term sees the rollouts as they are. So the environment
term keeps its form and weight and loses the facts.
'env_only': all rewards are 0 for the learner, so that every advantage is 0. What is left is the
environment term and, with `loss.kl_coef`, its anchor.

What is exchanged is the function that makes a step's batches; the rest is the program itself. A
workdir belongs to its control, which its config does not say: resume it with the same command.
"""

import dataclasses
import functools
import pathlib
import runpy
from collections.abc import Callable, Sequence

import numpy as np
import transformers
from absl import flags

from echo_jax.learner import updates
from echo_jax.run.workdir import read_tokenizer
from echo_jax.types import Batch, Role, Rollout

_ANY, _NONE = -1, -2  # any token of the terminal's output; one of another role
MiniBatches = Callable[..., list[Batch]]  # the signature of updates.mini_batches


def env_only(original: MiniBatches) -> MiniBatches:
    """`mini_batches` of rollouts that all have reward 0."""

    def mini_batches(rollouts: Sequence[Rollout], *rest) -> list[Batch]:
        return original([dataclasses.replace(r, reward=0.0) for r in rollouts], *rest)

    return mini_batches


def shuffled(original: MiniBatches, options: Callable[[Rollout], np.ndarray]) -> MiniBatches:
    """`mini_batches` with twice the rows: the rollouts with the policy term's weights, then the
    same rollouts, their options permuted, with the environment term's.

    `options(rollout)` are the indices of the tokens that are options in usage lines, int [n]. Every
    weight is what it is without the control, so the loss differs in what is predicted alone.
    """

    def mini_batches(rollouts: Sequence[Rollout], config, step: int, targets=None) -> list[Batch]:
        told = permuted(rollouts, options, np.random.default_rng([config.seed, step]))
        pairs = zip(
            original(rollouts, config, step, targets), original(told, config, step, targets)
        )
        return [
            _stacked(
                true._replace(env_weight=np.zeros_like(true.env_weight)),
                false._replace(policy_weight=np.zeros_like(false.policy_weight)),
            )
            for true, false in pairs
        ]

    return mini_batches


def permuted(
    rollouts: Sequence[Rollout], options: Callable[[Rollout], np.ndarray], rng: np.random.Generator
) -> list[Rollout]:
    """The rollouts with the tokens at `options` permuted over all of them."""
    places = [options(rollout) for rollout in rollouts]
    tokens = rng.permutation(np.concatenate([r.tokens[at] for r, at in zip(rollouts, places)]))
    ends = np.cumsum([len(at) for at in places])
    changed = []
    for rollout, at, new in zip(rollouts, places, np.split(tokens, ends[:-1])):
        copy = rollout.tokens.copy()
        copy[at] = new
        changed.append(dataclasses.replace(rollout, tokens=copy))
    return changed


def usage_options(rollout: Rollout, tokenizer: transformers.PreTrainedTokenizerFast) -> np.ndarray:
    """The indices of the letters in the usage lines of the terminal's output, int [n].

    A line is `usage: finu -i FILE`, in which the name has two tokens. What follows the letter does
    not matter: the end of a rollout's tokens may have cut it off.
    """
    usage, dash = (tokenizer.encode(text, add_special_tokens=False) for text in ('usage: ', ' -'))
    if (len(usage), len(dash)) != (2, 1):
        raise ValueError('the tokenizer cuts usage lines into smaller parts; see model.vocab_size')
    form = np.array([*usage, _ANY, _ANY, *dash, _ANY])
    tokens = np.where(rollout.roles == Role.OUTPUT, rollout.tokens, _NONE)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(form))
    matches = (windows == form) | ((form == _ANY) & (windows != _NONE))
    return np.flatnonzero(matches.all(axis=1)) + len(form) - 1


def _stacked(first: Batch, second: Batch) -> Batch:
    """The rows of both, those without a token last, where the step does not walk."""
    both = Batch(*(np.concatenate(arrays) for arrays in zip(first, second)))
    order = np.argsort(~(both.segment_ids > 0).any(axis=1), kind='stable')
    return Batch(*(array[order] for array in both))


def _options_in_workdir() -> Callable[[Rollout], np.ndarray]:
    """`usage_options` with the tokenizer of --workdir, which is made before the first batch."""

    @functools.cache
    def tokenizer() -> transformers.PreTrainedTokenizerFast:
        return read_tokenizer(pathlib.Path(flags.FLAGS.workdir) / 'tokenizer')

    return lambda rollout: usage_options(rollout, tokenizer())


def main() -> None:
    flags.DEFINE_enum(
        'control', None, ['shuffled', 'env_only'], 'What is exchanged.', required=True
    )
    original, options = updates.mini_batches, _options_in_workdir()

    def mini_batches(*arguments) -> list[Batch]:
        if flags.FLAGS.control == 'shuffled':
            return shuffled(original, options)(*arguments)
        return env_only(original)(*arguments)

    updates.mini_batches = mini_batches
    runpy.run_module('echo_jax.train', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
