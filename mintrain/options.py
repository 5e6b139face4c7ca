"""From the command line to a `Config`: a config file, typed options that override it, and back to JSON."""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from jaxtyping import TypeCheckError

from mintrain.config import Config, ConfigError

DEFAULT = Path(__file__).parents[1] / "configs" / "shakespeare.py"
USAGE = """train.py [CONFIG] [options]: train the model that CONFIG describes, or go on with the run of that name.

CONFIG is a Python file that defines `config`, or a run's config.json; configs/shakespeare.py by default.
--check         trace the whole step at full size and print parameters, memory and FLOPs; needs no accelerator
--print-config  print the config with the options applied, as JSON
"""


def load(argv: list[str]) -> tuple[Config, str]:
    """The config and what to do with it: "train", "check" or "print". Raises ConfigError; --help exits."""
    argv = [re.sub(r"^(--[\w.-]+=)?(true|false)$", lambda m: (m[1] or "") + m[2].title(), arg) for arg in argv]
    actions = {"--check": "check", "--print-config": "print", "--print_config": "print"}
    action = next((actions[arg] for arg in argv if arg in actions), "train")
    argv = [arg for arg in argv if arg not in actions]
    path = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else DEFAULT
    config = override(read(path), argv)
    return dataclasses.replace(config, run=config.run or path.stem), action


def read(path: Path) -> Config:
    if not path.is_file() or path.suffix not in (".py", ".json"):
        raise ConfigError(f"{path} is not a config; give a .py file that defines `config`, or a run's config.json")
    try:
        if path.suffix == ".json":
            return from_json(json.loads(path.read_text()))
        config = runpy.run_path(str(path)).get("config")
    except TypeCheckError as error:
        field = re.search(r"parameter '(\w+)'.\n?Actual value: (.*)\nExpected type: (.*)", str(error))
        line = f"{field[1]}={field[2]} is not of type {field[3]}" if field else str(error).splitlines()[0]
        raise ConfigError(f"{path}: {line}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}; mend it or use another") from error
    except (TypeError, NameError, SyntaxError, ImportError) as error:
        raise ConfigError(f"{path}: {error}; compare with configs/shakespeare.py") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} does not define `config = Config(...)`; compare with configs/shakespeare.py")
    return config


def override(config: Config, argv: list[str]) -> Config:
    """Apply `--optim.lr 1e-3` and the like, in the types of the fields."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Config,
                args=argv,
                default=config,
                prog="train.py",
                description=USAGE,
                config=(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed, tyro.conf.AvoidSubcommands),
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[╭╮╰╯│─]", " ", re.sub(r"╭.*╮", "", said.getvalue()))
        text = re.split(r"For full helptext|Argument helptext", " ".join(text.split()))[0].strip().rstrip(".")
        raise ConfigError(f"{text}; --help lists the options") from None


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
