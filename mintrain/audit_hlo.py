"""The contract, proved again on what will run: the same walk as audit.py's, over the compiler's optimized program.

The compiler fuses, reorders and casts as it likes. In its text this follows the result of every `convolution` and `dot`
(a TPU's matrix products) through fusions, loops, calls and branches to exponentials, sorts and top-k calls. Operands'
dtypes do not matter: products of bfloat16 are exact in float32. A Pallas kernel is opaque here and ends the way, as a
product does; its body was walked in the traced program. The exponential of a sigmoid, 1 / (1 + exp(-x)), does not
count: there it is one operation, an activation, which has the compute dtype by design.
"""

import re
from typing import NamedTuple

from mintrain.audit import NOTHING, Finding, Product, Taint, narrowed, ordered

Value = Taint | tuple["Value", ...]  # of an array, or of the elements of a tuple
PRODUCTS = {"convolution", "dot", "ragged-dot"}
OPAQUE = {"tpu_custom_call"}  # Pallas kernels, jax's and the compiler's own
RANKS = {"TopK", "PartialReduce"}  # what top-k becomes where it is not a sort
LOOKS = {"sort", "reduce", "all-reduce", "all-to-all", "opt-barrier", "scatter"}  # a result for each first operand
FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}

HEADER = re.compile(r"(?:ENTRY )?%([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
OPERANDS_END = re.compile(r"\)(?=, [a-z_]+=|$)")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: list[str]
    inside: str  # the text between its brackets
    attributes: str

    def attribute(self, name: str) -> str:
        return (re.search(rf'\b{name}="?([^,"}} ]*)', self.attributes) or [""] * 2)[1]

    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by what it calls them."""
        return {name: NAME.findall(names) for name, names in CALLED.findall(self.attributes)}


def audit(text: str) -> list[Finding]:
    """As `audit.audit`, of the text of a compiled program."""
    program = Program(text)
    if not any(it.op in PRODUCTS for steps in program.computations.values() for it in steps):
        raise NotImplementedError("audit_hlo.py finds no matrix product in the compiled program, and so cannot read it")
    program.run(program.entry, ())
    return ordered(program.found)


class Program:
    """A parsed program, and what was found in it so far."""

    def __init__(self, text: str):
        self.frames = _frames(text)
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry, self.found = "", set[Finding]()
        self.walked: dict[tuple[str, tuple[Value, ...]], Value] = {}
        name = ""
        for line in text.splitlines():
            if header := HEADER.match(line):
                name = header[1]
                self.computations[name] = []
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif found := INSTRUCTION.match(line):
                root, this, type_, op, rest = found.groups()
                inside, attributes = (OPERANDS_END.split(rest, maxsplit=1) + [""])[:2]
                self.computations[name].append(Instruction(this, type_, op, NAME.findall(inside), inside, attributes))
                if root:
                    self.roots[name] = this

    def run(self, name: str, operands: tuple[Value, ...]) -> Value:
        """What the result of a computation comes from, if its parameters come from `operands`."""
        if (name, operands) not in self.walked:
            known: dict[str, Value] = {}
            for it in self.computations[name]:
                value = self._value(name, it, [known[operand] for operand in it.operands], operands)
                known[it.name] = value if isinstance(value, tuple) else _narrowed(value, it.type)
            self.walked[name, operands] = known[self.roots[name]]
        return self.walked[name, operands]

    def _value(self, where: str, it: Instruction, values: list[Value], parameters: tuple[Value, ...]) -> Value:
        target = it.attribute("custom_call_target") if it.op == "custom-call" else ""
        if it.op == "parameter":
            return parameters[int(it.inside)] if parameters else NOTHING
        if it.op in PRODUCTS:
            dtype = _dtype(it.type)
            return frozenset([Product(dtype, dtype, self.place(it))]) if dtype else NOTHING
        if it.op == "tuple":
            return tuple(values)
        if it.op == "get-tuple-element":
            return values[0][int(it.attribute("index"))] if isinstance(values[0], tuple) else values[0]
        if it.op == "while":
            return self._loop(it.called(), values[0])
        if it.op == "conditional":
            branches = [name for names in it.called().values() for name in names]
            parts = [self.run(name, (value,)) for name, value in zip(branches, values[1:], strict=True)]
            return _joined(*parts)
        if it.op in ("fusion", "call"):
            return self.run(it.called()["calls" if it.op == "fusion" else "to_apply"][0], tuple(values))
        if it.op == "async-start":
            return tuple(values), self.run(it.called()["calls"][0], tuple(values))
        if it.op == "async-done" and isinstance(values[0], tuple):
            return values[0][1]
        if target in OPAQUE:
            return NOTHING
        if it.op == "exponential" and not self._in_sigmoid(where, it):
            self._reached("exponential", it, values)
        if target in RANKS:
            self._reached("choice", it, values[:1])
        if it.op == "sort":
            self._reached("choice", it, [values[i] for i in self._compared(it.called()["to_apply"][0])])
        if it.op in LOOKS and it.type.startswith("("):
            return tuple(values[: len(re.findall(r"\w+\[", it.type))])
        return _flat(*values)

    def _loop(self, called: dict[str, list[str]], carry: Value) -> Value:
        while True:
            self.run(called["condition"][0], (carry,))
            joined = _joined(carry, self.run(called["body"][0], (carry,)))
            if joined == carry:
                return carry
            carry = joined

    def _reached(self, sink: str, it: Instruction, values: list[Value]) -> None:
        self.found |= {Finding(sink, product, self.place(it)) for product in _flat(*values)}

    def _compared(self, comparator: str) -> list[int]:
        """Which operands of a sort its comparator looks at: two parameters each. The others are only moved."""
        steps = self.computations[comparator]
        used = {name for step in steps for name in step.operands}
        return sorted({int(step.inside) // 2 for step in steps if step.op == "parameter" and step.name in used})

    def _in_sigmoid(self, where: str, it: Instruction) -> bool:
        """exp(-x) of which the only use is to be added to 1."""
        steps = {step.name: step for step in self.computations[where]}
        uses = [step for step in steps.values() if it.name in step.operands]
        negated = it.operands[0] in steps and steps[it.operands[0]].op == "negate"

        def one(name: str) -> bool:
            step = steps[name]
            moved = step.op in ("broadcast", "convert", "bitcast")
            return one(step.operands[0]) if moved else (step.op, step.inside) == ("constant", "1")

        return negated and bool(uses) and all(step.op == "add" and any(map(one, step.operands)) for step in uses)

    def place(self, it: Instruction) -> str:
        """File, line and function."""
        return self.frames.get(it.attribute("stack_frame_id"), it.attribute("op_name") or it.name)


def _flat(*values: Value) -> Taint:
    return frozenset().union(*(_flat(*value) if isinstance(value, tuple) else value for value in values))


def _joined(*values: Value) -> Value:
    if all(isinstance(value, tuple) for value in values) and len({len(value) for value in values}) == 1:
        return tuple(_joined(*parts) for parts in zip(*values, strict=True))
    return _flat(*values)


def _dtype(type_: str) -> str:
    """The float type of an array, or "" of anything else."""
    name = type_.partition("[")[0]
    return f"float8_{name[2:]}" if name.startswith("f8") else FLOATS.get(name, "")


def _narrowed(taint: Taint, type_: str) -> Taint:
    return taint if type_.startswith("(") else narrowed(taint, _dtype(type_) or None)


def _frames(text: str) -> dict[str, str]:
    """The innermost place of each stack frame, from the tables at the head of the text."""
    head, _, rest = text[: text.find("\n\n%")].partition("\nFunctionNames\n")
    files, functions = (dict(re.findall(r'^(\d+) "(.*)"$', part, re.M)) for part in (head, rest))
    location = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+) .*\bcolumn=(\d+)"
    places = {
        at: f"{files[file]}:{line}:{column} ({functions[function]})"
        for at, file, function, line, column in re.findall(location, rest, re.M)
    }
    return {frame: places[at] for frame, at in re.findall(r"^(\d+) \{file_location_id=(\d+) ", rest, re.M)}
