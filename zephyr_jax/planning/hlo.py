"""A compiled TPU program read from its text: computations, loops and how often each part runs.

The compiler's own totals count the body of a loop once, so everything here is multiplied through
the loops. The text has no stable form: every pattern was read from programs of libtpu 0.0.42.1, and
`tests/stored/plan_small.json.gz` is a whole program of that version.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

# libtpu 0.0.42.1, stored sample: `%name (x: f32[2]) -> f32[2] {` and `  ROOT %a = f32[2] add(...)`
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
# libtpu 0.0.42.1, stored sample; the sample has no conditional, `branch_computations` is HLO's own
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY, _CONDITION = r"body=%?([^\s,]+)", r"condition=%?([^\s,]+)"
_INDEX = r"index=(\d+)"
_ORIGIN = r'op_name="([^"]*)"'
# libtpu 0.0.42.1, stored sample; operations that libtpu leaves without an estimate have 2**63 - 1
_CYCLES = r'"estimated_cycles":"(\d+)"'
_NO_ESTIMATE = 2**63 - 1

_APPLYING = ("reduce", "reduce-window", "scatter", "sort", "all-reduce", "map")  # to elements
_ELEMENT_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of the result; a tuple is in parentheses
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes; None if it is absent."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    @property
    def origin(self) -> str:
        """The JAX operation that the instruction comes from."""
        return self.attribute(_ORIGIN) or ""

    @property
    def called(self) -> list[str]:
        """The computations that it names."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names


class Program(NamedTuple):
    """Computations by name, and which of them is the program."""

    computations: dict[str, list[Instruction]]
    entry: str


class Counts(NamedTuple):
    """How often each computation runs, and the loops whose number of rounds is not known."""

    times: dict[str, float]
    unknown: list[Instruction]


def parse(text: str) -> Program:
    """Reads the text of a compiled program; a ValueError if it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            current.append(_instruction(match[2], match[3], root=bool(match[1])))
    if not entry:
        raise ValueError("the compiled program's text has no entry computation")
    return Program(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    if text.startswith("("):
        end = _closing(text, 0) + 1
        shape, text = text[:end], text[end:].lstrip()
    else:
        shape, _, text = text.partition(" ")
    opcode, _, _ = text.partition("(")
    end = _closing(text, len(opcode))
    inside = re.sub(r"/\*.*?\*/", "", text[len(opcode) + 1 : end])
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    if opcode == "constant":
        operands = (inside,)
    return Instruction(name, shape, opcode, operands, text[end + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position
    return len(text)


def array_shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (dtype, sizes) of an array, or of every array of a tuple."""
    found = _SHAPE.findall(shape)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


def nbytes(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(math.prod(dims) * element_bytes(dtype) for dtype, dims in array_shapes(shape))


def element_bytes(dtype: str) -> float:
    """Bytes of one element."""
    if dtype in _ELEMENT_BYTES:
        return _ELEMENT_BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def count(program: Program, rounds: dict[str, int]) -> Counts:
    """How often each computation runs in one run of the program.

    `rounds`, for loops whose end depends on data: a pattern of their origin -> the most rounds.
    """
    times: dict[str, float] = dict.fromkeys(program.computations, 0.0)
    unknown: list[Instruction] = []

    def visit(name: str, by: float) -> None:
        times[name] += by
        for one in program.computations[name]:
            if one.opcode == "while":
                n = trips(program, name, one)
                if n is None:
                    matching = (most for at, most in rounds.items() if re.search(at, one.origin))
                    n = next(matching, None)
                if n is None:
                    unknown.append(one)
                    n = 1
                visit(str(one.attribute(_BODY)), by * n)
                visit(str(one.attribute(_CONDITION)), by * (n + 1))
            elif one.opcode not in _APPLYING:
                for called in one.called:
                    if called in program.computations:
                        visit(called, by)

    visit(program.entry, 1.0)
    return Counts(times, unknown)


def trips(program: Program, owner: str, loop: Instruction) -> int | None:
    """The rounds of a while loop that counts to a constant; None if it does not."""
    names = (owner, str(loop.attribute(_BODY)), str(loop.attribute(_CONDITION)))
    before, body, condition = ({x.name: x for x in program.computations[name]} for name in names)
    result, test = (next(one for one in x.values() if one.root) for x in (body, condition))
    forms = result.opcode, test.opcode, test.attribute(r"direction=(\w+)")
    if forms != ("tuple", "compare", "LT"):
        return None
    try:
        initial, counter = before[loop.operands[0]], condition[test.operands[0]]
        if (initial.opcode, counter.opcode) != ("tuple", "get-tuple-element"):
            return None
        index = int(str(counter.attribute(_INDEX)))
        start = _value(before, initial.operands[index], {})
        end = _value(condition, test.operands[1], {})
        step = _value(body, result.operands[index], {index: start}) - start
    except LookupError:
        return None
    return max(0, -(-(end - start) // step)) if step else None


def _value(body: dict[str, Instruction], name: str, known: dict[int, int]) -> int:
    """A sum of constants and of the `known` elements of a tuple; a LookupError if it is not one."""
    one = body[name]
    if one.opcode == "constant":
        return int(one.operands[0])
    if one.opcode == "get-tuple-element":
        return known[int(str(one.attribute(_INDEX)))]
    if one.opcode not in ("copy", "bitcast", "add"):
        raise LookupError(f"{name} is not a sum")
    return sum(_value(body, operand, known) for operand in one.operands)


def cycles(program: Program, times: dict[str, float]) -> tuple[float, float]:
    """The compiler's estimated cycles, and bytes written by operations without an estimate.

    Kernels and transfers have none; copies on the sparse cores of a TPU7x count by their bytes.
    """
    inside = inside_fusions(program)
    total = without_estimate = 0.0
    for name, body in program.computations.items():
        if not times[name] or name in inside:
            continue
        for one in body:
            estimated = int(one.attribute(_CYCLES) or 0)
            if estimated < _NO_ESTIMATE:
                total += times[name] * estimated
            else:
                without_estimate += times[name] * nbytes(one.shape)
    return total, without_estimate


def inside_fusions(program: Program) -> set[str]:
    """The computations that a fusion stands for; the fusion carries their cost."""
    instructions = (one for body in program.computations.values() for one in body)
    names = [name for one in instructions if one.opcode == "fusion" for name in one.called]
    inside: set[str] = set()
    while names:
        name = names.pop()
        if name in program.computations and name not in inside:
            inside.add(name)
            names += [called for one in program.computations[name] for called in one.called]
    return inside
