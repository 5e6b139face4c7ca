"""Where weights come from: a Hugging Face folder or a run."""

import json
from pathlib import Path

import jax

from mintrain import hf_config, options
from mintrain.checkpoint import load_run
from mintrain.config import Config, ConfigError, Mesh
from mintrain.hf import load_hf, read_weights
from mintrain.hf_files import read_headers
from mintrain.model import LM
from mintrain.tokenizer import Tokenizer, load_tokenizer, tokenizer_of


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def load(folder: Path, mesh: Mesh, dtype: str = "") -> tuple[LM, Tokenizer]:
    """A model with its tokenizer. dtype: in which it computes; empty: what the folder says."""
    if is_run(folder):
        cfg, model = load_run(folder, mesh, dtype)
        return model, load_tokenizer(cfg.data.tokenizer)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not the folder of a run or of a Hugging Face checkpoint: it has no config.json")
    tokenizer = load_tokenizer(tokenizer_of(folder))
    saved = json.loads((folder / "config.json").read_text())
    saved = saved.get("text_config", saved)
    said = saved.get("dtype", saved.get("torch_dtype"))
    return load_hf(folder, dtype or (said if said in ("bfloat16", "float32") else "float32"), mesh), tokenizer


def initial(cfg: Config, abstract: LM) -> LM:
    """The weights of `cfg.init_from`, on the devices of `abstract`. Raises ConfigError if they are another model's."""
    folder = Path(cfg.init_from)
    if not folder.is_dir():
        raise ConfigError(f"init_from={folder} is not a folder; give that of a Hugging Face checkpoint or of a run")
    run = is_run(folder)
    saved, weights = load_run(folder, cfg.mesh) if run else read_headers(folder)
    models = (saved.model, cfg.model) if run else map(hf_config.plain, (saved, cfg.model))
    if changed := options.differences(*models):
        raise ConfigError(
            f"init_from={folder} has another model: {'; '.join(changed[:3])}; use the config that made it"
        )
    if not run:
        return read_weights(folder, weights, abstract)
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(weights))  # static fields are this run's
