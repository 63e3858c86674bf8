"""A compiled TPU program read from its text: computations, loops and how often each part runs.

The compiler's own totals count the body of a loop once, so everything here is multiplied through
the loops.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = (.*)$")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,}]+)"
)
_BODY, _CONDITION = r"body=%?([^\s,]+)", r"condition=%?([^\s,]+)"
_APPLYING = ("reduce", "reduce-window", "scatter", "sort", "all-reduce", "map")  # to elements
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of the result, a tuple in parentheses
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the attributes, as text
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression that the attributes are searched for."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def called(self) -> list[str]:
        """The computations that it names."""
        names = _CALLED.findall(self.rest)
        for found in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in found.split(",")]
        return names


class Program(NamedTuple):
    """Computations by name, and which of them is the program."""

    computations: dict[str, list[Instruction]]
    entry: str


class Loop(NamedTuple):
    """A loop whose number of rounds the text does not say."""

    name: str
    origin: str  # the operation that it was made from


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
        ValueError: if it has no entry.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            current.append(_instruction(found[1], found[2], line.lstrip().startswith("ROOT ")))
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


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def sizes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The (dtype, sizes) of an array, or of every array of a tuple."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(shape)
    ]


def nbytes(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(math.prod(dims) * width(dtype) for dtype, dims in sizes(shape))


def width(dtype: str) -> float:
    """Bytes of one element."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


class Counts(NamedTuple):
    """How often each computation runs, and what is not known."""

    times: dict[str, float]
    unknown: list[Loop]


def count(program: Program, rounds: dict[str, int]) -> Counts:
    """How often each computation runs in one run of the program.

    Args:
        program: as parsed.
        rounds: for loops whose end depends on data: a regular expression that finds their origin ->
            how often at most.
    """
    times: dict[str, float] = dict.fromkeys(program.computations, 0.0)
    unknown: list[Loop] = []

    def visit(name: str, by: float) -> None:
        times[name] += by
        for one in program.computations[name]:
            if one.opcode == "while":
                n = trips(program, name, one)
                if n is None:
                    origin = one.attribute(r'op_name="([^"]*)"') or ""
                    n = next((most for at, most in rounds.items() if re.search(at, origin)), None)
                    if n is None:
                        unknown.append(Loop(one.name, origin))
                        n = 1
                body, condition = (
                    one.attribute(_BODY),
                    one.attribute(_CONDITION),
                )
                visit(str(body), by * n)
                visit(str(condition), by * (n + 1))
            elif one.opcode not in _APPLYING:
                for called in one.called:
                    if called in program.computations:
                        visit(called, by)

    visit(program.entry, 1.0)
    return Counts(times, unknown)


