"""ECHO's objective as functions of arrays and numbers (docs/design.md#objective): no model, no I/O.

R rows, T tokens. `policy_term`, `env_term` and `kl_term` each return (loss, metrics); `echo_loss`
reads the recipe and adds them up. All normalisation is in the batch's weights, so a loss is a plain
sum: the losses, gradients and metrics of a batch's micro-batches add up to those of the batch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from echo_jax.types import ENV_TARGETS, Batch

# Every log-ratio is held within this before exp. exp(89) is inf in float32, and inf - inf in a
# later sum would be NaN; exp(20) = 5e8 is finite, and far beyond any bound that clips a ratio.
MAX_LOG_RATIO = 20.0


class Metric(NamedTuple):
    """What one micro-batch adds to a metric; the micro-batches of a batch add up field by field.

    `count` has no default, so that to forget it is an error, and no sum is logged for a mean.
    """

    sum: jax.Array  # float scalar
    count: jax.Array | None  # float scalar that divides the sum; None: the sum itself is logged


Metrics = dict[str, Metric]
Array = jax.Array | np.ndarray  # a Batch's arrays are NumPy on the host, and traced in the step
# A function of (ratio [R, T], advantages [R, T], clip_low, clip_high). It returns the [R, T] values
# that the policy is to raise, and a bool [R, T]: at which of them a bound acts, for clip_fraction.
Surrogate = Callable[[jax.Array, Array, float, float], tuple[jax.Array, jax.Array]]


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
    if logprobs.shape != batch.tokens.shape:
        raise ValueError(
            f'logprobs are {logprobs.shape}, but the batch is {batch.tokens.shape} tokens'
        )
    if options.kl_coef and reference_logprobs is None:
        raise ValueError(f'loss.kl_coef is {options.kl_coef}: it needs reference_logprobs')
    if options.old_logprobs == 'rollout' and options.mismatch != 'none':
        raise ValueError(
            "loss.mismatch corrects nothing with loss.old_logprobs 'rollout', whose ratio is "
            "to the sampler already; set loss.mismatch='none'"
        )
    choices = {'current': logprobs, 'recomputed': old_logprobs, 'rollout': batch.rollout_logprobs}
    if options.old_logprobs not in choices:
        raise ValueError(
            f'loss.old_logprobs is {options.old_logprobs!r}; expected one of {tuple(choices)}'
        )
    before = choices[options.old_logprobs]
    if before is None:
        raise ValueError("loss.old_logprobs 'recomputed' needs the old_logprobs array")
    policy_loss, metrics = policy_term(
        logprobs,
        before,
        batch,
        surrogate=SURROGATES['clip'],  # the only one; with a second, a key of `loss` chooses
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        mismatch=options.mismatch,
        mismatch_cap=options.mismatch_cap,
    )
    env_loss, env_metrics = env_term(logprobs, batch, logprobs_t1, targets=options.targets)
    metrics |= env_metrics
    loss = policy_loss
    if not (isinstance(env_coef, int | float) and env_coef == 0):
        loss = loss + env_coef * env_loss
    if reference_logprobs is not None:
        kl_loss, kl_metrics = kl_term(logprobs, reference_logprobs, batch)
        metrics |= kl_metrics
        if options.kl_coef:
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
    clip_low: float,
    clip_high: float,
    mismatch: str,
    mismatch_cap: float,
) -> tuple[jax.Array, Metrics]:
    """The policy gradient's loss on ACTION tokens. `old_logprobs` [R, T] is taken as a constant."""
    acting = batch.policy_weight > 0
    # Masked before exp, not after: the gradient of a masked exp(inf) is 0 * inf = NaN, and so one
    # token that nobody trains on would make every parameter NaN.
    current = jnp.where(acting, logprobs, 0.0)
    old = jax.lax.stop_gradient(jnp.where(acting, old_logprobs, 0.0))
    sampled = jnp.where(acting, batch.rollout_logprobs, 0.0)
    log_ratio = _bounded(current - old)
    ratio = jnp.exp(log_ratio)
    gain, is_clipped = surrogate(ratio, batch.advantages, clip_low, clip_high)
    correction = mismatch_weight(old - sampled, batch.segment_ids, mismatch, mismatch_cap)
    loss = -jnp.sum(batch.policy_weight * correction * gain)
    return loss, {
        'policy_loss': total(loss),
        'action_tokens': total(_count(acting)),
        'clip_fraction': _mean(is_clipped, acting),
        'ratio_deviation': _mean(jnp.abs(ratio - 1.0), acting),
        'approx_kl': _mean(k3(log_ratio), acting),
        'logprob_gap': _mean(jnp.abs(current - sampled), acting),
        'mismatch_weight': _mean(correction, acting),
    }


