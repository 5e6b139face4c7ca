"""Text from a model: `generate`, `stream`, and `python -m mintrain.generate RUN_OR_FOLDER --prompt "..."`.

A prompt goes through the model in chunks that fill the caches, then every token is one step. Both are one function,
`advance`, compiled for two lengths. Prompts of a batch end together: the shorter ones are padded on the left.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from einops import rearrange
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32, PRNGKeyArray

from mintrain import chat, load, options
from mintrain.config import ConfigError, Mesh, Model
from mintrain.layers.cache import empty
from mintrain.loss import local_logits
from mintrain.model import LM, Caches
from mintrain.sharding import ALL_TOKENS, AXES, BATCH, named, specs
from mintrain.step import compiler_options

CHUNK = 128  # tokens of a prompt that go through the model at once
SHORT = 16  # prompts up to this length go one by one, which saves compiling the chunk
ROUND = 128  # caches are a multiple of it long, so that texts of similar length share a program


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in this order, each to what the ones before it left."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the fewest that together have this probability (Holtzman et al. 2019, arXiv 1904.09751)
    min_p: float = 0.0  # only those at least this likely, relative to the most likely (arXiv 2407.01082)

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ConfigError(
                f"{self} cannot be drawn from; use temperature >= 0, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1"
            )


def restrict(logits: Float32[Array, "batch vocab"], sampling: Sampling) -> Float32[Array, "batch vocab"]:
    """Logits after temperature and filters, -inf for tokens that cannot be drawn."""
    logits = logits / sampling.temperature
    keep = lambda least: jnp.where(logits >= least, logits, -jnp.inf)
    if 0 < sampling.top_k < logits.shape[1]:
        logits = keep(jax.lax.top_k(logits, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=1, descending=True)
        likely = jax.nn.softmax(ordered, axis=1)
        before = jnp.cumsum(likely, axis=1) - likely
        logits = keep(jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=1, keepdims=True))
    if sampling.min_p > 0:
        logits = keep(jnp.max(logits, axis=1, keepdims=True) + math.log(sampling.min_p))
    return logits


def draw(
    logits: Float32[Array, "batch vocab"], positions: Int32[Array, "batch"], key: PRNGKeyArray, sampling: Sampling
) -> Int32[Array, "batch"]:
    """The next tokens. The random numbers depend on the row and the position alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    fold = lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
    keys = jax.vmap(fold)(jnp.arange(logits.shape[0]), positions)
    return jax.vmap(jax.random.categorical)(keys, restrict(logits, sampling)).astype(jnp.int32)


