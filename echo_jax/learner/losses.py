"""ECHO's objective as functions of arrays and numbers (docs/design.md#objective): no model, no I/O.

R rows, T tokens. `policy_term`, `env_term` and `kl_term` each return (loss, metrics); `echo_loss`
reads the recipe and adds them up. All normalisation is in the batch's weights, so a loss is a plain
sum: the losses, gradients and metrics of a batch's micro-batches add up to those of the batch.
What the policy term chooses from is in policy_losses.py, mismatch.py and kl.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from echo_jax.learner.kl import KL_ESTIMATORS, k3
from echo_jax.learner.mismatch import CORRECTIONS, MASKING
from echo_jax.learner.options import check_options
from echo_jax.learner.policy_losses import SURROGATES, Bounds, Surrogate, Tokens
from echo_jax.learner.ratios import Array, bounded
from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, Batch


class Metric(NamedTuple):
    """What one micro-batch adds to a metric; the micro-batches of a batch add up field by field.

    `count` has no default, so that to forget it is an error, and no sum is logged for a mean.
    """

    sum: jax.Array | float  # scalar
    count: jax.Array | float | None  # scalar that divides the sum; None: the sum itself is logged


Metrics = dict[str, Metric]


def echo_loss(
    logprobs: jax.Array,
    batch: Batch,
    config: ml_collections.ConfigDict,
    env_coef: float | jax.Array,
    *,
    old_logprobs: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
    logprobs_t1: jax.Array | None = None,
    entropy: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """ECHO's loss, a scalar, and its metrics, which `finish_metrics` turns into numbers.

    All arrays are float [R, T] in nats and aligned to the token that they describe: `logprobs` of
    the policy at the sampling temperature; `old_logprobs` of the policy before the batch's first
    update, for `loss.old_logprobs` 'recomputed'; `reference_logprobs` of the frozen model, for
    `loss.kl_coef`; `logprobs_t1` at temperature 1, if sampling is at another, and `entropy` of the
    prediction, both for metrics only. `config` is the recipe; its `loss` is all that is read. What
    the arrays hold for a token without weight does not matter: not even NaN reaches the loss, the
    metrics or the gradient.

    `env_coef` is a number, or a traced scalar for a schedule. A plain 0 leaves the environment term
    out of the computation, which is GRPO then; a traced 0 adds 0 times the term, which gives the
    same number.

    Raises ValueError for arrays that are missing or misshapen, and for unknown options.
    """
    options = config.loss
    check_options(options)
    if logprobs.shape != batch.tokens.shape:
        raise ValueError(
            f'logprobs are {logprobs.shape}, but the batch is {batch.tokens.shape} tokens'
        )
    kl_in_loss = options.kl_coef != 0 and options.kl_in == 'loss'
    if kl_in_loss and reference_logprobs is None:
        raise ValueError(f'loss.kl_coef is {options.kl_coef}: it needs reference_logprobs')
    choices = {'current': logprobs, 'recomputed': old_logprobs, 'rollout': batch.rollout_logprobs}
    before = choices[options.old_logprobs]
    if before is None:
        raise ValueError("loss.old_logprobs 'recomputed' needs the old_logprobs array")
    policy_loss, metrics = policy_term(
        logprobs,
        before,
        batch,
        surrogate=SURROGATES[options.policy],
        bounds=Bounds(**{name: options[name] for name in Bounds._fields}),
        mismatch=options.mismatch,
        mismatch_cap=options.mismatch_cap,
    )
    env_loss, env_metrics = env_term(logprobs, batch, logprobs_t1, targets=options.targets)
    metrics |= env_metrics
    loss = policy_loss
    if not (isinstance(env_coef, int | float) and env_coef == 0):
        loss = loss + env_coef * env_loss
    if reference_logprobs is not None:
        kl_loss, kl_metrics = kl_term(logprobs, reference_logprobs, batch, options.kl)
        metrics |= kl_metrics
        if kl_in_loss:
            loss = loss + options.kl_coef * kl_loss
    if entropy is not None:
        metrics['entropy'] = _mean(entropy, batch.policy_weight > 0)
    metrics['loss'] = total(loss)
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def policy_term(
    logprobs: jax.Array,
    old_logprobs: Array,
    batch: Batch,
    *,
    surrogate: Surrogate,
    bounds: Bounds,
    mismatch: str,
    mismatch_cap: float,
) -> tuple[jax.Array, Metrics]:
    """The policy gradient's loss on ACTION tokens. `old_logprobs` [R, T] is taken as a constant.

    `surrogate` is what the loss raises, one of SURROGATES, and `bounds` its numbers. Each token's
    share is times the correction for the sampler's mismatch, the one of CORRECTIONS that
    `mismatch` names.
    """
    acting = batch.policy_weight > 0
    # Masked before exp, not after: the gradient of a masked exp(inf) is 0 * inf = NaN, and so one
    # token that nobody trains on would make every parameter NaN.
    current = jnp.where(acting, logprobs, 0.0)
    old = jax.lax.stop_gradient(jnp.where(acting, old_logprobs, 0.0))
    sampled = jnp.where(acting, batch.rollout_logprobs, 0.0)
    log_ratio = bounded(current - old)
    ratio = jnp.exp(log_ratio)
    gain, shares = surrogate(
        Tokens(current, old, log_ratio, ratio, batch.advantages, acting, batch.segment_ids), bounds
    )
    correction = CORRECTIONS[mismatch](old - sampled, acting, batch.segment_ids, mismatch_cap)
    loss = -jnp.sum(batch.policy_weight * correction * gain)
    metrics = {
        'policy_loss': total(loss),
        'action_tokens': total(_count(acting)),
        **{name: _mean(mask, acting) for name, mask in shares.items()},
        'ratio_deviation': _mean(jnp.abs(ratio - 1.0), acting),
        'approx_kl': _mean(k3(log_ratio, jnp), acting),
        'logprob_gap': _mean(jnp.abs(current - sampled), acting),
        'mismatch_weight': _mean(correction, acting),
    }
    if mismatch in MASKING:
        metrics['mismatch_masked'] = _mean(correction == 0.0, acting)
    return loss, metrics


def env_term(
    logprobs: jax.Array,
    batch: Batch,
    logprobs_t1: jax.Array | None = None,
    *,
    targets: str = 'released',
) -> tuple[jax.Array, Metrics]:
    """The environment's loss, weighted cross-entropy on target tokens.

    The metrics are cross-entropies at temperature 1: of `logprobs_t1`, or of `logprobs` if these
    are at temperature 1. They are over the targets, and over each role of an observation and of
    `loss.targets`, whether its tokens are trained on or not.
    """
    target = batch.env_weight > 0
    loss = -jnp.sum(batch.env_weight * jnp.where(target, logprobs, 0.0))
    nats = -logprobs if logprobs_t1 is None else -logprobs_t1
    metrics = {
        'env_loss': total(loss),
        'env_ce': _mean(nats, target),
        'target_tokens': total(_count(target)),
    }
    for role in dict.fromkeys(OBSERVATION_ROLES + ENV_TARGETS[targets]):
        name = role.name.lower()
        # Nothing predicts a segment's first token. Padding has position 0 too.
        mask = (batch.roles == role) & (batch.positions > 0)
        metrics[f'env_ce/{name}'] = _mean(nats, mask)
        metrics[f'{name}_tokens'] = total(_count(mask))
    return loss, metrics


def cross_entropy(
    logprobs: jax.Array, batch: Batch, entropy: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The loss of supervised steps on `make_supervised_batch`, and its metrics.

    It is the environment's term on whatever tokens have `env_weight`. No option of the recipe's
    `loss` acts on it. `entropy` [R, T] is that of the predictions, for a metric.
    """
    loss, _ = env_term(logprobs, batch)
    metrics = {'loss': total(loss), 'entropy': _mean(entropy, batch.env_weight > 0)}
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def kl_term(
    logprobs: jax.Array, reference_logprobs: jax.Array, batch: Batch, kl: str
) -> tuple[jax.Array, Metrics]:
    """The KL divergence to a frozen model, weighted as the policy's loss is.

    `kl` names the estimate of KL_ESTIMATORS; the gradient is that of the estimate itself.
    """
    acting = batch.policy_weight > 0
    current = jnp.where(acting, logprobs, 0.0)
    log_ratio = bounded(jnp.where(acting, reference_logprobs, 0.0) - current)
    divergence = KL_ESTIMATORS[kl](log_ratio, jnp)
    loss = jnp.sum(batch.policy_weight * divergence)
    return loss, {'kl_loss': total(loss), 'reference_kl': _mean(divergence, acting)}


def total(value: jax.Array) -> Metric:
    """A metric that is logged as the sum that it is: a loss, or a number of tokens."""
    return Metric(value, None)


def _mean(values: Array, mask: Array) -> Metric:
    return Metric(jnp.sum(jnp.where(mask, values, 0.0)), _count(mask))


def finish_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers of a batch from the metrics of its micro-batches, added up.

    `loss`, `policy_loss`, `env_loss` (before env_coef) and `kl_loss` (before kl_coef) are sums, and
    `..._tokens` are counts; `grad_norm...` are norms of sums, and `grad_cosine` is a quotient. The
    rest are means over tokens, nats a token if they speak of log-probabilities. A mean over no
    token at all is left out, and a quotient by 0.
    """
    values = {}
    for name, (value, count) in jax.device_get(dict(metrics)).items():
        if count is None:
            values[name] = float(value)
        elif count:
            # Divided here, once: means of micro-batches of unequal counts cannot be averaged.
            values[name] = float(value) / float(count)
    return values


def _count(mask: Array) -> jax.Array:
    """How many are True, as a float, like the sum that it divides; exact up to 2**24."""
    return jnp.sum(mask, dtype=jnp.float32)
