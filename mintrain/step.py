"""The train step: loss and model inside one `shard_map`, gradient and optimizer around it, all in one jit."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer, PyTree, UInt32

from mintrain import carriers, watch
from mintrain.arrays import check, weights
from mintrain.config import Config
from mintrain.context import collect, deal
from mintrain.layers.router import balanced_bias
from mintrain.layers.splash import on_tpu
from mintrain.lora import adapt
from mintrain.loss import Batch, Counts, Report, local_logits, next_token_loss
from mintrain.model import LM
from mintrain.optim import Rounded, optimizer, schedule, trainable
from mintrain.sharding import BATCH, named, place, specs, state_specs

AnyMesh = Mesh | AbstractMesh
TPU_OPTIONS = {
    # Weights that are read as bfloat16 would become bfloat16 before the first layer, all of them: a second copy.
    "xla_jf_bf16_propagation": "false",
    # What a layer's gradients wait for (carriers.py) they wait for in the schedule too.
    "xla_tpu_aggressive_opt_barrier_removal": "DISABLED",
    # Weights are gathered while the products before them run,
    "xla_enable_async_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # but not so early that they fill the memory (`Config.gather_ahead`).
    "xla_tpu_enable_scheduler_memory_pressure_tracking": "true",
}
OptState = PyTree[Float32[Array, "..."] | Int32[Array, "..."]] | Rounded  # optax's: moments and counts
# Those of layers apart, in the dtype in which they are made (carriers.py).
Gradients = tuple[PyTree[Float32[Array, "..."]], PyTree[Float[Array, "..."]]]
EvalStep = Callable[[LM, Batch], Float32[Array, ""]]


class State(eqx.Module):
    """Everything that a run is at one step; checkpoints hold exactly this."""

    model: LM
    opt: OptState  # moments are trees of the model's type
    step: Int32[Array, ""]  # batches seen
    skipped: Int32[Array, ""]  # updates that were not finite and not applied
    key: UInt32[Array, "2"]  # random numbers of the run


class Metrics(eqx.Module):
    loss: Float32[Array, ""]  # nats per token, of the next token alone
    grad_norm: Float32[Array, ""]  # before clipping
    lr: Float32[Array, ""]
    finite: Bool[Array, ""]
    skipped: Int32[Array, ""]
    mtp_loss: Float32[Array, ""] | None  # nats per token, of the further tokens that are predicted
    balance: Float32[Array, ""] | None  # the routers' balance loss: 1 where all experts are used alike
    expert_load: Float32[Array, ""] | None  # the largest load of an expert relative to the mean of its layer
    indexer_kl: Float32[Array, ""] | None  # nats per token and layer
    seen: watch.Seen | None  # of a watched step


def init_state(cfg: Config, model: LM | None = None) -> State:
    """The state of step 0, of `model` or of a random one. Call it under `jax.eval_shape` or `jax.jit`."""
    key, init = jax.random.split(jax.random.key(cfg.seed))
    if model is None:
        model = LM.init(cfg.model, cfg.compute_dtype, cfg.indexer == "warmup", key=init)
    if cfg.lora.rank:
        model = adapt(model, cfg.lora, key=init)
    trained, _ = eqx.partition(model, trainable(cfg, model))
    opt = optimizer(cfg.optim, cfg.steps, trained).init(trained)
    zero = jnp.zeros((), jnp.int32)
    return State(model, opt, zero, zero, jax.random.key_data(key))


def abstract_model(cfg: Config, mesh: AnyMesh) -> LM:
    """Shapes and layouts of the model, without adapters."""
    shapes = jax.eval_shape(
        lambda: LM.init(cfg.model, cfg.compute_dtype, cfg.indexer == "warmup", key=jax.random.key(0))
    )
    return place(mesh, shapes, specs(shapes))


def abstract_state(cfg: Config, mesh: AnyMesh) -> State:
    """Shapes and layouts of the state, without allocating it."""
    shapes = jax.eval_shape(partial(init_state, cfg))
    return place(mesh, shapes, state_specs(shapes, shapes.model))


def new_state(cfg: Config, mesh: Mesh, model: LM | None = None) -> State:
    """The state of step 0 on its devices. `model`, if there is one, is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    # It runs once: on a CPU, LLVM takes longer to optimise the random number generators than they run.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = partial(init_state, cfg)
    if model is None:
        return jax.jit(init, out_shardings=shardings, compiler_options=options)()
    # Adapters are drawn under a layout that the compiler chooses; what comes out has its own.
    free = jax.sharding.auto_axes(init, out_sharding=shardings)
    return jax.jit(free, out_shardings=shardings, donate_argnums=0)(model)


