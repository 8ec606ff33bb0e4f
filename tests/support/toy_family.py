"""A second family of models, small and unlike Qwen3, and a program that takes it all the way.

    toy_family.py FOLDER '{"fsdp": 2}'

It draws a random model on that mesh, takes one step of the learner with Muon, writes the result as
a Hugging Face directory and reads it back. FOLDER gets `model`, that directory, and `found.npz`:
the metric sums of the step, the parameters after it, and `muon`, the names of what Muon updated.

The family is a GPT with LayerNorm and biases, learned places instead of RoPE, no norm of queries
and keys, matrices that the directory has the same way round as here, and one that is not stacked.
"""

import dataclasses
import json
import pathlib
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from echo_jax.learner import sharding
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface, partition
from echo_jax.model.attention import Cache, segment_attention
from echo_jax.model.families import FAMILIES
from echo_jax.model.family import Array, ConfigJson, set_params
from echo_jax.model.params import flatten
from tests.support.mesh_step import SHARDING, draw_batch
from tests.support.random_rollouts import small_config

SIZES = {'vocab_size': 64, 'width': 16, 'depth': 3, 'inner': 24, 'places': 32}


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    model_type: ClassVar[str] = 'toy'
    config_json: ClassVar[ConfigJson] = ConfigJson(
        'ToyForCausalLM', {'post_norm': False}, ('vocab_size', 'width', 'depth', 'inner'), {}
    )
    spare_tensors: ClassVar[tuple[str, ...]] = ('h.0.mask',)
    num_attention_heads: ClassVar[int] = 4
    num_key_value_heads: ClassVar[int] = 2

    vocab_size: int
    width: int
    depth: int
    inner: int
    places: int
    dtype: str = 'float32'

    @classmethod
    def read_json(cls, found, file):
        return {'places': found['n_places']}

    def write_json(self):
        return {'n_places': self.places}

    def axis_sizes(self):
        return {
            'layers': self.depth,
            'vocab': self.vocab_size,
            'places': self.places,
            'embed': self.width,
            'exit': self.width,
            'mlp': self.inner,
            'heads': 4 * 8,
            'kv_heads': 2 * 8,
        }

    def arrays(self):
        def layer(theirs, *axes, **options):
            return Array(f'h.{{}}.{theirs}', ('layers', *axes), **options)

        def matrix(theirs, *axes, **options):
            return layer(theirs, *axes, kind='matrix', std=0.3, **options)

        def vector(theirs, axis, constant=0.0):
            return layer(theirs, axis, kind='vector', constant=constant)

        return {
            'words': Array('wte.weight', ('vocab', 'embed'), 'unembedding', std=0.5),
            'places': Array('wpe.weight', ('places', 'embed'), 'lookup', std=0.5),
            'layers/norm': vector('ln.weight', 'embed', 1.0),
            'layers/norm_bias': vector('ln.bias', 'embed'),
            'layers/query': matrix('attn.q.weight', 'embed', 'heads'),
            'layers/query_bias': vector('attn.q.bias', 'heads', 0.1),
            'layers/key': matrix('attn.k.weight', 'embed', 'kv_heads'),
            'layers/value': matrix('attn.v.weight', 'embed', 'kv_heads'),
            'layers/out': matrix('attn.o.weight', 'heads', 'embed', transposed=True),
            'layers/up': matrix('mlp.up.weight', 'embed', 'mlp'),
            'layers/up_bias': vector('mlp.up.bias', 'mlp'),
            'layers/down': matrix('mlp.down.weight', 'mlp', 'embed'),
            'exit': Array('exit.weight', ('embed', 'exit'), 'matrix', transposed=True, std=0.3),
        }

    def build(self, rngs):
        return Toy(self, rngs)

    def init_cache(self, batch, length):
        return Cache((), ())


class Toy(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        set_params(self, config, rngs)

    @property
    def unembedding(self):
        return self.words[...]

    def __call__(self, tokens, positions, segment_ids):
        arrays, (B, T) = self.config.arrays(), tokens.shape

        def body(x, p):
            def times(x, name):
                return partition.matmul(x, p[name], arrays[f'layers/{name}'].axes[1:])

            h = layer_norm(x) * p['norm'] + p['norm_bias']
            q = (times(h, 'query') + p['query_bias']).reshape(B, T, 4, 8)
            k, v = (times(h, name).reshape(B, T, 2, 8) for name in ('key', 'value'))
            x += times(segment_attention(q, k, v, segment_ids).reshape(B, T, -1), 'out')
            return x + times(jax.nn.gelu(times(x, 'up') + p['up_bias']), 'down'), None

        # Looked up by products, which XLA can split as it likes.
        x = jax.nn.one_hot(tokens, self.config.vocab_size) @ self.words[...]
        x += jax.nn.one_hot(positions, self.config.places) @ self.places[...]
        layers = {name: param[...] for name, param in self.layers.items()}
        x, _ = jax.lax.scan(body, x, layers)
        return layer_norm(partition.matmul(x, self.exit[...], arrays['exit'].axes))


def layer_norm(x):
    x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def muon_names(opt_state) -> list[str]:
    """Flat names of the parameters that have a momentum of Muon's."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
    inside = [path for path in paths if '/muon/' in path and '/mu/' in path]
    return sorted({path.partition('/mu/')[2].removesuffix('/value') for path in inside})


def main(folder: pathlib.Path, mesh: dict[str, int]) -> None:
    FAMILIES['toy'] = ToyConfig
    config = small_config(groups=4, group_size=2, seq_len=16, micro_rows=8, pack=False)
    with config.unlocked():
        config.model = SIZES | {'path': '', 'model_type': 'toy'}
        config.sharding = SHARDING
    config.mesh.update({'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1} | mesh)
    config.optimizer.name = 'muon'
    sharded = ShardedModel.of(config)
    step, _, first = sharded.step(config.optimizer)
    state = first(sharded.random_params())
    before = {name: np.array(array) for name, array in flatten(state.params).items()}
    batch = sharding.put_batch(draw_batch(config), sharded.mesh)
    state, sums = step(state, batch, 0.3, None)

    model = folder / 'model'
    huggingface.write_model(model, flatten(state.params).items(), sharded.model, dtype='float32')
    config.model = {'path': str(model)}
    assert huggingface.recipe_config(config.model) == sharded.model
    again = flatten(huggingface.load_params(model, sharded.abstract, sharded.placed))
    for name, array in flatten(state.params).items():
        assert again[name].sharding == array.sharding
        np.testing.assert_array_equal(again[name], array)
        assert not np.array_equal(before[name], array), f'{name} did not change'
    found = {name: metric.sum for name, metric in sums.items()}
    np.savez(folder / 'found.npz', muon=muon_names(state.opt_state), **again, **found)


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
