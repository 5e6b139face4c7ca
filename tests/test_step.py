"""Training: every mesh gives the numbers of one device, bad updates are skipped, and the loss is what it says."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mintrain import logits, loss, sharding, step
from mintrain.config import Mesh, Optim
from mintrain.optim import schedule

MUON = dataclasses.replace(tiny.CONFIG, optim=dataclasses.replace(tiny.CONFIG.optim, name="muon"))
FIRST_FOUR = np.arange(8)[:, None] < 4


class Run:
    """A compiled train step and the state that it starts from, which is the same on every mesh."""
'''+'''
