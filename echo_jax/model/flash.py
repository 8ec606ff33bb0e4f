"""Attention kernels of accelerators, as `attention.segment_attention` calls them.

All kernels are JAX's. This module calls them; `attention.py` decides which one runs where. `pallas`
and `cudnn` are what one device of a mesh computes. `splash` takes the arrays of the whole mesh,
because its kernel has a table that has to be split too.

B rows, T tokens, t queries of one device, N query heads, K key-value heads, H head dimension.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu
from jax.experimental.pallas.ops.tpu import splash_attention as tpu

from echo_jax.model import partition
from echo_jax.model.axes import ATTENTION, QUERIES
from echo_jax.model.precision import sum_dtype


def splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT) -> jax.Array:
    """For TPUs; skips the blocks that causality hides. T is a multiple of 128 on every device."""
    T, N, H = q_BTNH.shape[1:]
    parts = partition.size('tokens')
    mask = tpu.CausalMask((T, T), shard_count=parts)
    # The kernel of one device: its share of the heads, and of the queries of each row.
    kernel = tpu.make_splash_mha(
        tpu.MultiHeadMask([mask] * (N // partition.size('heads'))),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=_splash_blocks(T // parts, T),
    )

    def attend(q_BtNH, k_BTKH, v_BTKH, q_segments_Bt, segments_BT, kernel):
        # The kernel does not scale. With a bfloat16 H ** -0.5 the product would be rounded twice.
        q_BtNH = (q_BtNH.astype(sum_dtype(q_BtNH)) * H**-0.5).astype(q_BtNH.dtype)
        qkv = (x.transpose(0, 2, 1, 3) for x in (q_BtNH, k_BTKH, v_BTKH))
        out_BNtH = jax.vmap(kernel)(*qkv, tpu.SegmentIds(q_segments_Bt, segments_BT))
        return out_BNtH.transpose(0, 2, 1, 3)

    # The kernel carries a table of the blocks that its queries see. If it were not split like the
    # queries, a device would skip blocks by the table of another device's queries.
    layout = partition.layout()
    parts_of = kernel.manual_sharding_spec(layout.sharding(None, 'tokens')) if layout else None
    call = partition.per_device(attend, (*ATTENTION, parts_of), QUERIES)
    return call(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT, kernel)


def _splash_blocks(queries: int, keys: int) -> tpu.BlockSizes:
    """Blocks of at most 512 queries and 1,024 keys that divide a device's tokens.

    The larger the blocks, the less often keys and values are read from HBM. Still larger ones than
    these do not fit in VMEM.
    """
    q = _largest_divisor(queries, (512, 256, 128))
    kv = _largest_divisor(keys, (1024, 512, 256, 128))
    compute = min(kv, 512)
    return tpu.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=q,
        block_kv_dq=kv,
    )


def _largest_divisor(tokens: int, blocks: tuple[int, ...]) -> int:
    for block in blocks:
        if tokens % block == 0:
            return block
    raise ValueError(
        f'a device has {tokens} tokens of a row; the TPU kernel needs a multiple of {blocks[-1]}: '
        'change batch.seq_len or mesh.context'
    )


def pallas(q_BTNH, k_BTKH, v_BTKH, segments_BT, _) -> jax.Array:
    """For CUDA, and rows of several segments. H and min(T, 128) are powers of two."""
    G, H = q_BTNH.shape[2] // k_BTKH.shape[2], q_BTNH.shape[3]
    # This kernel knows no groups: each query head needs a key-value head of its own.
    k_BTNH, v_BTNH = (jnp.repeat(x, G, axis=2) for x in (k_BTKH, v_BTKH))
    return gpu.mha(q_BTNH, k_BTNH, v_BTNH, segments_BT, H**-0.5, True)


def cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, _) -> jax.Array:
    """For CUDA, and rows of one segment that begins the row. bfloat16 or float16."""
    # All that cuDNN is told of segments is how long a row is: the rest of it is padding.
    lengths_B = (segments_BT > 0).sum(1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation='cudnn',
    )
