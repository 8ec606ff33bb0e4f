"""Qwen3, the dense decoder, in Flax NNX: grouped-query attention, QK-norm, RoPE, SwiGLU, RMSNorm.

B rows, T tokens, S cached tokens, D model, F ffw, N query heads, K key-value heads, H head
dimension, V vocabulary, L layers.

The layers are one set of arrays with a leading L and are scanned, so 36 layers compile as one.
Every parameter carries logical axis names; `learner/sharding.py` maps them to a mesh. The model
returns hidden states, never logits: `logprobs.token_logprobs` makes what a loss needs of them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from echo_jax.model import attention, partition
from echo_jax.model.precision import sum_dtype
from echo_jax.model.rope import ROPE_TYPES, attention_factor, inverse_frequencies, rope

_policies = jax.checkpoint_policies
# What a layer keeps for its backward pass, besides its input.
REMAT = {
    'none': _policies.everything_saveable,
    'full': _policies.nothing_saveable,
    'attention': _policies.save_only_these_names('mixed'),  # so attention runs forward once
    # The input waits in the host's memory instead of the device's.
    'offload': _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=['layer_input'],
        offload_src='device',
        offload_dst='pinned_host',
    ),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_type: str = 'default'  # or 'yarn', which reads the six fields after it
    factor: float = 1.0
    original_max_position_embeddings: int = 32_768
    attention_factor: float | None = None  # None: by `factor`
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    max_position_embeddings: int = 32_768  # for config.json; nothing here is as long
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = 'float32'  # of activations and matrix products; parameters are float32
    attention: str = 'auto'  # the kernel, one of attention.KINDS; 'auto': the platform's
    remat: str = 'full'  # what the backward pass finds instead of computing it again, see REMAT

    @classmethod
    def of(cls, model) -> 'Qwen3Config':
        """The config that the `model` of a recipe asks for, by all of its keys but `path`."""
        return cls(**cls.given(model))

    @staticmethod
    def given(model) -> dict:
        """The fields that the `model` of a recipe gives; one that is None is left to others."""
        return {key: value for key, value in model.items() if key != 'path' and value is not None}

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f'num_attention_heads={self.num_attention_heads} is no multiple of '
                f'num_key_value_heads={self.num_key_value_heads}; change config.model'
            )
        for key, choices in (('attention', attention.KINDS), ('remat', tuple(REMAT))):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f'model.{key} is {getattr(self, key)!r}; expected one of {choices}'
                )
        if self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim} is odd; RoPE rotates pairs, make it even')
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f'rope_type is {self.rope_type!r}; expected one of {ROPE_TYPES}')


_STATES = ('rows', 'tokens', None)  # how activations lie
_WEIGHTS = {  # a layer's matrices
    'wq': ('embed', 'heads'),
    'wk': ('embed', 'kv_heads'),
    'wv': ('embed', 'kv_heads'),
    'wo': ('heads', 'embed'),
    'w_gate': ('embed', 'mlp'),
    'w_up': ('embed', 'mlp'),
    'w_down': ('mlp', 'embed'),
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer so that decoding updates in place."""

    keys: tuple[jax.Array, ...]  # L of [B, K, S, H]
    values: tuple[jax.Array, ...]  # L of [B, K, S, H]


def init_cache(config: Qwen3Config, batch: int, length: int) -> Cache:
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    layers = range(config.num_hidden_layers)
    return Cache(*(tuple(jnp.zeros(shape, config.dtype) for _ in layers) for _ in range(2)))


def rms_norm(x, scale, eps):
    """RMSNorm over the last axis in float32, as the reference does, returned in the dtype of x."""
    wide = x.astype(sum_dtype(x))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class Layers(nnx.Module):
    """The parameters of all layers, stacked over a leading L."""

    def __init__(self, c: Qwen3Config, *, rngs: nnx.Rngs):
        L, D, F, H = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.head_dim
        N, K = c.num_attention_heads, c.num_key_value_heads

        def ones(*shape, axes):
            return nnx.Param(jnp.ones((L, *shape)), axes=('layers', *axes))

        def normal(*shape, axes, scale=1.0):
            draw = jax.random.normal(rngs.params(), (L, *shape)) * (c.initializer_range * scale)
            return nnx.Param(draw, axes=('layers', *axes))

        into_residual = 1 / math.sqrt(2 * L)  # GPT-2: the residual stream keeps its variance
        self.attention_norm = ones(D, axes=('embed',))
        self.wq = normal(D, N * H, axes=_WEIGHTS['wq'])
        self.wk = normal(D, K * H, axes=_WEIGHTS['wk'])
        self.wv = normal(D, K * H, axes=_WEIGHTS['wv'])
        self.q_norm = ones(H, axes=('head_dim',))
        self.k_norm = ones(H, axes=('head_dim',))
        self.wo = normal(N * H, D, axes=_WEIGHTS['wo'], scale=into_residual)
        self.mlp_norm = ones(D, axes=('embed',))
        self.w_gate = normal(D, F, axes=_WEIGHTS['w_gate'])
        self.w_up = normal(D, F, axes=_WEIGHTS['w_up'])
        self.w_down = normal(F, D, axes=_WEIGHTS['w_down'], scale=into_residual)


