"""Attention in one kernel on TPUs: jax's splash attention (Pallas), with float32 logits and softmax inside.

batch: sequences.  query: a run of consecutive tokens.  key: the whole sequence, in order.  kv_heads, group: the query
heads that share a key head, which is not repeated.  head: width of a query and key.  value: of a value.
Blocks of keys that no query of a block sees are neither fetched nor computed. Elsewhere than on a TPU it is
interpreted: the tests hold it to the plain form (attend.py) that way. Pallas is imported where it is used: it is slow.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int32

from mintrain.collectives import unchecked, vary_like

LANES = 128  # blocks are a multiple of it
BLOCK = 512  # tokens of a block of queries or keys, at most


def on_tpu(mesh: AbstractMesh | None = None) -> bool:
    """Whether `mesh`, or the one that is traced for, is of TPUs, also such as are only planned with."""
    device = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).abstract_device
    return device is not None and device.platform == "tpu"


def fits(run: int) -> bool:
    return on_tpu() and run % LANES == 0


def splash_attention(
    q: Float[Array, "batch kv_heads group query head"],
    k: Float[Array, "batch kv_heads key head"],
    v: Float[Array, "batch kv_heads key value"],
    query_segments: Int32[Array, "batch query"],
    key_segments: Int32[Array, "batch key"],
    first: Int32[Array, ""] | int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Float[Array, "batch kv_heads group query value"]:
    """As `attend.attend_places` of one run, of which `first` is the place among the keys, a multiple of its length.

    The logits are scaled through the queries, which are rounded to their dtype once more than in the plain form.
    """
    kernel = _kernel(q.shape[2], q.shape[3], k.shape[2], softcap, window)
    part = first // q.shape[3]
    mine = jax.tree.map(lambda x: _part(x, part, k.shape[2] // q.shape[3]), kernel)
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    key_segments = jnp.where(key_segments > 0, key_segments, -1)  # so that padding does not see padding
    k, v = vary_like(k, q), vary_like(v, q)
    out = _attention(scaled, k, v, mine, vary_like(query_segments, q), vary_like(key_segments, q))
    return jnp.where((query_segments > 0)[:, None, None, :, None], out, 0)


def _kernel(group: int, run: int, length: int, softcap: float | None, window: int | None) -> Callable:
    """The kernel for the runs of a whole sequence: its arrays say which blocks of keys each block of queries visits."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = lambda tokens: next(size for size in (BLOCK, BLOCK // 2, LANES) if tokens % size == 0)
    query, key = block(run), block(length)
    blocks = dict(block_q=query, block_kv=key, block_q_dkv=query, block_kv_dkv=key, block_q_dq=query, block_kv_dq=key)
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * group),
        block_sizes=splash.BlockSizes(**blocks),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=length // run,
        interpret=not on_tpu(),
    )


def _part(x: Array, part: Int32[Array, ""] | int, parts: int) -> Array:
    """Of the kernel's arrays, "heads queries keys" in blocks or "query", those of one run of queries."""
    axis = 1 if x.ndim == 3 else 0
    return jax.lax.dynamic_slice_in_dim(x, part * (x.shape[axis] // parts), x.shape[axis] // parts, axis)


# The kernel knows nothing of the axes that its operands vary over. It runs in a `shard_map` of its own without that
# check, forward and backward; around it the types are what they must be.


@jax.custom_vjp
def _attention(q, k, v, kernel, query_segments, key_segments):
    return unchecked(_run, kernel, q, k, v, query_segments, key_segments)


def _forward(q, k, v, kernel, *segments):
    return unchecked(lambda *a: jax.vjp(partial(_run, a[0]), *a[1:]), kernel, q, k, v, *segments)


def _backward(pull, g):
    dq, dk, dv, *_ = unchecked(lambda pull, g: pull(g), pull, g)
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def _run(kernel, q, k, v, query_segments, key_segments):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    each = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))
    return each(q, k, v, SegmentIds(query_segments, key_segments))
