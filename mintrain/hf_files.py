"""The tensors of a Hugging Face folder, without reading them: names, dtypes, shapes, and views into the files.

safetensors checks a file's header (its size, its offsets, overlaps). Its numpy loader does not know float8, which
DeepSeek's checkpoints use, so the bytes are mapped into memory here.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mintrain import config
from mintrain.config import ConfigError
from mintrain.hf_config import model_config
from mintrain.hf_names import text_names

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"  # of a float8 tensor: a factor for each block
BLOCK = 128  # rows and columns of a block


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where it is, and the factors of its blocks if it is float8."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    scale: "Tensor | None" = None

    def read(self) -> np.ndarray:
        """A view into the file, or a float32 array where blocks have to be multiplied by their factors."""
        dtype = DTYPES[self.dtype]
        size = int(np.prod(self.shape))
        if size == 0:
            return np.zeros(self.shape, dtype)
        flat = np.memmap(self.file, np.uint8, mode="r", offset=self.start, shape=(size * dtype.itemsize,))
        values = flat.view(dtype).reshape(self.shape)
        if self.scale is None:
            return values
        factors = self.scale.read().astype(np.float32)
        whole = np.repeat(np.repeat(factors, BLOCK, axis=0), BLOCK, axis=1)
        return values.astype(np.float32) * whole[: self.shape[0], : self.shape[1]]


def read_headers(folder: Path) -> tuple[config.Model, dict[str, Tensor]]:
    """What `config.json` describes, with the layers of multi-token prediction that the files hold, and the tensors."""
    cfg, found = read_config(folder), tensors(folder)
    joins = [name for name in text_names(list(found)) if name.endswith(".eh_proj.weight")]
    return replace(cfg, mtp=cfg.layers[-1:] * len(joins)), found


def read_config(folder: Path) -> config.Model:
    """What `config.json` describes, with as many layers of multi-token prediction as it names."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        hf = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}; download it again") from error
    cfg = model_config(hf)
    return replace(cfg, mtp=cfg.layers[-1:] * (hf.get("num_nextn_predict_layers") or 0))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by their names in the files. Raises ConfigError for what is no checkpoint folder or no such file."""
    found: dict[str, Tensor] = {}
    for file in _files(folder):
        for name, tensor in _header(file).items():
            if name in found:
                raise ConfigError(f"{name} is in {found[name].file.name} and in {file.name}; remove one of the files")
            found[name] = tensor
    scales = {name.removesuffix(SCALE): found.pop(name) for name in list(found) if name.endswith(SCALE)}
    for name, tensor in list(found.items()):
        if tensor.dtype == "F8_E4M3":
            expected = tuple(-(-n // BLOCK) for n in tensor.shape)
            scale = scales.get(name)
            if scale is None or scale.shape != expected or scale.dtype not in DTYPES:
                has = "no tensor" if scale is None else f"{scale.dtype} {scale.shape}"
                raise ConfigError(f"{name} is float8 and has {has} as {name}{SCALE}; it needs F32 {expected}")
            found[name] = Tensor(tensor.file, tensor.dtype, tensor.shape, tensor.start, scale)
    return found


def _files(folder: Path) -> list[Path]:
    """The files that the index names, or all model*.safetensors."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} has no model*.safetensors; give the folder of a Hugging Face checkpoint")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} is not an index of safetensors: {error}; download it again") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ConfigError(f"{index} names the file {name!r}, which is not a file of its own folder; mend the index")
        if not (folder / name).is_file():
            raise ConfigError(f"{index} names {name}, which is missing; download it")
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass  # it has checked the header
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}; download it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
