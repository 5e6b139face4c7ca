"""The contract, proved on the traced program: the dtypes of products that reach an exponential or a choice.

Types are declared on functions. This walks the jaxpr of the whole step, through scans, remat, custom gradients and
`shard_map` and Pallas kernels, and follows every product's result to where it is exponentiated or ranked. A result
that is below float32 anywhere on its way (as a product, or by a cast after it) is a fault. A further product ends the
way: what goes into it are activations, which have the compute dtype by design. audit_hlo.py does the same with the
program that the compiler makes of it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
HOLDS = ("jaxpr", "call_jaxpr", "body_jaxpr", "branches")  # parameters of an equation that hold what it runs
READS = {"get", "masked_load"}  # what else takes a kernel's references writes to them
SINKS = {"exp": "exponential", "exp2": "exponential", "top_k": "choice", "sort": "choice"}


class Product(NamedTuple):
    dtype: str  # of its result
    narrowest: str  # dtype on the way so far
    where: str  # file and line


class Finding(NamedTuple):
    sink: str  # what the product reaches: exponential or choice
    product: Product
    where: str  # file and line of the sink

    @property
    def faulty(self) -> bool:
        return jnp.dtype(self.product.narrowest).itemsize < 4

    def __str__(self) -> str:
        way = self.product
        kind = way.dtype if way.dtype == way.narrowest else f"{way.dtype}, {way.narrowest} on its way"
        return f"product at {way.where} ({kind}) reaches the {self.sink} at {self.where}"


Taint = frozenset[Product]
NOTHING: Taint = frozenset()


def audit(closed: ClosedJaxpr) -> list[Finding]:
    """Everything that reaches an exponential or a choice, each pair of places once, faults first."""
    found: set[Finding] = set()
    _walk(closed.jaxpr, [NOTHING] * len(closed.jaxpr.invars), found)
    return ordered(found)


def ordered(found: set[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: (not finding.faulty, *finding))


def proved(findings: list[Finding], program: str = "traced") -> list[Finding]:
    """The same, where none is a fault. Raises TypeError that names every one otherwise."""
    if faults := [str(finding) for finding in findings if finding.faulty]:
        where = f"{len(faults)} places of the {program} program"
        raise TypeError(f"the contract is broken in {where}: {'; '.join(faults)}")
    return findings


class Memory:
    """What a kernel's reference holds has come from. All programs inside the kernel share it, and it only grows."""

    def __init__(self, taint: Taint = NOTHING):
        self.taint = taint


def _walk(jaxpr: Jaxpr, inputs: list[Taint | Memory], found: set[Finding], kernel: str = "") -> list[Taint]:
    """What the results of `jaxpr` come from, if its inputs come from `inputs`.

    kernel: the Pallas kernel that it runs in. Of what is called in a custom gradient, jax knows only that call's line.
    """
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: NOTHING if isinstance(atom, Literal) else known.get(atom, NOTHING)
    for eqn in jaxpr.eqns:
        taints = [read(atom) for atom in eqn.invars]
        name, where = eqn.primitive.name, source_info_util.summarize(eqn.source_info) + kernel
        if name in PRODUCTS:
            dtype = str(eqn.outvars[0].aval.dtype)
            outputs = [frozenset([Product(dtype, dtype, where)])]
        elif any(name in eqn.params for name in HOLDS):
            outputs = _inside(eqn, taints, found, kernel)
        else:
            memories = [taint for taint in taints if isinstance(taint, Memory)]
            everything = frozenset().union(*(t.taint if isinstance(t, Memory) else t for t in taints))
            if name not in READS:
                for memory in memories:
                    memory.taint |= everything
            if name in SINKS:
                found |= {Finding(SINKS[name], product, where) for product in everything}
            outputs = [everything] * len(eqn.outvars)
        for var, taint in zip(eqn.outvars, outputs, strict=True):
            known[var] = narrowed(taint, getattr(var.aval, "dtype", None))
    return [read(atom) for atom in jaxpr.outvars]


def _inside(eqn, taints: list[Any], found: set[Finding], kernel: str) -> list[Taint]:
    """Through an equation that holds programs. Loops are walked until nothing new comes back around."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        fixed, carried = scan_sides(eqn)
        while True:
            outputs = _walk(params["jaxpr"].jaxpr, taints, found, kernel)
            joined = [a | b for a, b in zip(taints[fixed : fixed + carried], outputs[:carried], strict=True)]
            if joined == taints[fixed : fixed + carried]:
                return outputs
            taints = [*taints[:fixed], *joined, *taints[fixed + carried :]]
    if name == "while":
        test, body = params["cond_nconsts"], params["body_nconsts"]
        carry = taints[test + body :]
        while True:
            outputs = _walk(params["body_jaxpr"].jaxpr, [*taints[test : test + body], *carry], found, kernel)
            joined = [a | b for a, b in zip(carry, outputs, strict=True)]
            if joined == carry:
                return joined
            carry = joined
    if name == "cond":
        branches = [_walk(branch.jaxpr, taints[1:], found, kernel) for branch in params["branches"]]
        return [frozenset().union(*parts) for parts in zip(*branches, strict=True)]
    if name == "pallas_call":
        return _kernel(eqn, taints, found)
    inner = next(params[name] for name in HOLDS if name in params)
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    if len(inner.invars) != len(taints):
        raise NotImplementedError(f"the audit does not know how {name} passes its operands on; add it to audit.py")
    return _walk(inner, taints, found, kernel)


def scan_sides(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are the carry; xs follow.

    Read off the ranks, since xs and ys have an axis more outside than inside: the parameters that say it have other
    names in jax 0.10 and 0.11, and no documentation.
    """
    inner = eqn.params["jaxpr"].jaxpr
    same = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
    carried = same(eqn.outvars, inner.outvars)
    return same(eqn.invars, inner.invars) - carried, carried


def _kernel(eqn, taints: list[Taint], found: set[Finding]) -> list[Taint]:
    """Through the body of a Pallas kernel. Its references outlive a step of the grid: walked until nothing is new."""
    body, grid = eqn.params["jaxpr"], eqn.params["grid_mapping"]
    operands = [Memory(taint) for taint in taints[grid.num_dynamic_grid_bounds :]]
    outputs = [Memory() for _ in eqn.outvars]
    for operand, output in eqn.params["input_output_aliases"]:
        outputs[output] = operands[operand]
    references = [*operands, *outputs]
    references += [Memory() for _ in body.invars[len(references) :]]  # scratch
    before = None
    while before != (before := [memory.taint for memory in references]):
        _walk(body, references, found, f" in {body.debug_info.func_src_info}")
    return [memory.taint for memory in outputs]


def narrowed(taint: Taint, dtype) -> Taint:
    """The same products after a value of this dtype. An index or a mask has the numbers of none."""
    if dtype is None or not jnp.issubdtype(dtype, np.floating):
        return NOTHING
    if jnp.dtype(dtype).itemsize >= 4:
        return taint
    return frozenset(product._replace(narrowest=str(dtype)) for product in taint)
