"""The TPU compiler without a TPU: topologies, limits, messages, and counts of what it compiles."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import tiny
from configs.qwen3_8b import get_config
from echo_jax.learner.batching import padding
from echo_jax.learner.step import ShardedModel
from echo_jax.planner import topology
from echo_jax.planner.hlo import module_cost
from echo_jax.run.sources import probe_length

GIB = 2**30


@pytest.fixture
def libtpu():
    pytest.importorskip('libtpu')


def test_messages_of_the_compiler():
    by_space = (
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. '
        'Exceeded hbm capacity by 4.75G.'
    )
    assert topology.read_out_of_memory(by_space) == (20.5 * GIB, 15.75 * GIB)
    by_kind = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (512.00M) exceeds available HBM (1.5K).'
    )
    assert topology.read_out_of_memory(by_kind) == (2**29, 1536)
    vmem = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.'
    assert topology.read_out_of_memory(vmem) is None


@pytest.mark.parametrize('name', ['v9:2x2', 'v5p', 'v5p:3x3', 'v5e:0x0', ''])
def test_an_unknown_topology(libtpu, name):
    says = 'topology is .* expected one of v5e|the compiler knows no topology '
    with pytest.raises(ValueError, match=says):
        topology.tpu_devices(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, 'libtpu', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]"'):
        topology.tpu_devices('v5p:2x2x4')


@pytest.mark.parametrize(
    'name, chips, sold_gib', [('v5e:4x4', 16, 16), ('v5p:2x2x4', 16, 95), ('v6e:2x2', 4, 32)]
)
def test_the_limit_is_the_compilers(libtpu, name, chips, sold_gib):
    devices = topology.tpu_devices(name)
    assert len(devices) == chips
    assert 0.95 < topology.hbm_limit(devices[0]) / GIB / sold_gib < 1.01


def test_counts_of_a_module_for_four_chips(libtpu):
    """Three layers [256, 512] x [512, 512] a chip, weights gathered, in a loop of unknown end."""
    mesh = Mesh(np.array(topology.tpu_devices('v5e:2x2')), ('x',))

    def f(n, w, x):
        def layers(x):
            def layer(x, w):
                return jnp.tanh(x @ jax.lax.all_gather(w, 'x', tiled=True)), None

            return jax.lax.scan(layer, x, w)[0]

        return jax.lax.fori_loop(0, n, lambda _, x: layers(x), x)

    rows, weights = PartitionSpec('x'), PartitionSpec(None, 'x')
    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(PartitionSpec(), weights, rows), out_specs=rows, check_vma=False
    )

    def shape(dtype, spec, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    compiled = (
        jax.jit(sharded)
        .lower(
            shape(np.int32, PartitionSpec()),
            shape(jnp.bfloat16, weights, 3, 512, 512),
            shape(jnp.bfloat16, rows, 1024, 512),
        )
        .compile()
    )
    cost = module_cost(compiled.as_text(), topology.CHIPS['v5e'], devices=4, unknown_trips=5)
    assert cost.flops == 5 * 3 * 2 * 256 * 512 * 512
    # A quarter of a matrix of 512 x 512 x 2 bytes goes to three others.
    assert cost.sent_bytes == 5 * 3 * 3 / 4 * 512 * 512 * 2
    assert cost.seconds >= cost.flops / topology.CHIPS['v5e'].peak_flops


def test_kernel_flops_of_splash_attention():
    """6 heads of 2 queries, 1,024 tokens of 128, in 5 layers, forward and backward."""
    T, H, G = 1024, 128, 2
    sizes = splash.BlockSizes(
        **dict.fromkeys(('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv'), 256),
        **dict.fromkeys(('block_kv_dkv', 'block_kv_dkv_compute'), 256),
        use_fused_bwd_kernel=True,
    )

    def attend(q, k, v):
        kernel = splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([masks.CausalMask((T, T))] * G), block_sizes=sizes
        )
        out, _ = jax.lax.scan(lambda q, _: (jax.vmap(kernel)(q, k, v), None), q, length=5)
        return out.astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((6, G, T, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((6, T, H), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(q, k, k).jaxpr
    product = 2 * T * T * H
    # Two products forward, five backward (scores, and the gradients of q, k, v and the scores), of
    # which causality leaves half.
    assert topology.kernel_flops(jaxpr, unknown_trips=1) == 5 * (2 + 5) * 6 * G * product / 2


# -------------------------------------------------------------------------------- what divides


def small_config():
    config = get_config()
    config.model.update(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.batch.update(seq_len=128, micro_rows=4)
    config.mesh.context = 1
    return config


@pytest.mark.parametrize(
    'change, rows, says',
    [
        ({'mesh': {'fsdp': 3}}, 8, 'fsdp=3.* does not fit 4 devices'),
        ({}, 6, 'rows=6 does not divide by batch.micro_rows=4'),
        (
            {'batch': {'micro_rows': 2}},
            8,
            'batch.micro_rows=2 does not divide over data=1 x fsdp=4 = 4',
        ),
        (
            {'mesh': {'fsdp': 1, 'context': 4}, 'batch': {'seq_len': 130}},
            8,
            'batch.seq_len=130 does not divide over context=4',
        ),
        (
            {'model': {'hidden_size': 258}},
            8,
            r'embedding \(2048, 258\): 258 \(embed\) does not divide over fsdp=4 x context=1',
        ),
    ],
)
def test_what_does_not_divide(libtpu, change, rows, says):
    config = small_config()
    config.update(change)
    with pytest.raises(ValueError, match=says):
        topology.PlannedStep(config, topology.tpu_devices('v5e:2x2'), rows)


def test_bytes_of_the_state(libtpu):
    """Parameters and AdamW's two moments, float32, a fourth of all on each of four chips."""
    step = topology.PlannedStep(small_config(), topology.tpu_devices('v5e:2x2'), 8)
    attention = 256 * 128 * (4 + 2 + 2 + 4)  # queries, keys, values, output
    layer = attention + 3 * 256 * 512 + 2 * 256  # and the two norms
    split = 2 * layer + 2 * 2048 * 256 + 256
    whole = 2 * 2 * 128  # norms of queries and keys
    counters = 3 * 4  # of AdamW, of its schedule, of steps
    assert step.state_bytes == 12 * (split / 4 + whole) + counters


@pytest.mark.parametrize(('context', 'seq_len', 'length'), [(1, 384, 256), (4, 2048, 512)])
def test_the_probe_of_workers_can_be_scored(libtpu, context, seq_len, length):
    """Its row is shorter than those of training, and is split over as many devices."""
    config = tiny.get_config()
    config.mesh.context, config.batch.micro_rows, config.batch.seq_len = context, 4, seq_len
    devices = topology.tpu_devices('v5e:2x2')
    assert probe_length(ShardedModel.of(config, devices)) == length
    step = topology.PlannedStep(config, devices, rows=4)
    step.score.trace(step.state.params, padding(4, length))
