"""Generation with caches against transformers' own continuations, and against the model without caches."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mintrain import generate, load_hf, logits, sharding
from mintrain.config import ConfigError, Mesh
from mintrain.generate import Sampling
from mintrain.layers.cache import KV, append

HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in (HERE / "cases").iterdir())
GREEDY = Sampling(temperature=0)
NEW = 16  # tokens that the references continue by


def continued(model, prompts):
    """Greedy tokens and their logits."""
    steps = list(generate.stream(model, prompts, NEW, GREEDY))
    return np.array([tokens for tokens, _ in steps]).T, np.stack([np.asarray(x) for _, x in steps], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers_alone_in_a_batch_and_on_a_mesh(name, monkeypatch):
    """Alone on one device, in one chunk; beside shorter prompts on four, in three chunks that a window's ring spans."""
    folder = HERE / "cases" / name
    reference = load_file(folder / "reference.safetensors")
    ids, expected = reference["input_ids"], reference["greedy.tokens"]
    prompts = [*ids.tolist(), ids[0, 30:].tolist(), ids[1, :25].tolist()]
    model = load_hf(folder)
    alone = [continued(model, [prompt]) for prompt in prompts[1:3]]

    monkeypatch.setattr(generate, "CHUNK", 20)
    one_key_head = name.startswith("gemma4")  # which `tensor` cannot split
    mesh = Mesh(fsdp=2, **{"context" if one_key_head else "tensor": 2})
    tokens, ours = continued(load_hf(folder, mesh=mesh), prompts)
    np.testing.assert_array_equal(tokens[:2], expected)
    np.testing.assert_array_equal(tokens[1:3], np.concatenate([tokens for tokens, _ in alone]))
    np.testing.assert_allclose(ours[1:3], np.concatenate([x for _, x in alone]), rtol=0, atol=1e-4)

    text = np.zeros((4, 48 + NEW), np.int32)
    for row, prompt, made in zip(text, prompts, tokens, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *made]
    uncached = np.asarray(logits(model, text))
    for row, prompt, cached in zip(uncached, prompts, ours, strict=True):
        np.testing.assert_allclose(cached, row[len(prompt) - 1 : len(prompt) + NEW - 1], rtol=0, atol=1e-4)


def test_a_window_keeps_a_ring_and_a_layer_that_shares_keeps_nothing():
    def caches(length):
        made = generate.new_caches(sharding.make_mesh(Mesh()), tiny.GEMMA4, "bfloat16", 3, length, 4)()
        return [kept for stage in made.stages for kept in stage]

    local, globe, *shared = caches(64)
    assert local.k.shape == caches(16)[0].k.shape == (1, 3, 4, 5 + 3, 10)  # the window and the rest of a chunk
    assert globe.k.shape == (1, 3, 2, 64, 14) and globe.k.dtype == jnp.bfloat16
    assert shared == [None, None]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(4, 9))
def test_a_cache_holds_the_last_tokens_of_each_row(lengths, slots):
    """Chunks of 0 to 4 tokens, padded on the left, into a ring; against a list of all tokens."""
    empty = jnp.zeros((1, slots), jnp.int32)
    keys = jnp.zeros((1, 2, slots, 3), jnp.float32)
    cache, seen = KV(keys, keys, empty, empty), 0
    for length in lengths:
        positions = np.maximum(np.arange(4) - (4 - length) + seen, 0)[None].astype(np.int32)
        real = (np.arange(4) >= 4 - length).astype(np.int32)[None]
        k = jnp.broadcast_to(jnp.asarray(positions, jnp.float32)[:, None, :, None] + 100, (1, 2, 4, 3))
        cache = append(cache, KV(k, -k, jnp.asarray(positions), jnp.asarray(real)))
        seen += length
    cache = jax.tree.map(np.asarray, cache)
    held = {int(p) for p, s in zip(cache.positions[0], cache.segments[0], strict=True) if s}
    assert held == set(range(max(seen - slots, 0), seen))
    for slot in range(slots):
        value = 100 + cache.positions[0, slot] if cache.segments[0, slot] else 0
        assert np.all(cache.k[0, :, slot] == value) and np.all(cache.v[0, :, slot] == -value)


def test_a_row_ends_at_its_stop_token_while_others_go_on():
    model = tiny.new_model()
    prompts = [[1, 2, 3], [40, 5]]
    (first, second) = generate.generate(model, prompts, 12, GREEDY)
    stop = first[4]
    cut = first.index(stop)
    ours = generate.generate(model, prompts, 12, GREEDY, stop=[stop])
    assert ours[0] == first[:cut]
    assert ours[1] == (second[: second.index(stop)] if stop in second else second)
    assert generate.generate(model, prompts[:1], 12, GREEDY, stop=range(74)) == [[]]


def test_the_same_seed_draws_the_same_and_another_seed_draws_something_else():
    model, drawn = tiny.new_model(), {}
    for seed in (0, 1):
        drawn[seed] = generate.generate(model, [[1, 2, 3], [1, 2, 3]], 12, Sampling(temperature=2.0), seed=seed)
    assert drawn[0] == generate.generate(model, [[1, 2, 3]] * 2, 12, Sampling(temperature=2.0), seed=0)
    assert drawn[0] != drawn[1] and drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("prompt", [[], [74], [-1]])
def test_a_prompt_that_is_empty_or_beyond_the_vocabulary_is_refused(prompt):
    with pytest.raises(ConfigError, match="empty or beyond"):
        generate.generate(tiny.new_model(), [[1], prompt], 2)


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(min_p=2.0)])
def test_a_distribution_that_is_none_is_refused(options):
    with pytest.raises(ConfigError, match="cannot be drawn from"):
        Sampling(**options)


SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)


@settings(deadline=None, max_examples=40)
@given(SAMPLING, st.integers(0, 2**31))
def test_the_filters_keep_what_those_of_transformers_keep(sampling, seed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values = np.random.default_rng(seed).normal(scale=3, size=(2, 11)).astype(np.float32)
    theirs = transformers.TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(values))
    if sampling.top_k:
        theirs = transformers.TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = transformers.TopPLogitsWarper(sampling.top_p)(None, theirs)
    if sampling.min_p > 0:
        theirs = transformers.MinPLogitsWarper(sampling.min_p)(None, theirs)
    np.testing.assert_allclose(generate.restrict(jnp.asarray(values), sampling), theirs.numpy(), rtol=1e-5)


def test_tokens_are_drawn_with_their_probabilities():
    probability = np.array([0.5, 0.25, 0.2, 0.05], np.float32)
    rows = jnp.broadcast_to(jnp.log(probability)[None], (4000, 4))
    drawn = generate.draw(rows, jnp.zeros(4000, jnp.int32), jax.random.key(0), Sampling())
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, probability, atol=0.03)
    drawn = generate.draw(rows, jnp.zeros(4000, jnp.int32), jax.random.key(0), Sampling(top_k=2))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [2 / 3, 1 / 3, 0, 0], atol=0.03)
