"""Hugging Face checkpoint folders, read and written: `load_hf`, and `python -m mintrain.hf export RUN OUT`.

Reading goes tensor by tensor, through views into the files, straight to the shard that a device holds.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np

from mintrain import config, sharding
from mintrain.arrays import Weight, check, weights
from mintrain.checkpoint import load_run
from mintrain.config import ConfigError
from mintrain.hf_config import from_model
from mintrain.hf_files import DTYPES, INDEX, Tensor, read_headers
from mintrain.hf_names import Source, file_shape, sizes, sources, text_names, unused
from mintrain.lora import merge
from mintrain.model import LM
from mintrain.tokenizer import load_tokenizer, tokenizer_path

SHARD = 4 << 30  # bytes of one file that is written
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def load_hf(folder: str | Path, dtype: str = "float32", mesh: config.Mesh | None = None) -> LM:
    """Read a Hugging Face checkpoint folder. Returns the model, placed on `mesh` (one device by default).

    dtype: "float32" or "bfloat16", in which the model computes; its weights are kept in float32.
    Raises ConfigError that lists every missing, surplus or misshapen tensor.
    """
    (cfg, found), mesh = read_headers(Path(folder)), mesh or config.Mesh()
    shapes, devices = jax.eval_shape(lambda: LM.init(cfg, dtype, key=jax.random.key(0))), sharding.make_mesh(mesh)
    sharding.validate(mesh, shapes)
    return read_weights(Path(folder), found, sharding.place(devices, shapes, sharding.specs(shapes)))


def read_weights(folder: Path, found: dict[str, Tensor], model: LM) -> LM:
    """A folder's weights, in the shapes and on the devices of the abstract `model`. Raises ConfigError as above."""
    files = {name: found[full] for name, full in text_names(list(found)).items()}
    pairs = list(zip(weights(model), sources(model), strict=True))
    problems, skipped = [], unused(model.cfg)
    for weight, source in pairs:
        expected = file_shape(source, weight)
        for name in (name for names in source.layers for name in names):
            if name not in files:
                problems.append(f"missing {name}")
            elif files[name].shape != expected or files[name].dtype not in DTYPES:
                problems.append(f"{name} is {files[name].dtype} {files[name].shape}, expected floats {expected}")
    known = {name for _, source in pairs for names in source.layers for name in names}
    problems += [f"surplus {name}" for name in files if name not in known and not skipped.fullmatch(name)]
    if problems:
        raise ConfigError(f"{folder}: {len(problems)} tensors do not fit the config: {'; '.join(problems)}")

    def leaf(weight: Weight, source: Source) -> jax.Array:
        """One device after the other, so that beside what is on devices one shard is in memory."""
        shape, sharding = weight.value.shape, weight.value.sharding
        parts = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            parts.append(jax.device_put(_shard(weight, source, files, index), device).block_until_ready())
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    loaded = jax.tree.unflatten(jax.tree.structure(model), [leaf(*pair) for pair in pairs])
    check(loaded)
    return loaded


def _shard(weight: Weight, source: Source, files: dict[str, Tensor], index: tuple[slice, ...]) -> np.ndarray:
    """One device's part of a weight, in float32: beside it, one tensor of the files is in memory at a time."""
    shape = weight.value.shape
    out = np.empty([len(range(n)[at]) for n, at in zip(shape, index, strict=True)], np.float32)
    layers = range(len(source.layers))[index[0]] if weight.stacked else [0]
    inner = index[weight.stacked :]
    for i, layer in enumerate(layers):
        target, names = out[i, ...] if weight.stacked else out, source.layers[layer]  # a view, also of one number
        if not source.stack:
            target[...] = einops.rearrange(files[names[0]].read(), source.axes, **sizes(weight))[inner]
            continue
        count = shape[weight.stacked]  # of experts, which come first
        many, one = len(names) // count, {**sizes(weight), "experts": 1}
        for j, expert in enumerate(range(count)[inner[0]]):
            stacked = np.stack([files[name].read() for name in names[expert * many : (expert + 1) * many]])
            target[j] = einops.rearrange(stacked, source.axes, **one)[0][inner[1:]]
    return out


