"""Attention a block of queries at a time against the plain form: the same values and gradients, whatever the blocks."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintrain.layers import attend
from mintrain.layers.attend import Places

N, G, HEAD, VALUE = 2, 3, 10, 6


def places(length: int) -> Places:
    """Two rows of packed documents, one with padding at its end."""
    starts = np.zeros((2, length), bool)
    starts[0, [0, 5, 6, 19]] = starts[1, [0, 11]] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    at = np.arange(length, dtype=np.int32)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    segments[1, -4:] = positions[1, -4:] = 0
    return Places(jnp.asarray(positions), jnp.asarray(segments))


def part(at: Places, first: int, size: int) -> Places:
    return jax.tree.map(lambda x: x[:, first : first + size], at)


def compare(monkeypatch, dtype: str, block: int, length: int, first: int, seq: int, window, softcap, order: bool):
    """Largest differences of the output and of the gradients, relative to the largest value, or to 1."""
    draw = lambda i, *shape: jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype)
    arrays = draw(0, 2, seq, N, G, HEAD), draw(1, 2, N, length, HEAD), draw(2, 2, N, length, VALUE)
    keys = places(length)
    queries = part(keys, first, seq)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, seq, N, G, VALUE)), jnp.float32)

    def blocked(q, k, v):
        at = (jnp.asarray(first, jnp.int32),) if order else None
        return attend.attend_places(q, k, v, queries, keys, 0.7, softcap, window, at)

    def plain(q, k, v):
        mask = attend.visible(queries.positions, keys.positions, queries.segments, keys.segments, window)
        return jnp.moveaxis(attend.attend(jnp.moveaxis(q, 1, 3), k, v, mask, 0.7, softcap), 3, 1)

    def both(form, arrays):
        total = lambda *a: (jnp.sum(weights * (out := form(*a)).astype(jnp.float32)), out)
        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), (out, *grads))

    exact = both(plain, jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    monkeypatch.setattr(attend, "BLOCK", block)
    calls = []
    real = attend.attend
    monkeypatch.setattr(
        attend, "attend", lambda q, k, *rest: calls.append((q.shape[3], k.shape[2])) or real(q, k, *rest)
    )
    ours = both(blocked, arrays)
    errors = [np.abs(a - b).max() / max(np.abs(b).max(), 1.0) for a, b in zip(ours, exact, strict=True)]
    return errors[0], max(errors[1:]), calls[0]


WINDOWS, PARTS = (None, 1, 3, 7, 100), ((29, 0, 29), (32, 16, 8), (27, 18, 9))
# Each window with each part; with order and cap such that every pair of two of the four choices is there.
PAIRWISE = [
    ((w + p) % 2 == 0, *part, window, (None, 1.5)[(p + w // 2) % 2])
    for (w, window), (p, part) in product(enumerate(WINDOWS), enumerate(PARTS))
]


@pytest.mark.parametrize("order, length, first, seq, window, softcap", PAIRWISE)
def test_blocks_give_the_plain_forms_values_and_gradients(monkeypatch, order, length, first, seq, window, softcap):
    for rows in (1, 4):
        reach = min(length, 2 * window) if window and order else length
        block = 2 * N * G * reach * rows
        value, gradient, shape = compare(monkeypatch, "float32", block, length, first, seq, window, softcap, order)
        assert value < 1e-5 and gradient < 1e-5
        assert shape[0] == -(-seq // -(-seq // rows))  # it went in blocks,
        assert (shape[1] < length) == (order and window in (1, 3, 7))  # and a window's block saw few keys


@pytest.mark.parametrize("window, softcap", [(None, None), (None, 1.5), (7, None), (3, 1.5)])
def test_blocks_of_bfloat16_are_as_near_to_float32_as_its_rounding(monkeypatch, window, softcap):
    value, gradient, _ = compare(monkeypatch, "bfloat16", 700, 29, 0, 29, window, softcap, True)
    assert value < 1e-2 and gradient < 2e-2
