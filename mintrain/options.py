"""From the command line to a `Config`: a config file, typed options that override it, and back to JSON."""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxtyping import TypeCheckError

from mintrain.config import Config, ConfigError, Data, Optim, wrong_type
from mintrain.hf_files import read_config, read_headers
from mintrain.tokenizer import tokenizer_of

T = TypeVar("T")

DEFAULT = Path(__file__).parents[1] / "configs" / "shakespeare.py"
USAGE = """train.py [CONFIG] [options]: train the model that CONFIG describes, or go on with the run of that name.

CONFIG is a Python file that defines `config`, a run's config.json, or the folder of a Hugging Face checkpoint, which is
trained on from its weights; configs/shakespeare.py by default.
--check         trace the whole step at full size and print parameters, memory and FLOPs; needs no accelerator
--plan SLICE    compile the whole step for TPUs such as v6e-32, v5p-256 or v6e:4x8; needs jax[tpu] and no TPU;
                with --fit, for the largest per_device_batch_size that fits
--print-config  print the config with the options applied, as JSON
--distributed   train on many hosts, with the same command on each; docs/scale.md has the launch for TPU, GKE and Slurm
"""


def load(argv: list[str]) -> tuple[Config, str, str]:
    """The config, what to do with it ("train", "distributed", "check", "plan", "fit", "print"), for which TPUs to plan.

    Raises ConfigError; --help exits.
    """
    argv = [re.sub(r"^(--[\w.-]+=)?(true|false)$", lambda m: (m[1] or "") + m[2].title(), arg) for arg in argv]
    actions = {"--check": "check", "--print-config": "print", "--print_config": "print", "--distributed": "distributed"}
    action = next((actions[arg] for arg in actions if arg in argv), "train")
    argv, slice_ = [arg for arg in argv if arg not in actions], ""
    if "--plan" in argv:
        at = argv.index("--plan")
        action, slice_ = "plan", "".join(argv[at + 1 : at + 2])
        del argv[at : at + 2]
    if "--fit" in argv:
        if action != "plan":
            raise ConfigError("--fit goes with --plan SLICE: it finds the largest per_device_batch_size for it")
        argv.remove("--fit")
        action = "fit"
    path = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else DEFAULT
    look = action not in ("train", "distributed")
    config = parse(Config, argv, released(path, look) if path.is_dir() else read(path))
    name = path.resolve().name if path.is_dir() else path.stem
    return dataclasses.replace(config, run=config.run or name), action, slice_


def read(path: Path) -> Config:
    if not path.is_file() or path.suffix not in (".py", ".json"):
        raise ConfigError(f"{path} is not a config; give a .py file that defines `config`, or a run's config.json")
    try:
        if path.suffix == ".json":
            return from_json(json.loads(path.read_text()))
        config = runpy.run_path(str(path)).get("config")
    except TypeCheckError as error:
        raise ConfigError(f"{path}: {wrong_type(error)}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}; mend it or use another") from error
    except (TypeError, NameError, SyntaxError, ImportError) as error:
        raise ConfigError(f"{path}: {error}; compare with configs/shakespeare.py") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} does not define `config = Config(...)`; compare with configs/shakespeare.py")
    return config


def released(folder: Path, look: bool) -> Config:
    """The config that trains on from a Hugging Face folder, with its tokenizer and at a low learning rate.

    look: nothing is trained, so `config.json` alone will do.
    """
    if look and not any(folder.glob("*.safetensors*")):
        model, tokenizer = read_config(folder), "bytes"
    else:
        (model, _), tokenizer = read_headers(folder), tokenizer_of(folder)
    return Config(model, data=Data(tokenizer=tokenizer, seq_len=1024), optim=Optim(lr=1e-5), init_from=str(folder))


def parse(
    kind: type[T], argv: list[str], default: T | None = None, prog: str = "train.py", description: str = USAGE
) -> T:
    """A dataclass from options such as `--optim.lr 1e-3`, in the types of its fields. Raises ConfigError."""
    import tyro

    for arg in argv:
        if not arg.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in arg):
            raise ConfigError(f"{arg!r} is not UTF-8 text; set the terminal to UTF-8 or write it in another way")
    flags = () if default is None else (tyro.conf.FlagConversionOff,)  # a config's options take True or False
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=argv,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.SuppressFixed, tyro.conf.AvoidSubcommands, *flags),
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[╭╮╰╯│─]", " ", re.sub(r"╭.*╮", "", said.getvalue()))
        text = re.split(r"For full helptext|Argument helptext", " ".join(text.split()))[0].strip().rstrip(".")
        raise ConfigError(f"{text}; --help lists the options") from None


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two configs, or parts of them in the form of JSON: "optim.lr 0.1 -> 0.2"."""
    before, after = _flat(old), _flat(new)
    return [f"{k} {before.get(k)} -> {after.get(k)}" for k in sorted(before | after) if before.get(k) != after.get(k)]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        value = json.loads(json.dumps(dataclasses.asdict(value)))
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for name, item in items for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()}


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(data: dict[str, Any]) -> Config:
    """The inverse of `to_json`. Raises ConfigError for what is no config."""
    try:
        return _build(Config, data)
    except (TypeError, KeyError, AttributeError, TypeCheckError, StopIteration) as error:
        raise ConfigError(f"config.json does not fit this version of mintrain: {str(error).splitlines()[0]}") from error


def _build(kind: Any, value: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        members = get_args(kind)
        if not isinstance(value, dict):
            return value
        return _build(next(m for m in members if dataclasses.is_dataclass(m) and _names(m) == set(value)), value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    return value


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
