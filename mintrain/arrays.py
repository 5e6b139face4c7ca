"""One annotation per weight says its dtype, its named shape and, through `sharding.LAYOUT`, its layout.

A weight is a field such as `gate: Float32[Array, "embed ff"]` of an Equinox module. `weights` reads the
annotations back. A module inside a scanned stage has the same annotations and leading axes on its arrays.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import equinox as eqx


class Weight(NamedTuple):
    path: str  # such as "stages[0][5].attention.q"
    dtypes: tuple[str, ...]  # what the annotation allows
    dims: tuple[str, ...]  # the names in the annotation, without the leading axes of a stage
    buffer: bool  # saved with the model, but not trained and not counted as a parameter
    value: Any  # an array, a jax.ShapeDtypeStruct, or whatever the leaf was replaced by

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The dims that a matrix sums over and those that it makes; experts and pairs are separate matrices.

        "heads head embed" writes the residual stream; the others read their first dim. None: no matrix of a layer.
        """
        dims = tuple(dim for dim in self.dims if dim not in ("experts", "pair"))
        if len(dims) < 2 or "vocab" in dims:
            return None
        split = len(dims) - 1 if dims[-1] == "embed" else 1
        return dims[:split], dims[split:]

    @property
    def stacked(self) -> int:
        """The number of leading axes that a stage added."""
        return len(self.value.shape) - len(self.dims)


def buffer() -> Any:
    """A field that is saved with the model, but is no parameter: the optimizer leaves it as it is."""
    return eqx.field(metadata={"buffer": True})


def weights(module: eqx.Module, path: str = "") -> Iterator[Weight]:
    """The weights of `module`, in the order of `jax.tree.leaves`."""
    for field in dataclasses.fields(module):
        if not field.metadata.get("static", False):
            name = f"{path}.{field.name}" if path else field.name
            yield from _walk(module, getattr(module, field.name), field, name)


def _walk(owner: eqx.Module, value: Any, field: dataclasses.Field, path: str) -> Iterator[Weight]:
    if isinstance(value, eqx.Module):
        yield from weights(value, path)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _walk(owner, item, field, f"{path}[{i}]")
    elif value is not None:
        annotation = next(t for t in (field.type, *get_args(field.type)) if hasattr(t, "dim_str"))
        dims = owner.dims if annotation.dim_str == "..." else tuple(annotation.dim_str.split())
        yield Weight(path, tuple(annotation.dtypes), dims, field.metadata.get("buffer", False), value)


def check(module: eqx.Module) -> None:
    """Hold every weight against its annotation, which `tree_map`, `tree_at` and checkpoints do not do.

    Raises TypeError naming the weight if its dtype is another, or if one dim name of a module has two sizes.
    """
    sizes: dict[tuple[str, str], tuple[int, str]] = {}
    for weight in weights(module):
        if weight.value.dtype.name not in weight.dtypes:
            raise TypeError(f"{weight.path} is {weight.value.dtype.name}, declared {' | '.join(weight.dtypes)}")
        if weight.stacked < 0:
            raise TypeError(f"{weight.path} has shape {weight.value.shape}, declared {' '.join(weight.dims)}")
        owner = weight.path.rpartition(".")[0]
        for name, size in zip(weight.dims, weight.value.shape[weight.stacked :], strict=True):
            expected, first = sizes.setdefault((owner, name), (size, weight.path))
            if size != expected:
                raise TypeError(f"{weight.path} has {name}={size}, but {first} has {name}={expected}")