class Qwen3(nnx.Module):
    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        draw = jax.random.normal(rngs.params(), (V, D)) * config.initializer_range
        self.embedding = nnx.Param(draw, axes=('vocab', 'embed'))
        self.layers = Layers(config, rngs=rngs)
        self.final_norm = nnx.Param(jnp.ones(D), axes=('embed',))
        if not config.tie_word_embeddings:
            draw = jax.random.normal(rngs.params(), (V, D)) * config.initializer_range
            self.head = nnx.Param(draw, axes=('vocab', 'embed'))

    @property
    def unembedding(self) -> jax.Array:
        """[V, D] float32; the embedding itself where the head is tied."""
        return (self.embedding if self.config.tie_word_embeddings else self.head)[...]

    def __call__(self, tokens_BT, positions_BT, segment_ids_BT) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, of whole sequences, several to a row."""

        def body(x_BTD, layer):
            def attend(q, k, v):
                kind = self.config.attention
                mixed = attention.segment_attention(q, k, v, segment_ids_BT, kind)
                return checkpoint_name(mixed, 'mixed')

            x_BTD = checkpoint_name(x_BTD, 'layer_input')
            return self._layer(layer, x_BTD, positions_BT, attend), None

        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.config.remat])
        x_BTD, _ = jax.lax.scan(body, self._embed(tokens_BT), self._stacked())
        return rms_norm(x_BTD, self.final_norm[...], self.config.rms_norm_eps)

    def extend(self, tokens_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of tokens that follow those in the cache, and the longer cache.

        A row's positions are consecutive and within the cache; what the cache holds from its first
        new position on is overwritten.
        """
        keys, values = list(cache.keys), list(cache.values)
        stacked, x_BTD = self._stacked(), self._embed(tokens_BT)
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
        for i in range(self.config.num_hidden_layers):

            def attend(q, k, v, i=i):
                start_B = positions_BT[:, 0]
                keys[i] = write(keys[i], k.transpose(0, 2, 1, 3), start_B)
                values[i] = write(values[i], v.transpose(0, 2, 1, 3), start_B)
                return attention.cache_attention(q, keys[i], values[i], positions_BT)

            layer = jax.tree.map(lambda p, i=i: p[i], stacked)
            x_BTD = self._layer(layer, x_BTD, positions_BT, attend)
        hidden = rms_norm(x_BTD, self.final_norm[...], self.config.rms_norm_eps)
        return hidden, Cache(tuple(keys), tuple(values))

    def _stacked(self) -> dict[str, jax.Array]:
        return {
            name: value[...]
            for name, value in vars(self.layers).items()
            if isinstance(value, nnx.Param)
        }

    def _embed(self, tokens_BT):
        """Each device looks all tokens up in its columns; then columns are traded for rows."""
        table_VD = partition.constrain(
            self.embedding[...].astype(self.config.dtype), 'vocab', 'embed'
        )
        x_BTD = table_VD[partition.constrain(tokens_BT, None, None)]
        x_BTD = partition.constrain(x_BTD, None, None, 'embed')
        return partition.constrain(x_BTD, *_STATES)

    def _layer(self, p, x_BTD, positions_BT, attend):
        """One pre-norm decoder layer; the two uses differ in `attend(q, k, v) -> [B, T, N, H]`."""
        c = self.config

        def times(x, name):
            return partition.matmul(x, p[name], _WEIGHTS[name])

        B, T, _ = x_BTD.shape
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        h_BTD = rms_norm(x_BTD, p['attention_norm'], c.rms_norm_eps)
        q_BTNH = rms_norm(times(h_BTD, 'wq').reshape(B, T, N, H), p['q_norm'], c.rms_norm_eps)
        k_BTKH = rms_norm(times(h_BTD, 'wk').reshape(B, T, K, H), p['k_norm'], c.rms_norm_eps)
        v_BTKH = times(h_BTD, 'wv').reshape(B, T, K, H)
        turns = inverse_frequencies(c, sum_dtype(x_BTD)), attention_factor(c)
        q_BTNH = rope(q_BTNH, positions_BT, *turns)
        k_BTKH = rope(k_BTKH, positions_BT, *turns)
        mixed_BTX = attend(q_BTNH, k_BTKH, v_BTKH).reshape(B, T, N * H)
        x_BTD = partition.constrain(x_BTD + times(mixed_BTX, 'wo'), *_STATES)

        h_BTD = rms_norm(x_BTD, p['mlp_norm'], c.rms_norm_eps)
        up_BTF = jax.nn.silu(times(h_BTD, 'w_gate')) * times(h_BTD, 'w_up')
        return partition.constrain(x_BTD + times(up_BTF, 'w_down'), *_STATES)
