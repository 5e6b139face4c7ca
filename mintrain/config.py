"""What a run is, as frozen dataclasses. A config file defines `config = Config(...)`; options override it.

Field types are checked when a config is made; rules between fields are in `__post_init__` and, where the
mesh meets the model, in `sharding.validate`. Everything that a user can get wrong raises `ConfigError`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


class ConfigError(ValueError):
    """One line for the person who made the mistake: the field, the value, the remedy. Exit code 2."""


# ------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout."""

    theta: float = 10_000.0
    factor: float = 1.0  # "linear" scaling: frequencies are divided by it
    fraction: float = 1.0  # "proportional" (Gemma 4): the share of the head's frequencies that rotate


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
    q_norm_init: float = 1.0  # what the query norm multiplies with at the start of training; docs/models.md

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ConfigError(f"attention.heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")


@dataclass(frozen=True)
class MLP:
    """Gated MLP: down(act(gate x) * up x)."""

    width: int
    activation: Literal["gelu", "silu"] = "gelu"  # gelu is the tanh approximation


@dataclass(frozen=True)
class Layer:
    attention: Attention
    mlp: MLP
    post_norms: bool = True  # also normalise what attention and MLP add to the residual stream
    scalar: bool = False  # multiply the residual stream by a saved constant (Gemma 4)


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

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for stage in self.stages for _ in range(stage.repeats) for layer in stage.pattern)


def stages(pattern: tuple[Layer, ...], layers: int) -> tuple[Stage, ...]:
    """`layers` layers of a repeated pattern; a last incomplete repeat becomes a stage of its own."""
    repeats, rest = divmod(layers, len(pattern))
    return (Stage(pattern, repeats),) * bool(repeats) + (Stage(pattern[:rest], 1),) * bool(rest)


# -------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis. The batch is split over replica x fsdp x expert."""

    replica: int = 1  # whole copies of the model
    fsdp: int = 1  # parameters and optimizer state are split, weights gathered layer by layer
    expert: int = 1
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
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0  # largest global gradient norm


@dataclass(frozen=True)
class Config:
    model: Annotated[Model, tyro.conf.Fixed]  # changed in a config file, not by options
    mesh: Mesh = Mesh()
    data: Data = Data()
    optim: Optim = Optim()
    run: str = ""  # the folder runs/NAME; empty: the config file's name
    steps: int = 1000
    per_device_batch_size: float = 1.0  # sequences per device and step; below 1, tensor and context share one
    accumulate: int = 1  # microbatches that a step's batch is split into; the numbers do not depend on it
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    scan_layers: bool = True  # False unrolls the same stacked parameters
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes
    z_loss: float = 0.0  # weight of logsumexp², which keeps the logits from drifting (PaLM, arXiv 2204.02311)
    seed: int = 0
    log_every: int = 10
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
        if self.data.seq_len < 1 or self.data.seq_len % self.mesh.context:
            raise ConfigError(f"data.seq_len={self.data.seq_len} is not a multiple of mesh.context={self.mesh.context}")
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
