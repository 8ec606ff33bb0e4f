"""Log-probabilities of given tokens from hidden states, without whole logits in memory.

M tokens, D model, V vocabulary. The tokens are walked in blocks, in the forward and in the backward
pass, so the memory is that of one block of logits [block, V], however many tokens there are.
"""

import functools

import jax
import jax.numpy as jnp

from echo_jax.model.precision import sum_dtype

BLOCK = 1024  # tokens whose logits exist at one time


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(hidden, unembedding, targets, temperature=1.0):
    """Log-probability of each target, and the entropy of the distribution it was drawn from.

    Args:
      hidden: [..., D], any float dtype; the state that predicts the target.
      unembedding: [V, D].
      targets: int32 [...], the tokens that come next.
      temperature: the logits are divided by it; the sampler's, so that both sides mean the same.

    Returns:
      (logprobs, entropy), float32 [...], nats. Gradients flow through the log-probabilities; the
      entropy is a measurement and passes none.
    """
    return _forward(hidden, unembedding, targets, temperature)[0]


def _logits(hidden_mD, unembedding_VD, temperature):
    unembedding_DV = unembedding_VD.T.astype(hidden_mD.dtype)
    wide = sum_dtype(hidden_mD)
    return jnp.dot(hidden_mD, unembedding_DV, preferred_element_type=wide) / temperature


def _in_blocks(f, *arrays):
    """Maps f over blocks of the leading axis; the last block is padded with zeros and cut off."""
    size = arrays[0].shape[0]
    block = min(BLOCK, size)
    count = -(-size // block)
    padded = [
        jnp.pad(a, [(0, count * block - size), *[(0, 0)] * (a.ndim - 1)]).reshape(
            count, block, *a.shape[1:]
        )
        for a in arrays
    ]
    out = jax.lax.map(lambda xs: f(*xs), tuple(padded))
    return jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:])[:size], out)


def _forward(hidden, unembedding_VD, targets, temperature):
    def block(hidden_mD, targets_m):
        logits_mV = _logits(hidden_mD, unembedding_VD, temperature)
        lse_m = jax.nn.logsumexp(logits_mV, axis=-1)
        target_m = jnp.take_along_axis(logits_mV, targets_m[:, None], axis=-1)[:, 0]
        probs_mV = jnp.exp(logits_mV - lse_m[:, None])
        return target_m - lse_m, lse_m - (probs_mV * logits_mV).sum(-1), lse_m

    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropy, lse = _in_blocks(block, flat, targets.reshape(-1))
    out = (logprobs.reshape(targets.shape), entropy.reshape(targets.shape))
    return out, (hidden, unembedding_VD, targets, lse)


def _backward(temperature, residuals, cotangents):
    hidden, unembedding_VD, targets, lse = residuals
    D = hidden.shape[-1]
    wide = sum_dtype(hidden)

    def block(d_unembedding_VD, xs):
        hidden_mD, targets_m, lse_m, d_m = xs
        logits_mV = _logits(hidden_mD, unembedding_VD, temperature)
        onehot_mV = targets_m[:, None] == jnp.arange(logits_mV.shape[-1])
        d_logits_mV = (onehot_mV - jnp.exp(logits_mV - lse_m[:, None])) * (d_m / temperature)[
            :, None
        ]
        d_logits_mV = d_logits_mV.astype(hidden_mD.dtype)
        d_unembedding_VD += jnp.dot(d_logits_mV.T, hidden_mD, preferred_element_type=wide)
        return d_unembedding_VD, d_logits_mV @ unembedding_VD.astype(hidden_mD.dtype)

    flat = (hidden.reshape(-1, D), targets.reshape(-1), lse, cotangents[0].reshape(-1))
    size = flat[1].shape[0]
    step = min(BLOCK, size)
    count = -(-size // step)
    padded = [jnp.pad(a, [(0, count * step - size), *[(0, 0)] * (a.ndim - 1)]) for a in flat]
    xs = tuple(a.reshape(count, step, *a.shape[1:]) for a in padded)
    d_unembedding, d_hidden = jax.lax.scan(block, jnp.zeros(unembedding_VD.shape, wide), xs)
    d_hidden = d_hidden.reshape(-1, D)[:size].reshape(hidden.shape)
    return d_hidden, d_unembedding.astype(unembedding_VD.dtype), None


token_logprobs.defvjp(_forward, _backward)