def clip_surrogate(
    ratio: jax.Array, advantages: Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO's (arXiv 1707.06347, eq. 7)."""
    gain = ratio * advantages
    clipped_gain = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    is_clipped = clipped_gain < gain
    # `where`, not `minimum`: at a tie, and in a first update every ratio is 1, `minimum` splits the
    # gradient between its arguments; if clip_low or clip_high is 0, half of it would be lost.
    return jnp.where(is_clipped, clipped_gain, gain), is_clipped


SURROGATES: Mapping[str, Surrogate] = {'clip': clip_surrogate}


def mismatch_weight(
    log_mismatch: jax.Array, segment_ids: Array, kind: str, cap: float
) -> jax.Array:
    """The correction w [R, T] of the sampler's mismatch d [R, T], `log_mismatch`.

    d is the old policy's log-probability minus the sampler's, both constants. By `kind`, w is:
    'token', min(exp(d), cap), truncated importance sampling; 'sequence', the same with d summed
    over the rollout; 'mask', 1 if 1/cap <= exp(d) <= cap, else 0; 'none', 1.
    """
    if kind != 'none' and cap < 1.0:
        raise ValueError(f'loss.mismatch_cap is {cap}; it must be at least 1')
    match kind:
        case 'none':
            return jnp.ones_like(log_mismatch)
        case 'token':
            return jnp.minimum(jnp.exp(_bounded(log_mismatch)), cap)
        case 'sequence':
            # The sum is bounded, not each token: many small differences make a large one.
            summed = jax.vmap(_segment_sum)(log_mismatch, segment_ids)
            return jnp.minimum(jnp.exp(_bounded(summed)), cap)
        case 'mask':
            return (jnp.abs(log_mismatch) <= jnp.log(cap)).astype(log_mismatch.dtype)
        case _:
            raise ValueError(
                f"loss.mismatch is {kind!r}; expected 'none', 'token', 'sequence' or 'mask'"
            )


def _segment_sum(values: jax.Array, segment_ids: Array) -> jax.Array:
    """For each token, the sum of `values` [T] over its segment of the row, [T]."""
    # jit needs a static number: a row of T tokens has at most T segments, and 0 is the padding.
    sums = jax.ops.segment_sum(values, segment_ids, num_segments=segment_ids.size + 1)
    return sums[segment_ids]


def env_term(
    logprobs: jax.Array,
    batch: Batch,
    logprobs_t1: jax.Array | None = None,
    *,
    targets: str = 'released',
) -> tuple[jax.Array, Metrics]:
    """The environment's loss, weighted cross-entropy on target tokens.

    The metrics are cross-entropies at temperature 1: of `logprobs_t1`, or of `logprobs` if these
    are at temperature 1. They are over the targets, and over each role of `loss.targets` and of the
    terminal's and the harness's words, whether its tokens are trained on or not.
    """
    target = batch.env_weight > 0
    loss = -jnp.sum(batch.env_weight * jnp.where(target, logprobs, 0.0))
    nats = -logprobs if logprobs_t1 is None else -logprobs_t1
    metrics = {
        'env_loss': total(loss),
        'env_ce': _mean(nats, target),
        'target_tokens': total(_count(target)),
    }
    for role in dict.fromkeys(ENV_TARGETS['released'] + ENV_TARGETS[targets]):
        name = role.name.lower()
        # Nothing predicts a segment's first token. Padding has position 0 too.
        mask = (batch.roles == role) & (batch.positions > 0)
        metrics[f'env_ce/{name}'] = _mean(nats, mask)
        metrics[f'{name}_tokens'] = total(_count(mask))
    return loss, metrics


def kl_term(
    logprobs: jax.Array, reference_logprobs: jax.Array, batch: Batch
) -> tuple[jax.Array, Metrics]:
    """The KL divergence to a frozen model, by `k3`, weighted as the policy's loss is.

    The gradient is that of the estimate itself, as in GRPO (arXiv 2402.03300, eq. 4).
    """
    acting = batch.policy_weight > 0
    current = jnp.where(acting, logprobs, 0.0)
    kl = k3(_bounded(jnp.where(acting, reference_logprobs, 0.0) - current))
    loss = jnp.sum(batch.policy_weight * kl)
    return loss, {'kl_loss': total(loss), 'reference_kl': _mean(kl, acting)}


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(x) - 1 - x, Schulman's nonnegative estimate of KL(p, q); x = log q/p of a sample of p."""
    # expm1, because in float32 exp(x) - 1 loses most digits of an x of 1e-4, which is usual here.
    return jnp.expm1(log_ratio) - log_ratio


def total(value: jax.Array) -> Metric:
    """A metric that is logged as the sum that it is: a loss, or a number of tokens."""
    return Metric(value, None)


def _mean(values: Array, mask: Array) -> Metric:
    return Metric(jnp.sum(jnp.where(mask, values, 0.0)), _count(mask))


def finish_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers of a batch from the metrics of its micro-batches, added up.

    `loss`, `policy_loss`, `env_loss` (before env_coef) and `kl_loss` (before kl_coef) are sums, and
    `..._tokens` are counts. The rest are means over tokens, nats a token if they speak of
    log-probabilities; a mean over no token at all is left out.
    """
    values = {}
    for name, (value, count) in jax.device_get(dict(metrics)).items():
        if count is None:
            values[name] = float(value)
        elif count:
            # Divided here, once: means of micro-batches of unequal counts cannot be averaged.
            values[name] = float(value) / float(count)
    return values


def _bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _count(mask: Array) -> jax.Array:
    """How many are True, as a float, like the sum that it divides; exact up to 2**24."""
    return jnp.sum(mask, dtype=jnp.float32)
