"""ECHO's objective as a function of arrays and numbers (DESIGN 3.4); no model, no I/O.

R rows, T tokens. All normalisation is in the batch's weights, so a loss is a plain sum: over the
micro-batches of a batch, losses, gradients and metrics add up to those of the whole.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from echo_jax.types import ENV_TARGETS, Batch

# A log-ratio is held within this: exp(20) = 5e8 is clipped or hopeless anyway, exp(89) is inf.
MAX_LOG_RATIO = 20.0

_CE_ROLES = {role.name.lower(): role for role in ENV_TARGETS['released']}
# Each mean and the count that divides it, once, when the sums of the whole batch are there.
_DENOMINATORS = {
    'clip_fraction': 'action_tokens',
    'ratio_deviation': 'action_tokens',
    'approx_kl': 'action_tokens',
    'logprob_gap': 'action_tokens',
    'mismatch_weight': 'action_tokens',
    'reference_kl': 'action_tokens',
    'entropy': 'action_tokens',
    'env_ce': 'target_tokens',
} | {f'env_ce/{name}': f'{name}_tokens' for name in _CE_ROLES}


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
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """ECHO's loss, a scalar, and its metrics as sums (see `finish_metrics`).

    All arrays are float [R, T] in nats and aligned to the token they describe: `logprobs` of the
    policy at the sampling temperature; `old_logprobs` of the policy before the batch's first
    update, for `loss.old_logprobs` 'recomputed'; `reference_logprobs` of the frozen model, for
    `loss.kl_coef`; `logprobs_t1` at temperature 1, where sampling is at another, and `entropy` of
    the prediction, both for metrics only. `config` is the recipe; its `loss` is all that is read.
    What an array holds where a token has no weight is masked before anything is computed: not even
    NaN reaches the loss, the metrics or the gradient.

    `env_coef` is a number, or a traced scalar for a schedule. A plain 0 leaves the environment term
    out of the program, which then is GRPO; a traced 0 adds 0 times the term, the same number.

    Raises ValueError for arrays that are missing or misshapen, and for unknown options.
    """
    settings = config.loss
    _check(settings, batch, logprobs, old_logprobs, reference_logprobs)
    acting = batch.policy_weight > 0
    target = batch.env_weight > 0
    current = jnp.where(acting, logprobs, 0.0)
    sampled = jnp.where(acting, batch.rollout_logprobs, 0.0)
    match settings.old_logprobs:
        case 'current':
            old = jax.lax.stop_gradient(current)
        case 'recomputed':
            old = jax.lax.stop_gradient(jnp.where(acting, old_logprobs, 0.0))
        case 'rollout':
            old = sampled
    correction = _mismatch_weight(
        old - sampled, batch.segment_ids, settings.mismatch, settings.mismatch_cap
    )
    log_ratio = _bounded(current - old)
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain, clipped_gain = ratio * batch.advantages, clipped_ratio * batch.advantages
    is_clipped = clipped_gain < gain
    # As `where`, not `minimum`: at a tie, ratio 1 of every first update, `minimum` would split the
    # gradient between its arguments, and lose half of it where clip_low or clip_high is 0.
    surrogate = jnp.where(is_clipped, clipped_gain, gain)
    policy_loss = -jnp.sum(batch.policy_weight * correction * surrogate)
    env_loss = -jnp.sum(batch.env_weight * jnp.where(target, logprobs, 0.0))

    loss = policy_loss
    if not (isinstance(env_coef, int | float) and env_coef == 0):
        loss = loss + env_coef * env_loss
    metrics = {'policy_loss': policy_loss, 'env_loss': env_loss}
    if reference_logprobs is not None:
        kl = _k3(_bounded(jnp.where(acting, reference_logprobs, 0.0) - current))
        metrics['kl_loss'] = jnp.sum(batch.policy_weight * kl)
        metrics['reference_kl'] = jnp.sum(kl)  # 0 where not acting
        if settings.kl_coef:
            loss = loss + settings.kl_coef * metrics['kl_loss']
    metrics |= {
        'loss': loss,
        'action_tokens': _count(acting),
        'clip_fraction': _count(acting & is_clipped),
        'ratio_deviation': jnp.sum(jnp.abs(ratio - 1.0)),
        'approx_kl': jnp.sum(_k3(log_ratio)),
        'logprob_gap': jnp.sum(jnp.abs(current - sampled)),
        'mismatch_weight': jnp.sum(jnp.where(acting, correction, 0.0)),
    }
    if entropy is not None:
        metrics['entropy'] = jnp.sum(jnp.where(acting, entropy, 0.0))
    metrics |= _env_ce(logprobs if logprobs_t1 is None else logprobs_t1, batch)
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def finish_metrics(sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics of a batch from the sums of its micro-batches, added key by key.

    `loss`, `policy_loss`, `env_loss` (before env_coef) and `kl_loss` (before kl_coef) are sums
    already; `..._tokens` are counts; the rest become means over the tokens they speak of, nats a
    token where they are log-probabilities, and are left out where there is no such token.
    """
    values = {name: float(value) for name, value in jax.device_get(dict(sums)).items()}
    for name, count in _DENOMINATORS.items():
        if name in values:
            total = values.pop(name)
            if values[count]:
                values[name] = total / values[count]
    return values