def abstract_batch(cfg: Config, mesh: AnyMesh) -> Batch:
    shape = (cfg.accumulate, cfg.batch_size // cfg.accumulate, cfg.data.seq_len)
    shapes = jax.eval_shape(lambda: Batch(*[jnp.zeros(shape, jnp.int32)] * 4, jnp.zeros(shape, jnp.float32)))
    return place(mesh, shapes, jax.tree.map(lambda _: BATCH, shapes))


def sharded_loss(
    cfg: Config, mesh: AnyMesh, model: LM, watched: bool = False
) -> Callable[[LM, Batch, Counts], tuple[Array, Report]]:
    """The loss of one microbatch as a function of whole arrays; `model` gives the layouts."""
    loss = partial(
        next_token_loss,
        scan=cfg.scan_layers,
        remat=cfg.remat,
        z_loss=cfg.z_loss,
        mtp_weight=cfg.mtp_weight,
        indexer_only=cfg.indexer == "warmup",
        watched=watched,
    )
    return jax.shard_map(loss, mesh=mesh, in_specs=(specs(model), P(*BATCH[1:]), P()), out_specs=P())


def count(batch: Batch) -> Counts:
    """What the sums over a whole step are divided by."""
    real = jnp.sum(batch.segments > 0, dtype=jnp.float32)
    return Counts(jnp.maximum(jnp.sum(batch.weights), 1.0), jnp.maximum(real, 1.0))


def add(
    total: PyTree[Float32[Array, "..."], "Model"], part: PyTree[Float32[Array, "..."], "Model"]
) -> PyTree[Float32[Array, "..."], "Model"]:
    """Gradients are accumulated in float32."""
    return jax.tree.map(jnp.add, total, part)


def make_train_step(
    cfg: Config, mesh: AnyMesh, watched: bool = False
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The whole step as one jitted function that donates its state. watched: it also tells what its layers hold."""
    abstract = abstract_state(cfg, mesh)
    which = trainable(cfg, abstract.model)
    trained, _ = eqx.partition(abstract.model, which)
    transform, learning_rate = optimizer(cfg.optim, cfg.steps, trained), schedule(cfg.optim, cfg.steps)
    layouts, shapes = specs(trained), carriers.carrier_shapes(trained)
    loss = sharded_loss(cfg, mesh, carriers.carry(abstract.model, shapes), watched)
    loss_and_grad = jax.value_and_grad(
        lambda trained, carried, frozen, *rest: loss(carriers.carry(eqx.combine(trained, frozen), carried), *rest),
        argnums=(0, 1),
        has_aux=True,
    )

    @jax.jit
    @jax.named_scope("optimizer")
    def update(grads: LM, opt: OptState, model: LM) -> tuple[LM, OptState, Float32[Array, ""]]:
        """Also the norm of what is added to the weights."""
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            updates, opt = transform.update(grads, opt, model)
            return optax.apply_updates(model, updates), opt, optax.tree.norm(updates)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        check(state.model)
        counts = count(batch)
        trained, frozen = eqx.partition(state.model, which)

        def microbatch(micro: Batch) -> tuple[Gradients, tuple[Float32[Array, ""], Report]]:
            """The gradients, and the loss with its parts."""
            parts, narrow = loss_and_grad(trained, carriers.zeros(shapes), frozen, micro, counts)
            return narrow, parts

        if cfg.accumulate == 1:  # without a second copy of the gradients to add to
            narrow, (loss, report) = microbatch(jax.tree.map(lambda x: x[0], batch))
        else:

            def accumulate(total: LM, micro: Batch) -> tuple[LM, tuple[Float32[Array, ""], Report]]:
                narrow, parts = microbatch(micro)
                return add(total, carriers.wide(*narrow)), parts

            zeros = carriers.zeros(eqx.filter(abstract.model, which))
            total, parts = jax.lax.scan(accumulate, zeros, batch)
            narrow = total, carriers.layers(total)
            loss, report = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
            report = replace(report, seen=watch.over_microbatches(parts[1].seen))
        grads = carriers.wide(*narrow)
        grad_norm = optax.tree.norm(grads)

        # What tells the layouts apart from here on is the compiler's business (Muon multiplies whole matrices).
        free = jax.sharding.auto_axes(update, out_sharding=named(mesh, (layouts, state_specs(state.opt, trained), P())))
        # The update is made twice, as nothing may be overwritten before all of it is known to be finite.
        again = jax.lax.optimization_barrier((narrow, state.opt, trained))
        _, _, update_norm = free(carriers.wide(*again[0]), again[1], again[2])
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        updated, opt, _ = free(grads, state.opt, trained)
        model = eqx.combine(updated, frozen)
        if cfg.indexer == "sparse" and not cfg.lora.rank:
            model = balance_experts(model, report)
        keep = lambda new, old: jnp.where(finite, new, old)
        new = State(
            model=jax.tree.map(keep, model, state.model),
            opt=jax.tree.map(keep, opt, state.opt),
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            key=state.key,
        )
        lr = learning_rate(state.step - state.skipped)
        seen = watch.Seen(report.seen, report.load, *watch.gradient_norms(grads, cfg.model)) if watched else None
        return new, metrics(report, counts, grad_norm, lr, finite, new.skipped, seen)

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options(mesh, cfg.gather_ahead))


def compiler_options(mesh: AnyMesh, gather_ahead: int = Config.gather_ahead) -> dict[str, str] | None:
    limit = {"xla_tpu_scheduler_percent_shared_memory_limit": str(gather_ahead)}
    return TPU_OPTIONS | limit if on_tpu(mesh.abstract_mesh) else None


def balance_experts(model: LM, report: Report) -> LM:
    """Move every selection bias by its rate, against the load of this step."""
    routers = [(block.moe.router, load) for block, load in zip(model.blocks, report.load, strict=True) if block.moe]
    moved = iter([balanced_bias(r.bias, load, r.cfg.bias_rate) for r, load in routers if r.bias is not None])
    leaves = [next(moved) if weight.path.endswith("router.bias") else weight.value for weight in weights(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def metrics(
    report: Report,
    counts: Counts,
    grad_norm: Float32[Array, ""],
    lr: Float32[Array, ""],
    finite: Bool[Array, ""],
    skipped: Int32[Array, ""],
    seen: watch.Seen | None,
) -> Metrics:
    mean = lambda total, count: None if total is None else total / count
    loads = [load for load in report.load if load is not None]
    relative = [jnp.max(x / jnp.maximum(jnp.mean(x, axis=-1, keepdims=True), 1e-9)) for x in loads]
    return Metrics(
        loss=report.nll / counts.targets,
        grad_norm=grad_norm,
        lr=lr,
        finite=finite,
        skipped=skipped,
        mtp_loss=mean(report.mtp_nll, counts.targets),
        balance=mean(report.balance, counts.tokens),
        expert_load=jnp.max(jnp.stack(relative)) if relative else None,
        indexer_kl=mean(report.indexer_kl, counts.tokens),
        seen=seen,
    )


def make_eval_step(cfg: Config, mesh: AnyMesh) -> EvalStep:
    """The summed negative log-likelihood of a batch, in nats."""
    loss = sharded_loss(cfg, mesh, abstract_state(cfg, mesh).model)

    def eval_step(model: LM, batch: Batch) -> Float32[Array, ""]:
        _, nll = jax.lax.scan(lambda _, micro: (None, loss(model, micro, count(batch))[1].nll), None, batch)
        return jnp.sum(nll)

    return jax.jit(eval_step, compiler_options=compiler_options(mesh))


def logits(
    model: LM,
    tokens: Integer[Array, "batch seq"] | Integer[np.ndarray, "batch seq"],
    positions: Int32[Array, "batch seq"] | None = None,
    segments: Int32[Array, "batch seq"] | None = None,
) -> Float32[Array, "batch seq vocab"]:
    """The next-token logits of whole sequences, on the mesh that the model lies on.

    Without positions and segments each row is one document. The batch must divide by the mesh's
    replica x fsdp x expert, and the sequence by context.
    """
    mesh = model.norm.scale.sharding.mesh
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    if segments is None:
        segments = np.ones(tokens.shape, np.int32)
    inputs = jax.device_put((tokens.astype(np.int32), positions, segments), NamedSharding(mesh, P(*BATCH[1:])))
    return _sharded_logits(mesh, specs(model))(model, *inputs)


@cache
def _sharded_logits(mesh: Mesh, layouts: LM) -> Callable[..., Float32[Array, "batch seq vocab"]]:
    tokens = P(*BATCH[1:])

    def forward(model: LM, *inputs: Int32[Array, "batch seq"]) -> Float32[Array, "batch seq vocab"]:
        x, *_ = model(*map(deal, inputs))
        x = collect(rearrange(x, "(b s) d -> b s d", b=inputs[0].shape[0]))
        return local_logits(model, x)

    sides = dict(in_specs=(layouts, tokens, tokens, tokens), out_specs=P(*tokens, "tensor"))
    return jax.jit(jax.shard_map(forward, mesh=mesh, **sides), compiler_options=compiler_options(mesh))
