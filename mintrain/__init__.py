"""mintrain: train Gemma and DeepSeek models, with every array's shape and dtype declared and checked.

Importing the package turns the checks on: jaxtyping annotations on functions and on dataclass fields
are enforced by beartype whenever a function is called, which under `jax.jit` means when it is traced.
They cost nothing once compiled. `JAXTYPING_DISABLE=1` turns them off.
"""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent casts: bfloat16 + float32 is an error
install_import_hook("mintrain", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from mintrain.hf import load_hf  # noqa: E402
from mintrain.step import logits  # noqa: E402

__all__ = ["load_hf", "logits"]
