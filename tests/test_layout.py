"""The rules that keep the package readable: what may import what, and how modules are written."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mintrain"
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}

ROWS = (  # a file imports from the rows above its own, never from a later one
    {"arrays", "config"},
    {"collectives", "sharding", "watch"},
    {"context", "layers/splash"},
    {"layers/linear"},  # how every layer gathers a weight
    {"layers/norm", "layers/rope", "layers/mlp", "layers/embedding", "layers/attend"},
    {"layers/cache"},
    {"layers/attention", "layers/indexer", "layers/router", "layers/per_layer"},
    {"layers/sparse", "layers/moe"},
    {"layers/mla"},
    {"block"},
    {"lora"},
    {"model"},
    {"carriers", "loss"},
    {"optim"},
    {"step"},
)
# All other files stand beside the path from the command line to the mathematics. They import from the rows above, and
# from one another only this:
BESIDE = {
    "hf_config": {"hf_rope"},
    "hf_files": {"hf_config", "hf_names"},
    "options": {"hf_files", "tokenizer"},
    "metrics": {"options"},
    "check": {"audit", "costs"},
    "audit_hlo": {"audit"},
    "plan": {"audit", "audit_hlo", "costs", "options"},
    "checkpoint": {"hosts", "options"},
    "hf": {"hf_config", "hf_files", "hf_names", "checkpoint", "tokenizer"},
    "load": {"hf", "hf_config", "hf_files", "options", "checkpoint", "tokenizer"},
    "chat": {"tokenizer"},
    "data": {"chat", "tokenizer"},
    "generate": {"chat", "load", "options"},
    "observe": {"audit"},
    "numerics": {"checkpoint", "observe", "options", "study"},
    "study": {"audit", "data"},
}


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imports(name: str) -> set[str]:
    """The files of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    paths = {module.removeprefix("mintrain.").replace(".", "/") for module in found}
    return paths & FILES.keys()


def test_nothing_imports_upward_or_sideways():
    for i, row in enumerate(ROWS):
        for name in row:
            assert imports(name) <= set().union(*ROWS[:i]), name


def test_the_other_files_import_each_other_only_where_it_is_written_down():
    known = set().union(*ROWS)
    for name in FILES.keys() - known - {"__init__", "layers/__init__"}:
        assert imports(name) - known <= BESIDE.get(name, set()), name


def test_every_row_exists():
    assert set().union(*ROWS) <= FILES.keys()


def test_layers_know_nothing_of_the_policy_the_optimizer_and_the_step():
    for name in FILES:
        if name.startswith("layers/"):
            assert not imports(name) & {"sharding", "optim", "step", "loss", "model"}, name


@pytest.mark.parametrize("name", FILES)
def test_annotations_stay_types(name):
    """`from __future__ import annotations` would make strings of them, and dtypes and layouts are read from them."""
    assert not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in ast.walk(tree(name)))


@pytest.mark.parametrize("name", FILES)
def test_modules_have_the_init_of_a_dataclass(name):
    """With an `__init__` of its own, a module's fields are not checked."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            assert "__init__" not in methods, f"{name}: {node.name}"
