"""One rollout as a document: its tokens as text, and every number that is known of each."""

import itertools
from collections.abc import Sequence

import ml_collections
import numpy as np

from echo_jax.learner.batching import judge
from echo_jax.learner.targets import Targets
from echo_jax.types import OBSERVATION_ROLES, Role, Rollout, TokenScores
from echo_jax.viewer.index import stop_reason
from echo_jax.viewer.text import number, token_texts, visible


def rollout_document(
    store: str,
    group: Sequence[Rollout],
    rollout: Rollout,
    scores: TokenScores | None,
    step: int | None,
    config: ml_collections.ConfigDict,
    table: Sequence[bytes],
) -> dict:
    """What the page shows of `rollout`, one of `group`, which `step` trained on, if one did.

    `table` has the bytes of each token id.

    Per token: `text`, `id`, and the measures that there are, None where a token has none. `roles`
    and `versions` are runs of equal values, [[value, count], ...].
    """
    acting = rollout.roles == Role.ACTION
    observed = np.isin(rollout.roles, OBSERVATION_ROLES)
    measures = {'sampler': _numbers(rollout.rollout_logprobs, acting)}
    notes = []
    if scores is None:
        notes.append(
            'The learner keeps its scores of the last training steps, and none of this rollout: '
            "there are no entropy and no environment CE, and log-probabilities are the sampler's."
        )
    elif len(scores.logprobs) != len(rollout.tokens):
        notes.append(
            f'The scores that are kept are of {len(scores.logprobs)} tokens, so they are of '
            'another rollout and are not shown.'
        )
    else:
        predicted = np.arange(len(rollout.tokens)) > 0
        measures['learner'] = _numbers(scores.logprobs, predicted)
        measures['entropy'] = _numbers(scores.entropy, predicted)
        measures['ce'] = _numbers(-scores.logprobs_t1.astype(np.float64), observed & predicted)
    advantage, note = _advantage(store, group, rollout, config)
    if note:
        notes.append(note)
    versions = rollout.policy_versions[acting]
    return {
        'store': store,
        'task': visible(rollout.task_id),
        'group': rollout.group_id,
        'sample': rollout.sample_id,
        'step': step,
        'reward': number(rollout.reward),
        'advantage': advantage,
        'status': rollout.status.value,
        'reason': visible(rollout.reason),
        'stop': stop_reason(rollout),
        'environment_only': rollout.environment_only,
        'versions': [int(versions.min()), int(versions.max())] if len(versions) else None,
        'metrics': {visible(name): number(value) for name, value in rollout.metrics.items()},
        'tests_output': visible(rollout.tests_output),
        'turn_starts': rollout.turn_starts.tolist(),
        'roles': _runs([Role(role).name.lower() for role in rollout.roles.tolist()]),
        'text': token_texts(rollout.tokens.tolist(), table),
        'id': rollout.tokens.tolist(),
        'version_runs': _runs(rollout.policy_versions.tolist()),
        'measures': measures,
        'notes': notes,
        'group_rewards': [[r.sample_id, number(r.reward), r.status.value] for r in group],
    }


def _advantage(
    store: str, group: Sequence[Rollout], rollout: Rollout, config: ml_collections.ConfigDict
) -> tuple[float | None, str]:
    """The rollout's advantage by the recipe of its run, or None and why there is none."""
    if store != 'train':
        return None, 'Only training rollouts have an advantage.'
    if config.loss.kl_coef and config.loss.kl_in == 'reward':
        return None, "No advantage: loss.kl_in='reward' changes rewards by what is not kept."
    # Advantages are compared within a group, whatever the batch and its targets are.
    none = Targets(np.zeros(0, bool), np.zeros(0, bool))
    try:
        judged = judge(group, config, [none] * len(group))
    except AttributeError as error:  # a config that an older echo_jax has written
        return None, f'No advantage: {visible(str(error))}.'
    for each in judged:
        if each.rollout is rollout:
            return number(each.advantage), ''
    return None, "No advantage: an INFRA_ERROR is nobody's reward."


def _numbers(values: np.ndarray, there: np.ndarray) -> list[float | None]:
    """Rounded to a thousandth, None unless `there`, bool [T], and for what is not finite."""
    rounded = np.round(values.astype(np.float64), 3) + 0.0  # no -0.0
    shown = there & np.isfinite(rounded)
    return [value if ok else None for value, ok in zip(rounded.tolist(), shown.tolist())]


def _runs(values: Sequence) -> list[list]:
    """[[value, how many in a row], ...]"""
    return [[value, len([*same])] for value, same in itertools.groupby(values)]
