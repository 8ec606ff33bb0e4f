"""Qwen3, the dense decoder, in Flax NNX: grouped-query attention, QK-norm, RoPE, SwiGLU, RMSNorm.

B rows, T tokens, S cached tokens, D model, F ffw, N query heads, K key-value heads, H head
dimension, V vocabulary, L layers.

The layers are one set of arrays with a leading L and are scanned, so 36 layers compile as one.
`Qwen3Config.arrays` is the family's table, as family.py explains. The model returns hidden states,
never logits: `logprobs.score_tokens` makes what a loss needs of them.
"""

import dataclasses
import math
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from echo_jax.model import attention, partition
from echo_jax.model.attention import Cache
from echo_jax.model.axes import STATES
from echo_jax.model.family import Array, ConfigJson, set_params
from echo_jax.model.precision import sum_dtype
from echo_jax.model.rope import (
    ROPE_TYPES,
    YARN,
    attention_factor,
    inverse_frequencies,
    read_rope,
    rope,
    write_rope,
)

_policies = jax.checkpoint_policies
# What a layer keeps for its backward pass, besides its input, by the name of `model.remat`.
REMAT = {
    'none': _policies.everything_saveable,
    'full': _policies.nothing_saveable,
    # The result of attention, so that its forward pass runs once and not twice.
    'attention': _policies.save_only_these_names('mixed'),
    # Nothing, and the input is kept in the host's memory instead of the device's.
    'offload': _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=['layer_input'],
        offload_src='device',
        offload_dst='pinned_host',
    ),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The sizes of a Qwen3, under the names of Hugging Face's config.json; a `ModelConfig`."""

    model_type: ClassVar[str] = 'qwen3'  # not 'qwen3_moe'
    config_json: ClassVar[ConfigJson] = ConfigJson(
        architecture='Qwen3ForCausalLM',
        supported={
            'hidden_act': 'silu',
            'attention_bias': False,
            'attention_dropout': 0.0,
            'use_sliding_window': False,
            'quantization_config': None,
        },
        required=(
            'vocab_size',
            'hidden_size',
            'intermediate_size',
            'num_hidden_layers',
            'num_attention_heads',
        ),
        defaults={
            'head_dim': 128,
            'max_position_embeddings': 32_768,
            'rms_norm_eps': 1e-6,
            'tie_word_embeddings': False,
            'initializer_range': 0.02,
        },
    )
    # Some directories repeat a tied head; older versions of transformers saved RoPE's frequencies.
    spare_tensors: ClassVar[tuple[str, ...]] = ('lm_head.weight', 'inv_freq')

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_type: str = 'default'  # or 'yarn', which uses the next six fields
    factor: float = YARN['factor']
    original_max_position_embeddings: int = YARN['original_max_position_embeddings']
    attention_factor: float | None = YARN['attention_factor']
    beta_fast: float = YARN['beta_fast']
    beta_slow: float = YARN['beta_slow']
    truncate: bool = YARN['truncate']
    max_position_embeddings: int = 32_768  # written to config.json, and not used here
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = 'float32'  # of activations and matrix products; parameters are float32
    attention: str = 'auto'  # the kernel, one of attention.KINDS; 'auto': the platform's
    remat: str = 'full'  # what is kept for the backward pass, one of REMAT

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f'num_attention_heads={self.num_attention_heads} is no multiple of '
                f'num_key_value_heads={self.num_key_value_heads}; change config.model'
            )
        choices_of = {'attention': attention.KINDS, 'remat': tuple(REMAT), 'rope_type': ROPE_TYPES}
        for key, choices in choices_of.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f'model.{key} is {getattr(self, key)!r}; expected one of {choices}'
                )
        if self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim} is odd; RoPE rotates pairs, make it even')

    @classmethod
    def read_json(cls, found: dict, file: pathlib.Path) -> dict:
        other = set(found.get('layer_types', ())) - {'full_attention'}
        if other:
            raise ValueError(f"{file}: layer_types has {other}; only 'full_attention' is supported")
        length = found.get(
            'max_position_embeddings', cls.config_json.defaults['max_position_embeddings']
        )
        heads = found.get('num_key_value_heads', found['num_attention_heads'])
        return {'num_key_value_heads': heads} | read_rope(found, file, length)

    def write_json(self) -> dict:
        return {'num_key_value_heads': self.num_key_value_heads} | write_rope(self)

    def axis_sizes(self) -> dict[str, int]:
        return {
            'layers': self.num_hidden_layers,
            'vocab': self.vocab_size,
            'embed': self.hidden_size,
            'mlp': self.intermediate_size,
            'heads': self.num_attention_heads * self.head_dim,
            'kv_heads': self.num_key_value_heads * self.head_dim,
            'head_dim': self.head_dim,
        }

    def arrays(self) -> dict[str, Array]:
        std = self.initializer_range
        # As in GPT-2: 2 L matrices add to the residual stream, whose variance stays what it was.
        into_residual = std * (1 / math.sqrt(2 * self.num_hidden_layers))

        def norm(theirs: str, axis: str) -> Array:
            theirs = f'model.layers.{{}}.{theirs}.weight'
            return Array(theirs, ('layers', axis), 'vector', constant=1.0)

        def matrix(theirs: str, *axes: str, std: float = std) -> Array:
            theirs = f'model.layers.{{}}.{theirs}.weight'
            return Array(theirs, ('layers', *axes), 'matrix', transposed=True, std=std)

        words = ('vocab', 'embed')
        tied = self.tie_word_embeddings
        kind = 'unembedding' if tied else 'lookup'
        table = {
            'embedding': Array('model.embed_tokens.weight', words, kind, std=std),
            'layers/attention_norm': norm('input_layernorm', 'embed'),
            'layers/wq': matrix('self_attn.q_proj', 'embed', 'heads'),
            'layers/wk': matrix('self_attn.k_proj', 'embed', 'kv_heads'),
            'layers/wv': matrix('self_attn.v_proj', 'embed', 'kv_heads'),
            'layers/q_norm': norm('self_attn.q_norm', 'head_dim'),
            'layers/k_norm': norm('self_attn.k_norm', 'head_dim'),
            'layers/wo': matrix('self_attn.o_proj', 'heads', 'embed', std=into_residual),
            'layers/mlp_norm': norm('post_attention_layernorm', 'embed'),
            'layers/w_gate': matrix('mlp.gate_proj', 'embed', 'mlp'),
            'layers/w_up': matrix('mlp.up_proj', 'embed', 'mlp'),
            'layers/w_down': matrix('mlp.down_proj', 'mlp', 'embed', std=into_residual),
            'final_norm': Array('model.norm.weight', ('embed',), 'vector', constant=1.0),
        }
        head = Array('lm_head.weight', words, 'unembedding', std=std)
        return table if tied else table | {'head': head}

    def build(self, rngs: nnx.Rngs) -> 'Qwen3':
        return Qwen3(self, rngs=rngs)

    def init_cache(self, batch: int, length: int) -> Cache:
        shape = (batch, self.num_key_value_heads, length, self.head_dim)

        def empty() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, self.dtype) for _ in range(self.num_hidden_layers))

        return Cache(empty(), empty())


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis in float32, as the reference does, returned in the dtype of x."""
    wide = x.astype(sum_dtype(x))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class Qwen3(nnx.Module):
    embedding: nnx.Param  # [V, D]
    layers: nnx.Dict  # {name without 'layers/': nnx.Param [L, ...]}
    final_norm: nnx.Param  # [D]
    head: nnx.Param  # [V, D]; absent if the head is tied

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        set_params(self, config, rngs)

    @property
    def unembedding(self) -> jax.Array:
        """The head [V, D] float32, which is the embedding if it is tied."""
        return (self.embedding if self.config.tie_word_embeddings else self.head)[...]

    def __call__(self, tokens_BT, positions_BT, segment_ids_BT) -> jax.Array:
        """Hidden states [B, T, D] after the final norm. A row may hold several whole sequences."""

        def body(x_BTD, layer):
            def attend(q, k, v):
                kind = self.config.attention
                mixed = attention.segment_attention(q, k, v, segment_ids_BT, kind)
                return checkpoint_name(mixed, 'mixed')

            x_BTD = checkpoint_name(x_BTD, 'layer_input')
            return self._layer(layer, x_BTD, positions_BT, attend), None

        # prevent_cse=False: what it prevents cannot happen across the iterations of a scan, and the
        # barriers that prevent it would stand between operations that XLA can fuse.
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.config.remat])
        x_BTD, _ = jax.lax.scan(body, self._embed(tokens_BT), self._stacked())
        return rms_norm(x_BTD, self.final_norm[...], self.config.rms_norm_eps)

    def extend(self, tokens_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of tokens that follow those in the cache, and the longer cache.

        A row's positions are consecutive and within the cache. They overwrite what the cache holds
        there.
        """
        keys, values = list(cache.keys), list(cache.values)
        stacked, x_BTD = self._stacked(), self._embed(tokens_BT)
        # The rows of the batch have different lengths, so each writes at its own place.
        write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0)))
        # Not a scan, which would copy the cache of all layers into its result at every token.
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
        return {name: param[...] for name, param in self.layers.items()}

    def _embed(self, tokens_BT):
        """Each device looks all tokens up in its own columns; then columns are traded for rows.

        Only the states travel between devices, since the table is larger than those of a
        micro-batch.
        """
        table_VD = partition.constrain(
            self.embedding[...].astype(self.config.dtype), 'vocab', 'embed'
        )
        x_BTD = table_VD[partition.constrain(tokens_BT, None, None)]
        x_BTD = partition.constrain(x_BTD, None, None, 'embed')
        return partition.constrain(x_BTD, *STATES)

    def _layer(self, p, x_BTD, positions_BT, attend):
        """One pre-norm decoder layer; the two uses differ in `attend(q, k, v) -> [B, T, N, H]`."""
        c = self.config

        arrays = c.arrays()

        def times(x, name):
            return partition.matmul(x, p[name], arrays[f'layers/{name}'].axes[1:])

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
        x_BTD = partition.constrain(x_BTD + times(mixed_BTX, 'wo'), *STATES)

        h_BTD = rms_norm(x_BTD, p['mlp_norm'], c.rms_norm_eps)
        up_BTF = jax.nn.silu(times(h_BTD, 'w_gate')) * times(h_BTD, 'w_up')
        return partition.constrain(x_BTD + times(up_BTF, 'w_down'), *STATES)
