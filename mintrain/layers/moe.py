"""Routed experts (Shazeer et al. 2017, arXiv 1701.06538), without capacity: no token is dropped, none is padded to fit.

token: all tokens of this device.  embed: residual stream, in weights expert_embed, which is split over `fsdp` alone.
experts: split over `expert`.  ff: width of one expert, split over `tensor`.  pair: gate and up.
row: a token's copy for one of its experts.  routes: all experts.
Rows are sorted by expert, sent to the devices that have it, multiplied in groups, sent back and summed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from mintrain import config
from mintrain.collectives import all_gather, psum, ragged_all_to_all
from mintrain.layers.linear import gather, normal
from mintrain.layers.mlp import ACTIVATIONS
from mintrain.layers.router import Router, balance_loss, expert_load

BLOCK = 128  # an expert's rows are padded to a multiple of it
BUFFER = 1 << 28  # elements of the rows that a device may receive at once: 512 MiB of bfloat16


def grouped_matmul(
    rows: Float[Array, "row inner"],
    weights: Float[Array, "experts inner outer"],
    sizes: Int32[Array, "experts"],
    block: int,
) -> Float[Array, "row outer"]:
    """Each row times its expert's matrix. `sizes`, multiples of `block`, count the rows of the experts in turn.

    XLA's CPU backend would multiply every row with every expert in `ragged_dot`; there, blocks of rows are batched
    with their matrices instead.
    """

    def blocked(rows: Array, weights: Array, sizes: Array) -> Array:
        starts = block * jnp.arange(rows.shape[0] // block)
        owner = jnp.sum(starts[:, None] >= jnp.cumsum(sizes)[None], axis=1)
        theirs = weights.astype(jnp.float32)[jnp.minimum(owner, sizes.shape[0] - 1)]  # gradients sum in float32
        out = jnp.einsum("bri,bio->bro", rows.reshape(-1, block, rows.shape[1]), theirs.astype(rows.dtype))
        return out.reshape(rows.shape[0], -1)

    return jax.lax.platform_dependent(rows, weights, sizes, cpu=blocked, default=jax.lax.ragged_dot)


def slots(
    counts: Int32[Array, "source experts"], rows: int, block: int
) -> tuple[Int32[Array, "row"], Int32[Array, "experts"]]:
    """Where rows sorted by source and expert go, so that each expert's stand together from a multiple of `block`.

    Returns the slot of each row, beyond the last one for rows that are none, and the padded size of each expert.
    """
    experts = counts.shape[1]
    padded = -(-jnp.sum(counts, axis=0) // block) * block
    first = (jnp.cumsum(padded) - padded)[None] + jnp.cumsum(counts, axis=0) - counts  # of each source and expert
    ends = jnp.cumsum(counts.reshape(-1))
    at = jnp.arange(rows, dtype=jnp.int32)
    cell = jnp.minimum(jnp.searchsorted(ends, at, side="right", method="compare_all"), ends.shape[0] - 1)
    slot = first.reshape(-1)[cell] + at - (ends - counts.reshape(-1))[cell]
    return jnp.where(at < ends[-1], slot, slot_count(rows, experts, block)), padded


def slot_count(rows: int, experts: int, block: int) -> int:
    return (rows + experts * (block - 1)) // block * block


@jax.custom_vjp
def take(
    x: Float[Array, "from width"], index: Int32[Array, "to"], copies: Int32[Array, "from_copies"]
) -> Float[Array, "to width"]:
    """Row `index // n` of `x`, of which there are n copies; zeros beyond the last one.

    copies: where each row's n copies go, side by side, or beyond the last place. With it the gradient is fetched as the
    rows are, and summed in float32; without, it would be scattered, which TPUs do slowly.
    """
    return x.at[index // (copies.shape[0] // x.shape[0])].get(mode="fill", fill_value=0)


def _take_forward(x: Array, index: Array, copies: Array) -> tuple[Array, tuple[Array, Array]]:
    return take(x, index, copies), (copies, jnp.zeros((x.shape[0], 0)))


def _take_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    copies, rows = kept
    each = g.at[copies].get(mode="fill", fill_value=0).reshape(rows.shape[0], -1, g.shape[1])
    return jnp.sum(each.astype(jnp.float32), axis=1).astype(g.dtype), None, None


take.defvjp(_take_forward, _take_backward)


class MoE(eqx.Module):
    router: Router
    gate_up: Float32[Array, "experts expert_embed pair ff"]
    down: Float32[Array, "experts ff expert_embed"]
    cfg: config.MoE = eqx.field(static=True)

    @staticmethod
    def init(c: config.MoE, model: config.Model, *, key: PRNGKeyArray) -> "MoE":
        keys = jax.random.split(key, 3)
        return MoE(
            router=Router.init(c, model, key=keys[0]),
            gate_up=normal(keys[1], (c.experts, model.embed, 2, c.width), fan_in=model.embed),
            down=normal(keys[2], (c.experts, c.width, model.embed), fan_in=c.width),
            cfg=c,
        )

    @jax.named_scope("moe")
    def __call__(
        self, x: Float[Array, "token embed"], router_input: Float[Array, "token embed"], real: Bool[Array, "batch seq"]
    ) -> tuple[Float[Array, "token embed"], Float32[Array, "routes"], Float32[Array, ""]]:
        """The experts' output, their load and the balance loss (both sums over the real tokens of this device)."""
        index, weights, scores = self.router(router_input)
        out = self._experts(x, index, weights)
        return out, expert_load(index, real.reshape(-1), self.cfg.experts), balance_loss(scores, index, real)

    def _experts(
        self, x: Float[Array, "token embed"], index: Int32[Array, "token topk"], weights: Float32[Array, "token topk"]
    ) -> Float[Array, "token embed"]:
        """The weighted sum of each token's experts, of as many tokens at a time as `BUFFER` allows."""
        inward = "experts/expert expert_embed/fsdp pair ff/tensor -> experts/expert expert_embed pair ff/tensor"
        gate_up = rearrange(gather(inward, self.gate_up, x.dtype), "e d p f -> e d (p f)")
        outward = "experts/expert ff/tensor expert_embed/fsdp -> experts/expert ff/tensor expert_embed"
        down = gather(outward, self.down, x.dtype)
        capacity = jax.lax.axis_size("expert") * min(index.shape[1], self.gate_up.shape[0]) * x.size
        parts = next(n for n in range(max(-(-capacity // BUFFER), 1), x.shape[0] + 1) if x.shape[0] % n == 0)
        if parts == 1:
            return self._part(x, index, weights, gate_up, down)
        wide = gate_up.astype(jnp.float32), down.astype(jnp.float32)  # their gradients are sums over the parts

        @jax.checkpoint
        def part(inputs: tuple[Array, Array, Array]) -> Float[Array, "token embed"]:
            return self._part(*inputs, *(w.astype(x.dtype) for w in wide))

        split = lambda y: rearrange(y, "(n t) ... -> n t ...", n=parts)
        return rearrange(jax.lax.map(part, jax.tree.map(split, (x, index, weights))), "n t d -> (n t) d")

    def _part(
        self,
        x: Float[Array, "token embed"],
        index: Int32[Array, "token topk"],
        weights: Float32[Array, "token topk"],
        gate_up: Float[Array, "experts embed pair_ff"],
        down: Float[Array, "experts ff embed"],
    ) -> Float[Array, "token embed"]:
        tokens, topk = index.shape
        devices, experts = jax.lax.axis_size("expert"), self.gate_up.shape[0]
        order = jnp.argsort(index.reshape(-1), stable=True)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)  # of each copy
        counts = jnp.bincount(index.reshape(-1), length=devices * experts).astype(jnp.int32)
        rows = take(x, order, place)

        counts = all_gather("source/expert routes -> source routes", counts[None])
        sizes = jnp.sum(counts.reshape(devices, devices, experts), axis=-1)
        mine = jax.lax.dynamic_slice_in_dim(counts, experts * jax.lax.axis_index("expert"), experts, axis=1)
        capacity = devices * tokens * min(topk, experts)  # all tokens of all devices may choose these experts
        if devices > 1:
            rows = ragged_all_to_all(rows, sizes, capacity, "expert")

        block = min(BLOCK, max(8, 1 << (tokens * topk // experts).bit_length()))
        slot, padded = slots(mine, capacity, block)
        filled = slot_count(capacity, experts, block)
        origin = jnp.full_like(slot, capacity, shape=filled).at[slot].set(jnp.arange(capacity), mode="drop")
        rows = take(rows, origin, slot)
        gate, up = jnp.split(grouped_matmul(rows, gate_up, padded, block), 2, axis=-1)
        rows = grouped_matmul(ACTIVATIONS[self.cfg.activation](gate) * up, down, padded, block)
        rows = take(rows, slot, origin)

        if devices > 1:
            rows = ragged_all_to_all(rows, sizes.T, tokens * topk, "expert")
        rows = rearrange(take(rows, place, order), "(t k) d -> t k d", k=topk)
        return psum(jnp.einsum("tkd,tk->td", rows.astype(jnp.float32), weights), "tensor").astype(x.dtype)