def _mismatch_weight(
    log_mismatch: jax.Array, segment_ids: jax.Array, kind: str, cap: float
) -> jax.Array:
    """w_t [R, T], from the old policy's log-probability minus the sampler's, both constants.

    'token': min(exp(d_t), cap), truncated importance sampling; 'sequence': the same with d summed
    over the rollout; 'mask': 1 where 1/cap <= exp(d_t) <= cap, else 0; 'none': 1.
    """
    match kind:
        case 'none':
            return jnp.ones_like(log_mismatch)
        case 'token':
            return jnp.minimum(jnp.exp(_bounded(log_mismatch)), cap)
        case 'sequence':
            total = jax.vmap(_segment_total)(log_mismatch, segment_ids)
            return jnp.minimum(jnp.exp(_bounded(total)), cap)
        case 'mask':
            return (jnp.abs(log_mismatch) <= jnp.log(cap)).astype(log_mismatch.dtype)


def _segment_total(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[T]: the sum of `values` [T] over the token's own segment."""
    totals = jax.ops.segment_sum(values, segment_ids, num_segments=segment_ids.size + 1)
    return totals[segment_ids]


def _k3(log_ratio: jax.Array) -> jax.Array:
    """exp(x) - x - 1, Schulman's nonnegative estimator of the KL divergence; x = log q/p under p.

    As a loss, the KL term differentiates this very value, as GRPO does (arXiv 2402.03300, eq. 4).
    """
    return jnp.expm1(log_ratio) - log_ratio


def _env_ce(logprobs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Cross-entropy sums and token counts of the targets, and of each role, trained on or not."""
    masks = {'env_ce': ('target_tokens', batch.env_weight > 0)}
    for name, role in _CE_ROLES.items():
        # Position 0, where padding is too, is predicted by nothing.
        masks[f'env_ce/{name}'] = f'{name}_tokens', (batch.roles == role) & (batch.positions > 0)
    sums = {}
    for name, (count, mask) in masks.items():
        sums[name] = -jnp.sum(jnp.where(mask, logprobs, 0.0))
        sums[count] = _count(mask)
    return sums


def _bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _count(mask: jax.Array) -> jax.Array:
    """A float, that it may be added to and divided; float32 is exact to 2**24 tokens."""
    return jnp.sum(mask, dtype=jnp.float32)


def _check(settings, batch, logprobs, old_logprobs, reference_logprobs) -> None:
    if settings.old_logprobs not in ('current', 'recomputed', 'rollout'):
        raise ValueError(
            f"loss.old_logprobs is {settings.old_logprobs!r}; expected 'current', 'recomputed' "
            "or 'rollout'"
        )
    if settings.mismatch not in ('none', 'token', 'sequence', 'mask'):
        raise ValueError(
            f"loss.mismatch is {settings.mismatch!r}; expected 'none', 'token', 'sequence', 'mask'"
        )
    if settings.old_logprobs == 'rollout' and settings.mismatch != 'none':
        raise ValueError(
            "loss.mismatch corrects nothing with loss.old_logprobs 'rollout', whose ratio is "
            "to the sampler already; set loss.mismatch='none'"
        )
    if settings.mismatch != 'none' and settings.mismatch_cap < 1.0:
        raise ValueError(f'loss.mismatch_cap is {settings.mismatch_cap}; it must be at least 1')
    if settings.old_logprobs == 'recomputed' and old_logprobs is None:
        raise ValueError("loss.old_logprobs 'recomputed' needs the old_logprobs array")
    if settings.kl_coef and reference_logprobs is None:
        raise ValueError(f'loss.kl_coef is {settings.kl_coef}: it needs reference_logprobs')
    if logprobs.shape != batch.tokens.shape:
        raise ValueError(
            f'logprobs are {logprobs.shape}, but the batch is {batch.tokens.shape} tokens'
        )
