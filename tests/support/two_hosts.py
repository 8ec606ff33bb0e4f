"""One of two processes that load a model together; test_huggingface.py starts both.

    python two_hosts.py COORDINATOR PROCESS MODEL

Prints the name of every array whose part here is not what the files hold, and then the share of the
files that this process has mapped into its memory.
"""

import pathlib
import re
import sys

import jax
import numpy as np

from echo_jax.learner import sharding
from echo_jax.model import huggingface, safetensors
from echo_jax.model import params as model_params
from echo_jax.model.partition import Layout

address, process, model = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ['tensor'])
layout = Layout(mesh, dict.fromkeys(['heads', 'kv_heads', 'mlp', 'vocab'], ('tensor',)))
_, abstract = model_params.abstract(huggingface.read_config(model))
kept, really_open = [], safetensors.open_tensors


def open_and_keep(path):
    """The maps would be gone when load_params returns, and with them what was read."""
    kept.append(really_open(path))
    return kept[0]


safetensors.open_tensors = open_and_keep
params = huggingface.load_params(model, abstract, sharding.param_shardings(abstract, layout))
smaps = pathlib.Path('/proc/self/smaps').read_text()
mapped = re.findall(r'\.safetensors\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB', smaps)
size, resident = np.array(mapped, int).sum(axis=0)

whole = {name: tensor[...] for name, tensor in really_open(pathlib.Path(model)).items()}
names = {'wq': 'self_attn.q_proj', 'wo': 'self_attn.o_proj', 'w_up': 'mlp.up_proj'}
expected = {'embedding': whole['model.embed_tokens.weight']} | {
    f'layers/{ours}': np.stack([whole[f'model.layers.{i}.{theirs}.weight'].T for i in range(2)])
    for ours, theirs in names.items()
}
for name, array in model_params.flatten(params).items():
    for shard in array.addressable_shards:
        assert shard.data.size == array.size // 4 or 'norm' in name
        if name in expected and not np.array_equal(shard.data, expected[name][shard.index]):
            print(name)
print(resident / size)
