"""Makes a Batch of rollouts on the host: rows of tokens, with every normalisation as a weight.

docs/design.md#batch says what the arrays mean. Reinforcement learning and supervised training use
the same packer. It needs only NumPy: no JAX, no model and no store.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from echo_jax.learner import eligibility
from echo_jax.learner.advantages import group_advantages
from echo_jax.learner.targets import Targets, choose_targets, sequence_denominators, target_counts
from echo_jax.types import OBSERVATION_ROLES, SOLVED_REWARD, Batch, Role, Rollout, Status

REDUCTIONS = ('sequence_mean', 'token_mean', 'prompt_mean', 'dr_grpo')


class Judged(NamedTuple):
    """A rollout, with what only its whole batch can say of its place in the policy term."""

    rollout: Rollout
    advantage: float
    part: eligibility.Part
    targets: Targets


class _Segment(NamedTuple):
    """A rollout with its weights: one value on all its ACTION tokens, one on all its targets."""

    rollout: Rollout
    advantage: float
    policy_weight: np.ndarray  # float32 [T]
    env_weight: np.ndarray  # float32 [T]


def make_batch(
    rollouts: Sequence[Rollout],
    config: ml_collections.ConfigDict,
    targets: Sequence[Targets] | None = None,
) -> Batch:
    """The global batch of one step: arrays [R, T], T = `batch.seq_len`.

    `targets` are those of each rollout, if the caller has chosen them already; otherwise they are
    `choose_targets(rollouts, config)`.

    R is the same in every step (`batch_rows`). Rows are filled from the front and the rest is
    padding. The result does not depend on the order of `rollouts`.

    Weights by `loss.reduction`, with N the sequences that count, A_i the ACTION tokens and E_i the
    target tokens (docs/design.md#targets) of sequence i:

    - 'sequence_mean': policy 1/(N |A_i|), env 1/(N O_i), where O_i is the number of observation
      tokens (`loss.env_normalization` 'full_observation') or |E_i| ('selected'), or env 1/sum |E|
      ('token_mean');
    - 'token_mean': policy 1/sum |A|, env 1/sum |E|;
    - 'prompt_mean': policy 1/(G sum |A|), env 1/(G sum |E|), with the sums over the rollout's group
      alone and G the number of groups (arXiv 2510.13786): each task has the same share;
    - 'dr_grpo': 1/(N max_tokens) for both, max_tokens = `protocol.max_total_tokens`.

    A sequence without such tokens still counts in N, and its group in G. A rollout that is
    `environment_only` trains the environment term alone: it is treated as if it had no ACTION
    tokens, and its advantage is 0. If it has a call that was not valid (a FEEDBACK token), it does
    not train that term either, because without a reward the model would learn its format
    (docs/deviations.md). An INFRA_ERROR counts nowhere and gets no row. With
    `loss.count_infra_errors` it is a sequence like any other, with reward 0. What eligibility.py
    takes out of the policy term is a sequence without ACTION tokens in it too, or none of its N
    and G, and stays what it was in the environment term.

    Raises ValueError for a rollout longer than T, and for more rows than R.
    """
    return weigh(judge(rollouts, config, targets), config, batch_rows(config))


def judge(
    rollouts: Sequence[Rollout],
    config: ml_collections.ConfigDict,
    targets: Sequence[Targets] | None = None,
) -> list[Judged]:
    """The rollouts of a whole batch that have a part in it, with their advantages and targets."""
    if targets is None:
        if config.loss.drop_surprising.top or config.loss.drop_surprising.bottom:
            raise ValueError(
                'loss.drop_surprising needs the log-probabilities of the tokens; choose the '
                'targets by run.env_term.EnvTerm and pass them'
            )
        targets, _ = choose_targets(rollouts, config)
    pairs = [
        (r, t) for r, t in zip(rollouts, targets, strict=True) if eligibility.counts(r, config.loss)
    ]
    counted = [r for r, _ in pairs]
    parts = eligibility.policy_parts(counted, config.loss)
    advantages = np.zeros(len(counted), np.float32)
    compared = [i for i, part in enumerate(parts) if part.compares]
    advantages[compared] = _advantages([counted[i] for i in compared], config.loss.advantages)
    advantages[[not part.trains for part in parts]] = 0.0
    return [Judged(r, float(a), part, t) for (r, t), a, part in zip(pairs, advantages, parts)]


def weigh(judged: Sequence[Judged], config: ml_collections.ConfigDict, rows: int) -> Batch:
    """The batch [rows, T] of these rollouts, by their own counts: see `make_batch`."""
    counted, chosen = [j.rollout for j in judged], [j.targets for j in judged]
    actions = [_mask(j.rollout, (Role.ACTION,) if j.part.trains else ()) for j in judged]
    dividing = [j.rollout.group_id for j in judged if j.part.counts]
    policy_counts, env_counts = _denominators(
        counted, actions, chosen, config, sequences=len(dividing), groups=len(set(dividing))
    )
    segments = [
        _Segment(j.rollout, j.advantage, _weight(action, a), _weight(j.targets.chosen, e))
        for j, action, a, e in zip(judged, actions, policy_counts, env_counts)
    ]
    return _pack(segments, config, rows)


def batch_rows(config: ml_collections.ConfigDict, parts: int = 1) -> int:
    """R of every batch, or of each of its equal parts: a row for each rollout, rounded up to whole
    micro-batches.
    """
    # It does not depend on how well a step's rollouts pack: for another shape, the step would be
    # compiled again.
    micro, rollouts = config.batch.micro_rows, config.batch.groups * config.group_size
    return -(-rollouts // (parts * micro)) * micro


def make_supervised_batch(
    rollouts: Sequence[Rollout],
    config: ml_collections.ConfigDict,
    roles: Sequence[Role] = (Role.ACTION,),
    masks: Sequence[np.ndarray] | None = None,
) -> Batch:
    """A batch whose step with env_coef 1 is plain cross-entropy, the mean over tokens of `roles`.

    `masks`, bool [T] of each rollout, name the tokens instead of roles if they are given.
    policy_weight is 0; env_weight is 1/count on those tokens, over the whole batch. Shapes are as
    in `make_batch`. Rewards and status play no part: give only the rollouts that are to be learned.
    """
    if masks is None:
        masks = [_mask(r, roles) for r in rollouts]
    count = sum(m.sum() for m in masks)
    return _pack(
        [_Segment(r, 0.0, _weight(m, 0), _weight(m, count)) for r, m in zip(rollouts, masks)],
        config,
        batch_rows(config),
    )


def _advantages(rollouts: Sequence[Rollout], estimator: str) -> np.ndarray:
    """float32 [rollouts]. One group at a time, since groups may differ in size."""
    groups = collections.defaultdict(list)
    for i, rollout in enumerate(rollouts):
        groups[rollout.group_id].append(i)
    rewards = np.array([eligibility.reward_of(r) for r in rollouts])
    advantages = np.zeros(len(rollouts), np.float32)
    for members in groups.values():
        valid = np.ones((1, len(members)), bool)
        advantages[members] = group_advantages(rewards[np.newaxis, members], valid, estimator)[0]
    return advantages


def _denominators(
    rollouts: Sequence[Rollout],
    actions: Sequence[np.ndarray],
    targets: Sequence[Targets],
    config: ml_collections.ConfigDict,
    sequences: int,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The denominators of the policy weight and of the env weight, float64 [rollouts] each.

    `sequences` and `groups` are the policy term's N and G; those of the environment term are the
    numbers of rollouts and of their groups.
    """
    # They are float64, and rounded once, when the weight is made: N * max_tokens can pass 2**24,
    # and beyond that float32 does not hold every integer.
    n = len(rollouts)
    action_counts = np.array([m.sum() for m in actions], np.float64)
    targeted = target_counts(targets, config)
    match config.loss.reduction:
        case 'sequence_mean':
            return sequences * action_counts, sequence_denominators(rollouts, targets, config)
        case 'token_mean':
            return np.full(n, action_counts.sum()), np.full(n, targeted.sum())
        case 'prompt_mean':
            ids = [r.group_id for r in rollouts]
            group_ids, group = np.unique(np.array(ids, np.int64), return_inverse=True)
            actions_of_group = np.bincount(group, action_counts, len(group_ids))[group]
            targets_of_group = np.bincount(group, targeted, len(group_ids))[group]
            return groups * actions_of_group, len(group_ids) * targets_of_group
        case 'dr_grpo':
            longest = float(config.protocol.max_total_tokens)
            return np.full(n, sequences * longest), np.full(n, n * longest)
        case other:
            raise ValueError(f'loss.reduction is {other!r}; expected one of {REDUCTIONS}')


def _mask(rollout: Rollout, roles: Sequence[Role]) -> np.ndarray:
    """bool [T]: the tokens of these roles, except the first token, which nothing predicts."""
    mask = np.isin(rollout.roles, roles)
    mask[:1] = False
    return mask


def _weight(mask: np.ndarray, denominator: float) -> np.ndarray:
    """float32 [T]: 1/denominator for the tokens of `mask`, else 0."""
    # If the denominator is 0, there is no such token, and `mask` is False everywhere.
    value = 1.0 / denominator if denominator else 0.0
    return np.where(mask, value, 0.0).astype(np.float32)


def _pack(segments: Sequence[_Segment], config: ml_collections.ConfigDict, capacity: int) -> Batch:
    seq_len = config.batch.seq_len
    places = _assign_places([s.rollout for s in segments], seq_len, config.batch.pack)
    needed = 1 + max((place.row for place in places.values()), default=-1)
    if needed > capacity:
        raise ValueError(
            f'{len(segments)} rollouts need {needed} rows of {seq_len} tokens, more than the '
            f'{capacity} of batch.groups x group_size (to a multiple of batch.micro_rows), over '
            'batch.updates; raise batch.groups'
        )
    batch = padding(capacity, seq_len)
    for i, place in places.items():
        segment, rollout = segments[i], segments[i].rollout
        at = place.row, place.columns
        batch.tokens[at] = rollout.tokens
        batch.positions[at] = np.arange(len(rollout.tokens))
        batch.segment_ids[at] = place.number
        batch.roles[at] = rollout.roles
        batch.rollout_logprobs[at] = rollout.rollout_logprobs
        batch.advantages[at] = np.where(rollout.roles == Role.ACTION, segment.advantage, 0.0)
        batch.policy_weight[at] = segment.policy_weight
        batch.env_weight[at] = segment.env_weight
    return batch


def unpack(
    rollouts: Sequence[Rollout], values: np.ndarray, config: ml_collections.ConfigDict
) -> list[np.ndarray]:
    """What `values` [R, T] holds for each rollout, [its T]; zeros for one that gets no row.

    `values` are of the batch that `make_batch` makes of the same rollouts.
    """
    found = [np.zeros(len(r.tokens), values.dtype) for r in rollouts]
    counted = [i for i, r in enumerate(rollouts) if eligibility.counts(r, config.loss)]
    batched = [rollouts[i] for i in counted]
    for j, place in _assign_places(batched, config.batch.seq_len, config.batch.pack).items():
        found[counted[j]] = values[place.row, place.columns]
    return found


def padding(rows: int, length: int) -> Batch:
    """A batch [rows, length] of zeros, which is all padding."""
    dtypes = {'roles': np.uint8, 'tokens': np.int32, 'positions': np.int32, 'segment_ids': np.int32}
    return Batch(
        **{name: np.zeros((rows, length), dtypes.get(name, np.float32)) for name in Batch._fields}
    )


class _Place(NamedTuple):
    """Where in a batch a rollout lies."""

    row: int
    number: int  # among the rollouts of its row, from 1
    columns: slice


def _assign_places(rollouts: Sequence[Rollout], seq_len: int, pack: bool) -> dict[int, _Place]:
    """Places by the rollouts' indices: by first-fit decreasing with `pack`, otherwise a row each.

    The longest come first, because short rollouts then fill the gaps that long ones leave. Ties are
    broken by group and sample: every host packs the whole batch, and all have to pack it alike, in
    whatever order they read the rollouts. Empty rollouts get no place.
    """

    def order(i):
        return -len(rollouts[i].tokens), rollouts[i].group_id, rollouts[i].sample_id

    places, used, numbers = {}, [], []  # columns and rollouts of each row
    for i in sorted((i for i, r in enumerate(rollouts) if len(r.tokens)), key=order):
        rollout, length = rollouts[i], len(rollouts[i].tokens)
        if length > seq_len:
            raise ValueError(
                f'sample {rollout.sample_id} of group {rollout.group_id} has {length} tokens but a '
                f'row holds {seq_len}; raise batch.seq_len or lower protocol.max_total_tokens'
            )
        row = next((j for j, n in enumerate(used) if pack and n + length <= seq_len), len(used))
        if row == len(used):
            used.append(0)
            numbers.append(0)
        numbers[row] += 1
        places[i] = _Place(row, numbers[row], slice(used[row], used[row] + length))
        used[row] += length
    return places


def make_token_batch(part: np.ndarray, rows: int, length: int, pad_id: int | None = None) -> Batch:
    """A batch [rows, length] to score, without weights; a row of `part`, int [n, T], is a segment.

    What `part` does not fill is padding. With `pad_id`, so are these tokens at the end of a row.
    """
    batch = padding(rows, length)
    batch.positions[:] = np.arange(length)
    for row, tokens in enumerate(part):
        end = len(tokens)
        if pad_id is not None:
            end = np.max(np.flatnonzero(tokens != pad_id) + 1, initial=0)
        batch.tokens[row, :end] = tokens[:end]
        batch.segment_ids[row, :end] = 1
    return batch


def rollout_metrics(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Metrics `rollout/...` of the rollouts of a step. A mean over nothing is left out.

    `version` is the policy version being trained. `reward` and `solved` leave out INFRA_ERRORs and
    what is `environment_only`, as `uninformative_groups` does.
    `uninformative_groups` is the share of groups whose rewards are all equal, so that their
    advantages are 0. `staleness` is `version` minus the oldest version in a rollout. Each of the
    rollouts' own metrics is averaged over the rollouts that have it, and `error/...` summed.
    """
    values = collections.defaultdict(list)
    groups = collections.defaultdict(set)
    for r in rollouts:
        acting = r.roles == Role.ACTION
        values['turns'].append(len(r.turn_starts))
        values['tokens'].append(len(r.tokens))
        values['action_tokens'].append(acting.sum())
        values['environment_only'].append(r.environment_only)
        values['observation_tokens'].append(np.isin(r.roles, OBSERVATION_ROLES).sum())
        if acting.any():
            values['staleness'].append(version - r.policy_versions[acting].min())
        if r.environment_only:  # no tests were run
            continue
        rewards = [] if r.status == Status.INFRA_ERROR else [r.reward]
        values['reward'] += rewards
        values['solved'] += [reward >= SOLVED_REWARD for reward in rewards]
        groups[r.group_id].update(rewards)
    values['uninformative_groups'] = [len(rewards) < 2 for rewards in groups.values()]
    own = {name for r in rollouts for name in r.metrics} - set(values)
    for name in sorted(own):
        values[name] = [r.metrics[name] for r in rollouts if name in r.metrics]
    result = {f'rollout/{name}': float(np.mean(v)) for name, v in values.items() if v}
    for name in ('tokens', 'staleness'):
        if values[name]:
            result[f'rollout/max_{name}'] = float(np.max(values[name]))
    errors = [name for name in own if name.startswith('error/')]  # these are counts
    result |= {f'rollout/{name}': float(np.sum(values[name])) for name in errors}
    statuses = collections.Counter(r.status for r in rollouts)
    return result | {f'rollout/status/{status}': float(statuses[status]) for status in Status}


def age_metrics(rollouts: Sequence[Rollout], version: int, max_staleness: int) -> dict[str, float]:
    """Metrics `rollout/age/N`, N from 0 to `max_staleness`: shares of the ACTION tokens by age.

    A token's age is `version`, which is being trained, minus the version that sampled it. Without
    such tokens there are no metrics.
    """
    versions = np.concatenate([*(r.action_versions for r in rollouts), np.zeros(0, np.int32)])
    if not len(versions):
        return {}
    # A learner that went back may meet tokens of weights that it has yet to train.
    ages = np.maximum(version - versions, 0).astype(int)
    shares = np.bincount(ages, minlength=max_staleness + 1) / len(ages)
    return {f'rollout/age/{age}': float(share) for age, share in enumerate(shares)}