def trips(program: Program, owner: str, loop: Instruction) -> int | None:
    """The rounds of a while loop that counts to a constant; None where it does not."""
    condition = program.computations[str(loop.attribute(_CONDITION))]
    body = program.computations[str(loop.attribute(_BODY))]
    known = {one.name: one for one in condition}
    root = next(one for one in condition if one.root)
    if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, end = (known.get(name) for name in root.operands[:2])
    if not counter or not end or counter.opcode != "get-tuple-element" or end.opcode != "constant":
        return None
    index = int(str(counter.attribute(r"index=(\d+)")))
    step = _increment(program, body, index)
    start = _start(program, owner, loop, index)
    if step is None or start is None:
        return None
    return max(0, -(-(int(end.operands[0]) - start) // step))


def _increment(program: Program, body: list[Instruction], index: int) -> int | None:
    """By how much a round raises element `index` of the loop's tuple."""
    known = {one.name: one for one in body}
    root = next(one for one in body if one.root)
    if root.opcode != "tuple":
        return None
    return _added(program, known, known.get(root.operands[index]), index)


def _added(
    program: Program, known: dict[str, Instruction], one: Instruction | None, index: int
) -> int | None:
    """What is added to the element on the way to an instruction; 0 where it is the element."""
    one = _copied(known, one)
    if one is None:
        return None
    if one.opcode == "get-tuple-element":
        return 0 if one.attribute(r"index=(\d+)") == str(index) else None
    if one.opcode == "add":
        parts = [_copied(known, known.get(name)) for name in one.operands]
        constants = [int(x.operands[0]) for x in parts if x and x.opcode == "constant"]
        others = [x for x in parts if x and x.opcode != "constant"]
        before = _added(program, known, others[0], index) if len(others) == 1 else None
        return None if before is None or not constants else before + constants[0]
    return None


def _copied(known: dict[str, Instruction], one: Instruction | None) -> Instruction | None:
    """What an instruction is a copy of, or itself."""
    while one is not None and one.opcode in ("copy", "bitcast") and one.operands:
        one = known.get(one.operands[0])
    return one


def _start(program: Program, owner: str, loop: Instruction, index: int) -> int | None:
    """What element `index` of the loop's tuple is at first, where that is a constant."""
    known = {one.name: one for one in program.computations[owner]}
    given = known.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return None
    one = _copied(known, known.get(given.operands[index]))
    if one is None or one.opcode != "constant":
        return None
    return int(one.operands[0])


def matmul_flops(program: Program, times: dict[str, float]) -> float:
    """Floating-point operations of all matrix products, kernels excepted."""
    total = 0.0
    for name, body in program.computations.items():
        if times[name]:
            total += times[name] * sum(_flops(one, shapes) for one, shapes in _products(body))
    return total


def _products(body: list[Instruction]) -> Iterator[tuple[Instruction, list[tuple[int, ...]]]]:
    """The matrix products of a computation, each with the sizes of both operands and the result."""
    shape_of = {one.name: one.shape for one in body}
    for one in body:
        if one.opcode in ("convolution", "dot"):
            shapes = [*(shape_of[name] for name in one.operands[:2]), one.shape]
            yield one, [sizes(shape)[0][1] for shape in shapes]


def _flops(one: Instruction, shapes: list[tuple[int, ...]]) -> float:
    """Of one product. A window may stand for batch axes, whose zeros do not count."""
    left, right, out = shapes
    if one.opcode == "dot":
        contracted = one.attribute(r"lhs_contracting_dims=\{([0-9,]*)\}") or ""
        return 2.0 * math.prod(out) * math.prod(left[int(n)] for n in contracted.split(",") if n)
    labels = str(one.attribute(r"dim_labels=([^\s,]+)"))
    lhs, rhs, result = re.split(r"_|->", labels)
    groups = int(one.attribute(r"batch_group_count=(\d+)") or 1)
    total = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")] / groups
    window = one.attribute(r"window=\{([^}]*)\}") or ""
    for axis in (label for label in rhs if label.isdigit()):
        total *= _met(
            _window(window, int(axis)),
            left[lhs.index(axis)],
            right[rhs.index(axis)],
            out[result.index(axis)],
        )
    return total


class _Window(NamedTuple):
    stride: int
    low: int
    left_dilation: int
    right_dilation: int


def _window(text: str, axis: int) -> _Window:
    def part(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([^\s]+)", text)
        return found[1].split("x")[axis] if found else default

    low = int(part("pad", "0_0").split("_")[0])
    dilations = (int(part(f"{side}_dilate", "1")) for side in ("lhs", "rhs"))
    return _Window(int(part("stride", "1")), low, *dilations)


@functools.cache
def _met(window: _Window, left: int, right: int, out: int) -> int:
    """How many pairs of a place of the result and one of the kernel meet an element, not a zero."""
    found = 0
    end = (left - 1) * window.left_dilation
    for place in range(out):
        for offset in range(right):
            at = place * window.stride + offset * window.right_dilation - window.low
            found += 0 <= at <= end and at % window.left_dilation == 0
    return found


_NO_ESTIMATE = 2**63 - 1  # what the compiler writes where it has none


def cycles(program: Program, times: dict[str, float]) -> tuple[float, float]:
    """The compiler's estimate of all scheduled operations, kernels and transfers excepted.

    Beside it the bytes that operations without an estimate (copies that a TPU7x leaves to its
    sparse cores) write.
    """
    inside = inside_fusions(program)
    total = unknown = 0.0
    for name, body in program.computations.items():
        if not times[name] or name in inside:
            continue
        for one in body:
            found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
            if found and int(found[1]) < _NO_ESTIMATE:
                total += times[name] * int(found[1])
            elif found:
                unknown += times[name] * nbytes(one.shape)
    return total, unknown


def inside_fusions(program: Program) -> set[str]:
    """The computations that a fusion stands for; it carries their cost."""
    fusions = (one for body in program.computations.values() for one in body)
    found = [name for one in fusions if one.opcode == "fusion" for name in one.called]
    inside: set[str] = set()
    while found:
        name = found.pop()
        if name in program.computations and name not in inside:
            inside.add(name)
            found += [called for one in program.computations[name] for called in one.called]
    return inside
