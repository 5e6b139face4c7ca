"""What a run is, as frozen dataclasses. A config file defines `config = Config(...)`; options override it.

Field types are checked when a config is made; rules between fields are in `__post_init__` and, where the
mesh meets the model, in `sharding.validate`. Everything that a user can get wrong raises `ConfigError`.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from jaxtyping import TypeCheckError


class ConfigError(ValueError):
    """One line for the person who made the mistake: the field, the value, the remedy. Exit code 2."""


def wrong_type(error: TypeCheckError) -> str:
    """The field, the value and the declared type, in one line."""
    field = re.search(r"parameter '(\w+)'.\n?Actual value: (.*)\nExpected type: (.*)", str(error))
    if field is None:
        return str(error).splitlines()[0]
    declared = re.sub(r"<class '(.*)'>", r"\1", field[3].rstrip("."))
    return f"{field[1]}={field[2]} is not of type {declared}"


# ------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Yarn:
    """Longer contexts than the model was trained on (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float
    original: int  # the context before
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # both also scale the attention logits; layers/rope.py
    mscale_all_dim: float = 1.0
    attention_factor: float | None = None  # instead of what `mscale` and `mscale_all_dim` make; the logits' stays
    truncate: bool = True  # the ramp begins and ends at whole dims


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

    theta: float = 10_000.0
    factor: float = 1.0  # "linear" scaling: frequencies are divided by it
    fraction: float = 1.0  # "proportional" (Gemma 4): the share of the head's frequencies that rotate
    yarn: Yarn | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: what Gemma 2, 3 and 4 differ in."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies q·k
    rope: Rope = Rope()
    window: int | None = None  # keys seen, the token itself included; None sees all
    softcap: float | None = None  # cap * tanh(logits / cap)
    qk_norm: bool = False
    v_norm: bool = False  # without a scale
    k_is_v: bool = False  # values are the raw keys, no value projection
    shares_kv: bool = (
        False  # keys and values are those of the last layer of its kind, local or global, that has own ones
    )
    q_norm_init: float = 1.0  # what the query norm multiplies with at the start of training; docs/models.md

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ConfigError(f"attention.heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    @property
    def kind(self) -> Literal["local", "global"]:
        return "global" if self.window is None else "local"


@dataclass(frozen=True)
class Indexer:
    """DeepSeek-V3.2's lightning indexer (arXiv 2512.02556): which keys a query attends to."""

    heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed key and value for all heads."""

    heads: int
    q_lora: int | None  # None: a plain query projection
    kv_lora: int
    nope: int  # width of a head's query and key without position
    rope_dim: int  # and with it: one key for all heads
    v: int
    rope: Rope = Rope()
    indexer: Indexer | None = None

    def __post_init__(self):
        if self.indexer is not None and self.q_lora is None:
            raise ConfigError("mla.q_lora=None leaves the indexer without an input; give it a rank")
        if self.indexer is not None and self.indexer.head_dim < self.rope_dim:
            raise ConfigError(f"indexer.head_dim={self.indexer.head_dim} is below rope_dim={self.rope_dim}; widen it")


@dataclass(frozen=True)
class MLP:
    """Gated MLP: down(act(gate x) * up x)."""

    width: int
    activation: Literal["gelu", "silu"] = "gelu"  # gelu is the tanh approximation


@dataclass(frozen=True)
class MoE:
    """Routed experts, each a gated MLP. Shared experts are the layer's `mlp`, which runs beside them."""

    experts: int
    topk: int
    width: int  # of one expert
    activation: Literal["gelu", "silu"] = "silu"
    score: Literal["softmax", "sigmoid"] = "softmax"  # of the router logits
    groups: int = 1  # only experts of the best `kept_groups` groups are chosen
    kept_groups: int = 1
    normalise: bool = False  # the weights of the chosen experts sum to 1, before `scaling`
    scaling: float = 1.0
    learned_scales: bool = False  # Gemma 4: a normalised, scaled router input, and a learned factor for each expert
    bias_rate: float | None = None  # the step of the selection bias that balances the load (V3); None has no bias
    balance: float = 0.0  # weight of the sequence-wise balance loss

    def __post_init__(self):
        if not 1 <= self.kept_groups <= self.groups or self.experts % self.groups:
            raise ConfigError(
                f"moe.groups={self.groups}, kept_groups={self.kept_groups} do not split experts={self.experts}; "
                "use a divisor, and keep at most as many"
            )
        if not 1 <= self.topk <= self.experts // self.groups * self.kept_groups:
            raise ConfigError(
                f"moe.topk={self.topk} is not between 1 and the {self.experts // self.groups * self.kept_groups} "
                f"experts that {self.kept_groups} of {self.groups} groups have"
            )


@dataclass(frozen=True)
class Layer:
    attention: Attention | MLA
    mlp: MLP | None
    moe: MoE | None = None  # beside the mlp, or instead of it
    post_norms: bool = True  # also normalise what attention and MLP add to the residual stream (Gemma)
    scalar: bool = False  # multiply the residual stream by a saved constant (Gemma 4)

    def __post_init__(self):
        if self.mlp is None and self.moe is None:
            raise ConfigError("layer.mlp=None and layer.moe=None: a layer needs one of them")


@dataclass(frozen=True)
class Stage:
    """`pattern` repeated: Gemma 3 is (5 local + 1 global) x 4 and 2 local. The repeats are scanned."""

    pattern: tuple[Layer, ...]
    repeats: int = 1


@dataclass(frozen=True)
class Model:
    vocab: int
    embed: int
    stages: tuple[Stage, ...]
    norm_offset: float = 0.0  # norms multiply by (offset + scale); Gemma 2 and 3 store scales around zero
    norm_eps: float = 1e-6
    embed_scale: bool = True  # embeddings are multiplied by sqrt(embed)
    tied: bool = True  # the output head is the embedding table
    final_softcap: float | None = None
    per_layer_input: int = 0  # width of what every layer gets from a second embedding table (Gemma 4 E2B, E4B)
    mtp: tuple[Layer, ...] = ()  # multi-token prediction: the layer of each further token that is predicted (V3)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for stage in self.stages for _ in range(stage.repeats) for layer in stage.pattern)

    @property
    def indexed(self) -> bool:
        """Whether attention is sparse."""
        return any(isinstance(layer.attention, MLA) and layer.attention.indexer for layer in self.layers)

    def __post_init__(self):
        own = set()
        for stage in self.stages:
            attentions = [layer.attention for layer in stage.pattern if isinstance(layer.attention, Attention)]
            for attention in attentions:
                if attention.shares_kv and attention.kind not in own:
                    raise ConfigError(
                        f"a {attention.kind} layer has shares_kv=True, but no earlier stage has a layer of that kind "
                        "with keys of its own; let one come before"
                    )
            own |= {attention.kind for attention in attentions if not attention.shares_kv}


def stages(layers: tuple[Layer, ...]) -> tuple[Stage, ...]:
    """Layers as repeated patterns: at each place the one that covers most, the shortest of those.

    (dense,) * 3 + (moe,) * 58 is two stages; five local and one global layer, ten times, is one of ten repeats.
    """
    result = []
    while layers:
        period, repeats = 1, 1
        for p in range(1, len(layers) // 2 + 1):
            r = next(r for r in range(1, len(layers) + 1) if layers[r * p : (r + 1) * p] != layers[:p])
            if r > 1 and p * r > period * repeats:
                period, repeats = p, r
        result.append(Stage(layers[:period], repeats))
        layers = layers[period * repeats :]
    return tuple(result)


# -------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis. The batch is split over replica x fsdp x expert."""

    replica: int = 1  # whole copies of the model
    fsdp: int = 1  # parameters and optimizer state are split, weights gathered layer by layer
    expert: int = 1  # routed experts are split; all other weights as over fsdp
    context: int = 1  # the sequence is split
    tensor: int = 1  # heads, MLP width and vocabulary are split

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.replica, self.fsdp, self.expert, self.context, self.tensor)

    @property
    def devices(self) -> int:
        total = 1
        for size in self.sizes:
            total *= size
        return total

    def __post_init__(self):
        for name, size in zip(("replica", "fsdp", "expert", "context", "tensor"), self.sizes, strict=True):
            if size < 1:
                raise ConfigError(f"mesh.{name}={size} is not a number of devices; use 1 or more")


@dataclass(frozen=True)
class Data:
    path: str = "shakespeare"  # a file .txt, .jsonl (a "text" per line; also .xz) or .bin (token ids)
    heldout_path: str | None = None  # the same kinds; None holds out heldout_fraction of path
    heldout_fraction: float = 0.05  # whole documents from the end, or the end of a single document
    tokenizer: str = "shakespeare"  # a file .json (tokenizers) or .model (sentencepiece), or "bytes"
    seq_len: int = 256


@dataclass(frozen=True)
class Optim:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan 2024, for matrices) after clipping the global norm."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2  # wsd: the last share of the run, falling linearly
    final_lr: float = 0.1  # the last learning rate, relative to the peak
    b1: float = 0.9
    b2: float = 0.95  # also Muon's momentum
    eps: float = 1e-8
    moments: Literal["float32", "bfloat16"] = "float32"  # as kept between steps; updates are computed in float32
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0  # largest global gradient norm, of the model and of its indexers

    def __post_init__(self):
        if self.lr <= 0 or self.clip <= 0:
            raise ConfigError(f"optim.lr={self.lr}, optim.clip={self.clip} trains nothing; both must be above 0")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the layers' matrices, trained instead of the model; `lora.py`."""

    rank: int = 0  # 0: none, the model is trained
    alpha: float = 16.0  # the term is multiplied by alpha / rank

    def __post_init__(self):
        if self.rank < 0:
            raise ConfigError(f"lora.rank={self.rank} is no rank; use 8, or 0 for none")


@dataclass(frozen=True)
class Config:
    model: Annotated[Model, tyro.conf.Fixed]  # changed in a config file, not by options
    mesh: Mesh = Mesh()
    data: Data = Data()
    optim: Optim = Optim()
    lora: Lora = Lora()
    init_from: str = ""  # a Hugging Face folder or a run, whose weights training starts from; empty: random ones
    run: str = ""  # the folder runs/NAME; empty: the config file's name
    steps: int = 1000
    per_device_batch_size: float = 1.0  # sequences per device and step; below 1, tensor and context share one
    accumulate: int = 1  # microbatches that a step's batch is split into; the numbers do not depend on it
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    scan_layers: bool = True  # False unrolls the same stacked parameters
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes
    gather_ahead: int = 90  # percent of a TPU's memory up to which weights are gathered before they are needed
    indexer: Literal["warmup", "sparse"] = "sparse"  # stage of sparse attention; warmup trains the indexer alone
    mtp_weight: float = 0.3  # of the mean loss of the further tokens that `model.mtp` predicts
    z_loss: float = 0.0  # weight of logsumexp², which keeps the logits from drifting (PaLM, arXiv 2204.02311)
    seed: int = 0
    log_every: int = 10
    watch_every: int = 0  # steps between looks into the layers (watch.py): logits, norms, entropy, load; 0: none
    eval_every: int = 250
    eval_batches: int = 100  # at most this many batches of the held-out text
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    max_nonfinite: int = 3  # steps in a row with a loss or gradient that is not finite before the run stops
    sample_prompt: str = "\n"  # what each evaluation continues
    sample_tokens: int = 128  # 0: no samples

    @property
    def batch_size(self) -> int:
        """Sequences per step, all devices and microbatches together."""
        return round(self.per_device_batch_size * self.mesh.devices)

    def __post_init__(self):
        exact = self.per_device_batch_size * self.mesh.devices
        if abs(exact - round(exact)) > 1e-6 or round(exact) < 1:
            raise ConfigError(
                f"per_device_batch_size={self.per_device_batch_size} on {self.mesh.devices} devices is {exact:g} "
                f"sequences a step; use a multiple of {1 / self.mesh.devices:g}"
            )
        shards = self.mesh.replica * self.mesh.fsdp * self.mesh.expert
        if self.accumulate < 1 or self.batch_size % (shards * self.accumulate):
            raise ConfigError(
                f"per_device_batch_size={self.per_device_batch_size:g} makes a batch of {self.batch_size} sequences, "
                f"which mesh.replica x mesh.fsdp x mesh.expert = {shards} times accumulate = {self.accumulate} "
                f"does not divide; use a multiple of {shards * self.accumulate / self.mesh.devices:g}"
            )
        parts = 2 * self.mesh.context if self.mesh.context > 1 else 1  # context.py
        if self.data.seq_len < 1 or self.data.seq_len % parts:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is not a multiple of {parts}, twice mesh.context={self.mesh.context}"
            )
        if self.indexer == "warmup" and not self.model.indexed:
            raise ConfigError("indexer=warmup trains nothing: no layer of this model has an indexer; use sparse")
        if self.lora.rank and not self.init_from:
            raise ConfigError(f"lora.rank={self.lora.rank} adapts random weights; give the weights with --init_from")
        if self.lora.rank and self.indexer == "warmup":
            raise ConfigError("lora.rank and indexer=warmup train different things; use one of them")
        if self.model.mtp and self.mtp_weight <= 0:
            raise ConfigError(f"mtp_weight={self.mtp_weight} trains nothing in model.mtp; use 0.3, or mtp=()")
        if not 0 < self.gather_ahead <= 100:
            raise ConfigError(
                f"gather_ahead={self.gather_ahead} is no percentage of the memory; use 90, or less to save"
            )
        if self.watch_every < 0:
            raise ConfigError(f"watch_every={self.watch_every} is no number of steps; use 10, or 0 for none")
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
