"""The released objective in the released code's own layout, written again for the tests.

A row is a sequence: its response alone, a 0/1 mask for each purpose, and a count of observation
tokens. Every mean is taken where that code takes it; there are no roles and no weights. By SkyRL
pull request 1716 (head efd864b, echo_terminal: world_modeling/loss.py, fsdp_worker.py, trainer.py
and terminal_agent_generator.py) and SkyRL's ppo_utils.py, in NumPy and float64.
"""

from typing import NamedTuple

import numpy as np

from echo_jax.types import Rollout, Status
from tests.support.random_rollouts import make_rollout

OPEN = 1  # the token that opens every message; all others occur once


class Turn(NamedTuple):
    """Numbers of tokens: what the agent wrote, the turn's end that was added, and the answer."""

    actions: int
    ending: int = 0
    warning: int = 0
    output: int = 0  # between two WRAPPER tokens
    feedback: int = 0  # of a call that did not parse or was refused


class Episode(NamedTuple):
    turns: tuple[Turn, ...] = ()
    answered: bool = True  # whether the last turn has an answer: not with `done`, nor at a budget
    reward: float = 0.0
    status: Status = Status.OK
    environment_only: bool = False
    discarded: bool = False  # out of the agent's time: only the prompt is left


class Response(NamedTuple):
    """An episode as a row of the released code's batch; all lists have its length."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    world_mask: np.ndarray
    observed: int  # tokens of the observations' bodies, without the chat template
    reward: float
    uid: int  # its group


def as_rollout(episode: Episode, group: int, sample: int, first_token: int) -> Rollout:
    letters, opens = 'PP', [0]
    for turn, has_answer in () if episode.discarded else _turns(episode):
        letters += 'A' * turn.actions
        if has_answer:
            # The message is < t WARNING.. text > and the generation prompt < t.
            letters += 'S' * turn.ending
            opens.append(len(letters))
            letters += 'SS' + 'W' * turn.warning + 'F' * turn.feedback
            letters += 'R' + 'O' * turn.output + 'R' if turn.output else ''
            letters += 'S'
            opens.append(len(letters))
            letters += 'SS'
    rollout = make_rollout(
        letters, episode.reward, group, sample, episode.status, first_token=first_token
    )
    rollout.tokens[opens] = OPEN
    rollout.environment_only = episode.environment_only
    return rollout


def as_response(
    episode: Episode, uid: int, first_token: int, target: str, limit: int | None
) -> Response:
    """`target` is a world_loss_target, `limit` max_world_model_tokens."""
    tokens, loss_mask, world_mask, observed = [], [], [], 0
    token = first_token + 2  # the prompt has two tokens

    def append(count, opens=False, trained=0):
        nonlocal token
        ids = list(range(token, token + count))
        tokens.extend([OPEN, *ids[1:]] if opens else ids)
        loss_mask.extend([trained] * count)
        world_mask.extend([0] * count)
        token += count

    for turn, has_answer in () if episode.discarded else _turns(episode):
        append(turn.actions, trained=int(not episode.environment_only))
        if not has_answer:
            continue
        append(turn.ending)
        message_start = len(tokens)
        append(2, opens=True)
        warning_start, warning_end = len(tokens), len(tokens) + turn.warning
        append(turn.warning + turn.feedback + (turn.output + 2 if turn.output else 0))
        env_end = len(tokens)
        append(1)
        spans = {
            'env_only': (warning_end, env_end),
            'warning_only': (warning_start, warning_end),
            'warning_plus_env': (warning_start, env_end),
            'full_observation': (message_start, len(tokens)),
        }
        for index in list(range(*spans[target]))[:limit]:
            world_mask[index] = 1
        observed += env_end - warning_start
        append(2, opens=True)
    if not tokens:  # an episode of which nothing is left is one token that no mask has
        append(1)
    failed = episode.discarded or episode.status == Status.INFRA_ERROR
    reward = 0.0 if failed else episode.reward
    arrays = (np.array(each) for each in (tokens, loss_mask, world_mask))
    return Response(*arrays, observed, reward, uid)


def objective(
    responses: list[Response],
    current: np.ndarray,
    old: np.ndarray,
    frozen: np.ndarray,
    *,
    loss_reduction: str,
    world_loss_normalization: str,
    world_model_coeff: float,
    max_seq_len: int,
    eps_clip: float,
    kl_loss_coef: float,
    extra: float = 1e-3,
) -> tuple[float, np.ndarray]:
    """The loss, and its gradient by token, of log-probabilities that are tables by token.

    `extra` is what the released code adds to the denominators of the environment term.
    """
    n, total, gradient = len(responses), 0.0, np.zeros(len(current))
    all_actions = sum(r.loss_mask.sum() for r in responses)
    all_targets = sum(r.world_mask.sum() for r in responses)
    for r, advantage in zip(responses, advantages([(r.uid, r.reward) for r in responses])):
        now, actions, targets = current[r.tokens], r.loss_mask.sum(), r.world_mask.sum()
        match loss_reduction:
            case 'sequence_mean':
                policy_denominator = n * max(actions, 1)
                full = world_loss_normalization == 'full_observation_tokens'
                world_denominator = n * ((r.observed if full else targets) + extra)
            case 'token_mean':
                policy_denominator = max(all_actions, 1)
                world_denominator = all_targets + extra
            case 'seq_mean_token_sum_norm':
                policy_denominator = world_denominator = n * max_seq_len
        scaled = advantage / policy_denominator
        ratio = np.exp(now - old[r.tokens])
        plain, held = ratio * scaled, np.clip(ratio, 1 - eps_clip, 1 + eps_clip) * scaled
        total -= (np.minimum(plain, held) * r.loss_mask).sum()
        slope = np.where(plain <= held, plain, 0.0) * r.loss_mask
        # k3 of the frozen model, a mean over the tokens and then over the sequences.
        x = frozen[r.tokens] - now
        share = kl_loss_coef * r.loss_mask / (n * max(actions, 1))
        total += ((np.exp(x) - x - 1) * share).sum()
        slope -= (1 - np.exp(x)) * share
        if targets:
            total -= world_model_coeff * (now * r.world_mask).sum() / world_denominator
            slope = slope + world_model_coeff * r.world_mask / world_denominator
        np.add.at(gradient, r.tokens, -slope)
    return total, gradient


def advantages(rewards: list[tuple[int, float]]) -> list[float]:
    """Of (uid, reward): minus the group's mean, over its unbiased standard deviation + 1e-6.

    A lone response has a mean of 0 and a deviation of 1.
    """
    found = []
    for uid, reward in rewards:
        group = [other for of, other in rewards if of == uid]
        mean, std = (np.mean(group), np.std(group, ddof=1)) if len(group) > 1 else (0.0, 1.0)
        found.append((reward - mean) / (std + 1e-6))
    return found


def _turns(episode: Episode) -> list[tuple[Turn, bool]]:
    """(turn, whether it has an answer)."""
    last = len(episode.turns) - 1
    return [(t, episode.answered or i < last) for i, t in enumerate(episode.turns)]