def decoding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same devices, those along `context` counted as replicas: one token of a sequence cannot be split."""
    devices = np.moveaxis(mesh.devices, AXES.index("context"), 0)
    return DeviceMesh(devices.reshape(-1, *devices.shape[2:4], 1, devices.shape[4]), AXES, axis_types=mesh.axis_types)


@cache
def new_caches(mesh: DeviceMesh, c: Model, dtype: str, batch: int, length: int, chunk: int) -> Callable[[], Caches]:
    """A function that makes empty caches on their devices."""

    def make() -> Caches:
        stages = []
        for stage in c.stages:
            kept = tuple(empty(layer.attention, batch, length, chunk, jnp.dtype(dtype)) for layer in stage.pattern)
            stages.append(jax.tree.map(lambda x, n=stage.repeats: jnp.broadcast_to(x[None], (n, *x.shape)), kept))
        return Caches(tuple(stages))

    return jax.jit(make, out_shardings=named(mesh, specs(jax.eval_shape(make))))


@cache
def make_advance(mesh: DeviceMesh, layouts: LM, cache_layouts: Caches, sampling: Sampling) -> Callable[..., tuple]:
    """`advance(model, caches, (tokens, positions, segments), key)`: the next tokens, their logits, the caches."""
    tokens = P(*BATCH[1:])

    def forward(
        model: LM,
        caches: Caches,
        tokens: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
        segments: Int32[Array, "batch seq"],
    ) -> tuple[Float32[Array, "batch vocab"], Caches]:
        x, _, caches = model(tokens, positions, segments, caches=caches)
        return local_logits(model, rearrange(x, "(b s) d -> b s d", b=tokens.shape[0])[:, -1]), caches

    inside = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(layouts, cache_layouts, tokens, tokens, tokens),
        out_specs=(P(ALL_TOKENS, "tensor"), cache_layouts),
    )

    def advance(
        model: LM,
        caches: Caches,
        inputs: tuple[Int32[Array, "batch seq"], Int32[Array, "batch seq"], Int32[Array, "batch seq"]],
        key: PRNGKeyArray,
    ) -> tuple[Int32[Array, "batch 1"], Float32[Array, "batch vocab"], Caches]:
        placed = jax.sharding.reshard(inputs, NamedSharding(mesh, tokens))
        logits, caches = inside(model, caches, *placed)
        logits = jax.sharding.reshard(logits, NamedSharding(mesh, P()))
        return draw(logits, inputs[1][:, -1], key, sampling)[:, None], logits, caches

    return jax.jit(advance, donate_argnums=1, compiler_options=compiler_options(mesh))


def stream(
    model: LM,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = Sampling(),
    *,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Iterator[tuple[list[int | None], Float32[Array, "prompt vocab"]]]:
    """Yield the next token of every prompt and the logits it was drawn from, on the mesh that the model lies on.

    Ends after `tokens` of them, or when all prompts have met a token of `stop`; None stands for one that has. Raises
    ConfigError for an empty prompt or a token that is not in the vocabulary.
    """
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= model.cfg.vocab:
            raise ConfigError(f"the prompt {list(prompt)[:8]} is empty or beyond model.vocab={model.cfg.vocab}")
    mesh = decoding_mesh(model.norm.scale.sharding.mesh)
    layouts = specs(model)
    model = jax.device_put(model, named(mesh, layouts))
    longest, shards = max(map(len, prompts)), mesh.size // mesh.shape["tensor"]
    chunk = 1 if longest <= SHORT else CHUNK
    width, batch = -(-longest // chunk) * chunk, -(-len(prompts) // shards) * shards
    length = -(-(longest + tokens) // ROUND) * ROUND
    caches = new_caches(mesh, model.cfg, model.compute_dtype, batch, length, chunk)()
    advance = make_advance(mesh, layouts, jax.tree.map(lambda x: x.sharding.spec, caches), sampling)
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=NamedSharding(mesh, P()))(seed)

    ids = np.zeros((batch, width), np.int32)
    lengths = np.zeros((batch, 1), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], lengths[row] = prompt, len(prompt)
    positions = np.arange(width, dtype=np.int32)[None] - (width - lengths)
    real = (positions >= 0).astype(np.int32)
    positions = np.maximum(positions, 0)
    token = logits = None
    for at in range(0, width, chunk):
        inputs = tuple(x[:, at : at + chunk] for x in (ids, positions, real))
        token, logits, caches = advance(model, caches, inputs, key)

    ended = np.zeros(len(prompts), bool)
    for at in range(tokens):
        following = None, None
        if at + 1 < tokens:  # the device works on the next token while this one is read
            *following, caches = advance(model, caches, (token, lengths + at, real[:, -1:]), key)
        read = np.asarray(token)[: len(prompts), 0]
        ended |= np.isin(read, stop)
        if ended.all():
            return
        yield [None if end else int(one) for end, one in zip(ended, read, strict=True)], logits[: len(prompts)]
        token, logits = following


def generate(
    model: LM,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = Sampling(),
    *,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """What follows each prompt, as `stream` makes it."""
    steps = [step for step, _ in stream(model, prompts, tokens, sampling, seed=seed, stop=stop)]
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


@dataclass(frozen=True)
class Command:
    folder: tyro.conf.Positional[str]  # of a run or of a Hugging Face checkpoint
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # once or several times; they go through the model together
    chat: bool = False  # the prompts are a user's messages, in the tokenizer's chat template
    tokens: int = 128
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    dtype: Literal["", "float32", "bfloat16"] = ""  # in which it computes; empty: what the folder says


def run(cmd: Command) -> None:
    """Print every prompt with what follows it; a single one while it is made."""
    model, tokenizer = load.load(Path(cmd.folder), cmd.mesh, cmd.dtype)
    texts = cmd.prompt or ("\n",)
    if cmd.chat:
        prompts = [chat.prompt_ids(tokenizer, text) for text in texts]
    else:
        prompts = [[tokenizer.bos, *ids] for ids in tokenizer.encode(list(texts))]
    made: list[list[int]] = [[] for _ in prompts]
    shown, times = "", [time.perf_counter()]
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
    for step, _ in stream(model, prompts, cmd.tokens, cmd.sampling, seed=cmd.seed, stop=tokenizer.stop):
        times.append(time.perf_counter())
        for row, token in zip(made, step, strict=True):
            row.extend([] if token is None else [token])
        if len(texts) == 1:
            text = tokenizer.decode(made[0])
            if not text.endswith("\ufffd"):  # the rest of a character is still to come
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print("\n" if len(texts) == 1 else "\n\n".join(t + tokenizer.decode(m) for t, m in zip(texts, made, strict=True)))
    steps = len(times) - 3  # the first two waited for the compiler
    rate = f", then {len(texts) * steps / (times[-1] - times[2]):.1f} tokens/s" if steps > 0 else ""
    first = times[min(2, len(times) - 1)] - times[0]
    print(f"{sum(map(len, made))} tokens; {first:.1f}s to compile and read the prompt{rate}", file=sys.stderr)


def main(argv: list[str]) -> int:
    try:
        run(options.parse(Command, argv, None, "python -m mintrain.generate", "Continue a text, or answer a message."))
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
