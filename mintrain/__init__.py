"""mintrain: train Gemma and DeepSeek models, with every array's shape and dtype declared and checked.

Importing the package turns the checks on: jaxtyping annotations on functions and on dataclass fields
are enforced by beartype whenever a function is called, which under `jax.jit` means when it is traced.
They cost nothing once compiled. `JAXTYPING_DISABLE=1` turns them off.
"""

import importlib

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent casts: bfloat16 + float32 is an error
install_import_hook("mintrain", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

EXPORTED = {"load_hf": "mintrain.hf", "save_hf": "mintrain.hf", "logits": "mintrain.step"}


def __getattr__(name: str) -> object:
    """Imported when it is asked for, so that `python -m mintrain.hf` finds its module fresh."""
    if name not in EXPORTED:
        raise AttributeError(f"module 'mintrain' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTED[name]), name)