def save_hf(model: LM, out: str | Path, dtype: str = "float32") -> None:
    """Write `config.json` and safetensors, with an index where there are several files, for transformers.

    dtype: of the weights in the files, "float32" or "bfloat16"; a router's selection bias is float32 in both.
    Adapters are merged.
    Raises ConfigError if the model has no form there, or if `out` is a folder that holds something.
    """
    from safetensors.numpy import save_file

    out, model = Path(out), merge(model)
    written = from_model(model.cfg)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**written, "dtype": dtype}, indent=1))
    shards, held, size = [], {}, 0
    for name, tensor in _export(model, dtype):
        if held and size + tensor.nbytes > SHARD:
            shards.append(_write(out, len(shards), held, save_file))
            held, size = {}, 0
        held[name], size = tensor, size + tensor.nbytes
    shards.append(_write(out, len(shards), held, save_file))
    if len(shards) == 1:
        (out / shards[0][0]).rename(out / "model.safetensors")
        return
    index, total = {}, 0
    for i, (file, names, nbytes) in enumerate(shards):
        final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (out / file).rename(out / final)
        index |= dict.fromkeys(names, final)
        total += nbytes
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))


def _write(out: Path, number: int, held: dict[str, np.ndarray], save_file) -> tuple[str, list[str], int]:
    file = f"part-{number}.safetensors"
    save_file(held, out / file, metadata={"format": "pt"})
    return file, list(held), sum(tensor.nbytes for tensor in held.values())


def _export(model: LM, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the files, one layer and one expert at a time."""
    narrow = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    for weight, source in zip(weights(model), sources(model), strict=True):
        target = np.dtype(np.float32) if weight.path.endswith("router.bias") else narrow
        back = " -> ".join(reversed(source.axes.split(" -> ")))
        pair = {"pair": 2} if "pair" in weight.dims else {}
        shape = weight.value.shape
        for i, names in enumerate(source.layers):
            experts = shape[weight.stacked] if source.stack else 1
            many = len(names) // experts
            for expert in range(experts):
                at = [slice(i, i + 1)] * weight.stacked + [slice(None)] * len(weight.dims)
                if source.stack:
                    at[weight.stacked] = slice(expert, expert + 1)
                piece = _fetch(weight.value, at).reshape(
                    (*(1,) * source.stack, *shape[weight.stacked + source.stack :])
                )
                tensor = einops.rearrange(piece.astype(target), back, **pair)
                parts = tensor if source.stack else [tensor]
                for name, part in zip(names[expert * many : (expert + 1) * many], parts, strict=True):
                    yield name if name == "lm_head.weight" else f"model.{name}", np.ascontiguousarray(part)


def _fetch(value: jax.Array, at: list[slice]) -> np.ndarray:
    """A part of an array that may be spread over devices, from these devices' own parts."""
    bounds = [s.indices(n)[:2] for s, n in zip(at, value.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], value.dtype)
    for shard in value.addressable_shards:
        held = [s.indices(n)[:2] for s, n in zip(shard.index, value.shape, strict=True)]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, held, strict=True)]
        if shard.replica_id == 0 and all(low < high for low, high in both):
            starts = [low - first for (low, _), (first, _) in zip(both, held, strict=True)]
            part = jax.lax.dynamic_slice(shard.data, starts, [high - low for low, high in both])
            out[tuple(slice(low - a, high - a) for (low, high), (a, _) in zip(both, bounds, strict=True))] = part
    return out


def export(run: str, out: str, dtype: str = "float32") -> None:
    """Write the latest checkpoint of a run, with its tokenizer. Raises ConfigError where `save_hf` does."""
    cfg, model = load_run(Path(run), config.Mesh())
    save_hf(model, out, dtype)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stop)}
    (Path(out) / "generation_config.json").write_text(json.dumps(ids))
    if cfg.data.tokenizer != "bytes":
        path = tokenizer_path(cfg.data.tokenizer)
        shutil.copy(path, Path(out) / f"tokenizer{path.suffix}")
        if path.suffix == ".json":
            (Path(out) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        for name in BESIDE:
            if path.with_name(name).is_file():
                shutil.copy(path.with_name(name), Path(out) / name)
    print(f"{out}: {run} in {dtype}")


def main(argv: list[str]) -> int:
    if len(argv) not in (3, 4) or argv[0] != "export" or argv[3:] not in ([], ["float32"], ["bfloat16"]):
        print("python -m mintrain.hf export RUN OUT [float32|bfloat16]", file=sys.stderr)
        return 2
    try:
        export(*argv[1:])
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
