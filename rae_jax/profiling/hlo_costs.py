"""Costs and arrays of compiled programs, read from their HLO text. A loop counts as often as it runs.

XLA's own cost analysis counts the body of a loop once, and does not count the traffic between devices.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_TYPE = re.compile(r"\b[a-z][a-z0-9]*\[[0-9,]*\](?:\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one device in one run of a program."""

    flops: float = 0.0  # of matrix products and convolutions, two for each multiplication
    moved: float = 0.0  # bytes, about, that instructions read from and write to main memory
    sent: Counter = dataclasses.field(default_factory=Counter)  # bytes sent in a ring, by kind of collective
    cycles: float = 0.0  # of the cores, estimated by the TPU compiler; 0 from other compilers

    def __add__(self, other):
        sent = Counter({kind: self.sent[kind] + other.sent[kind] for kind in COLLECTIVES})
        return Costs(self.flops + other.flops, self.moved + other.moved, sent, self.cycles + other.cycles)

    def __mul__(self, times):
        sent = Counter({kind: self.sent[kind] * times for kind in COLLECTIVES})
        return Costs(self.flops * times, self.moved * times, sent, self.cycles * times)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text: `result` is the text of a type, `operands` are names."""

    name: str
    result: str
    opcode: str
    operands: tuple
    attributes: str


class Program:
    """A compiled module; `text` is the result of jax.stages.Compiled.as_text()."""

    def __init__(self, text):
        self._entry, self._computations = _parse(text)

    def costs(self):
        """Return the costs of the whole program. Of a conditional the most expensive branch counts."""
        return self._costs(self._entry)

    def arrays(self):
        """Return every (dtype, shape) that an instruction makes, in memory or not."""
        return {array for c in self._computations.values() for i in c.values() for array in _arrays(i.result)}

    @functools.cache  # noqa: B019  keeps the program alive; few are read
    def _costs(self, name):
        computation = self._computations[name]
        return sum((self._cost(i, computation) for i in computation.values()), Costs())

    def _cost(self, i, computation):
        kind = i.opcode.removesuffix("-start")
        if i.opcode.endswith(("-done", "-update")) or kind in COLLECTIVES and _continues_another(i, computation):
            return Costs()
        called = [self._costs(name) for name in _called(i)]
        match kind:
            case "while":
                return sum(called, Costs()) * self._trips(i, computation)
            case "conditional":
                return max(called, key=lambda costs: (costs.flops, costs.sent.total()))
            case "fusion":
                inside = sum(called, Costs())
                return Costs(inside.flops, self._moved(i, computation), _scattered(i, inside.sent), _cycles(i))
            case "dot":
                own = Costs(_dot(i, computation))
            case "convolution":
                own = Costs(_convolution(i, computation))
            case _ if kind in COLLECTIVES:
                own = Costs(sent=Counter({kind: _sent(kind, i, computation)}))
            case _:
                own = Costs()
        return sum(called, own + Costs(moved=self._moved(i, computation), cycles=_cycles(i)))

    def _moved(self, i, computation):
        """Return the bytes that an instruction reads and writes in main memory; of a sliced array, the slice's."""
        if i.opcode in _MOVE_NOTHING or "AllocateBuffer" in i.attributes:
            return 0.0
        fused = self._computations[_called(i)[0]] if i.opcode == "fusion" else None
        read = sum(_read(i, n, computation, fused) for n in range(len(i.operands)))
        return read + (_main_memory(_result_type(i)) if fused is None else _written(i, fused))

    def _trips(self, loop, computation):
        """Return how often a loop runs: XLA's note, or from its condition `counter < limit` and the counter's step."""
        if known := re.search(r'known_trip_count[^0-9]*"(\d+)"', loop.attributes):
            return int(known[1])
        names = {key: re.search(rf"{key}=%?([\w.-]+)", loop.attributes)[1] for key in ("condition", "body")}
        condition, body = (self._computations[names[key]] for key in ("condition", "body"))
        compared = _follow(list(condition.values())[-1], condition)
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            raise ValueError(f"cannot tell how often {loop.name} runs: its condition is {compared}")
        counter, limit = (_follow(condition[name], condition) for name in compared.operands)
        element = re.search(r"index=(\d+)", counter.attributes)
        start = _follow(computation[loop.operands[0]], computation)
        first = _follow(computation[start.operands[int(element[1])]], computation) if start.opcode == "tuple" else None
        begin = int(first.attributes) if first is not None and first.opcode == "constant" else 0
        moved = _follow(body[list(body.values())[-1].operands[int(element[1])]], body)
        steps = [_follow(body[name], body) for name in moved.operands if name in body]
        step = next((int(s.attributes) for s in steps if s.opcode == "constant"), 1)
        return math.ceil((int(limit.attributes) - begin) / step)


_MOVE_NOTHING = (
    *("tuple", "get-tuple-element", "bitcast", "parameter", "constant", "iota", "after-all", "partition-id"),
    *("while", "conditional", "call"),
)


def _read(i, n, computation, fused):
    """Return the bytes that an instruction reads of its n-th operand."""
    operand = computation.get(i.operands[n])
    size = _main_memory(operand.result) if operand else 0.0
    if not size or i.opcode == "dynamic-update-slice" and n == 0:
        return 0.0
    if i.opcode in ("dynamic-slice", "slice", "slice-start", "gather") and n == 0:
        return min(size, _bytes(_arrays(_result_type(i))))
    if fused is None:
        return size
    parameter = next(p.name for p in fused.values() if p.opcode == "parameter" and p.attributes == str(n))
    uses = [(use, use.operands.index(parameter)) for use in fused.values() if parameter in use.operands]
    if all(use.opcode in ("dynamic-slice", "dynamic-update-slice") and place == 0 for use, place in uses):
        return sum(_bytes(_arrays(use.result)) for use, _ in uses if use.opcode == "dynamic-slice")
    return size


def _result_type(i):
    """Return the type of a result; an asynchronous start is without the operands and flags that it passes on."""
    parts = _TYPE.findall(i.result)
    return parts[i.opcode != "copy-start"] if i.opcode.endswith("-start") and len(parts) > 1 else i.result


def _written(i, fused):
    """Return the bytes that a fusion writes; of an array updated in place only the update counts."""
    root = list(fused.values())[-1]
    parts, results = _TYPE.findall(i.result), [root]
    if root.opcode == "tuple":
        results = [fused[name] for name in root.operands]
    elif len(parts) > 1:
        return _main_memory(i.result)
    total = 0.0
    for part, result in zip(parts, results, strict=True):
        made, size = _follow(result, fused), _main_memory(part)
        in_place = made.opcode == "dynamic-update-slice"
        total += min(size, _bytes(_arrays(fused[made.operands[1]].result))) if in_place else size
    return total


def _cycles(i):
    """Return the cycles that the TPU compiler estimates for an instruction when it chooses the instruction's tiling."""
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return float(found[1]) if found and int(found[1]) < 2**63 else 0.0  # -1 as an unsigned number: unknown


def _scattered(fusion, sent):
    """Return the bytes that a fusion sends. A TPU's fused all-reduce and slice is a reduce-scatter: it sends half."""
    if not re.search(r"calls=%?all-reduce-scatter", fusion.attributes):
        return sent
    return Counter({**sent, "all-reduce": 0, "reduce-scatter": sent["reduce-scatter"] + sent["all-reduce"] / 2})


def _continues_another(i, computation):
    """Return whether a collective continues one that an earlier fusion began; a chain repeats its name."""
    return "chain_id" in i.attributes and not any("AsyncCollectiveStart" in o.attributes for o in computation.values())


def _parse(text):
    """Return (name of the entry, {computation: {name: Instruction}}); the root is the last instruction."""
    entry, computations, current = None, {}, None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$", line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return entry, computations


def _instruction(line):
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode = _OPCODE.match(rest)
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    if opcode[1] in ("constant", "parameter"):
        return Instruction(name.lstrip("%"), result, opcode[1], (), inside)
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(name.lstrip("%"), result, opcode[1], operands, rest[close + 1 :])


def _closing(text, start):
    depth = 0
    for n in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[n], 0)
        if depth == 0:
            return n
    raise ValueError(f"unbalanced parentheses: {text}")


def _called(i):
    names = []
    for match in _CALLED.finditer(i.attributes):
        listed = re.match(r"\{[^}]*\}|%?[\w.-]+", i.attributes[match.end() :])[0]
        names += re.findall(r"[\w.-]+", listed)
    return names if i.opcode not in (*COLLECTIVES, "reduce", "sort", "scatter") else []


def _follow(i, computation):
    """Return the instruction behind copies and conversions."""
    while i.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start") and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i


def _arrays(text):
    """Return [(dtype, shape)] of a type, one for each member of a tuple."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text)]


def _main_memory(text):
    """Return the bytes of the members of a type that lie in main memory, not in another memory space."""
    return sum(_bytes(_arrays(part)) for part in _TYPE.findall(text) if "S(" not in part)


def _bytes(arrays):
    return sum(math.prod(shape) * _bits(dtype) for dtype, shape in arrays) / 8


def _bits(dtype):
    found = _BITS.match(dtype)  # f32, bf16, s8, f8e4m3; pred has none
    return int(found[1]) if found else 8


def _sent(kind, i, computation):
    """Return the bytes that a device sends in one collective over a ring of n devices."""
    size = sum(_bytes(_arrays(computation[name].result)) for name in i.operands)
    if kind == "collective-permute":
        return size
    n = _group_size(i.attributes)
    return {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n) * size


def _group_size(attributes):
    """Return the number of devices in a group; replica groups have several notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # [groups,size]<=[devices]
        return int(counted[1])
    return re.search(r"replica_groups=\{\{?([\d,]*)", attributes)[1].count(",") + 1


def _dot(i, computation):
    (_, left), *_ = _arrays(computation[i.operands[0]].result)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1]
    inner = math.prod(left[int(n)] for n in contracted.split(",") if n)
    (_, out), *_ = _arrays(i.result)
    return 2.0 * math.prod(out) * inner


def _convolution(i, computation):
    """Return the FLOPs of a convolution, without products with padding or with the gaps of dilation."""
    shapes = [_arrays(computation[name].result)[0][1] for name in i.operands]
    shapes.append(_arrays(i.result)[0][1])
    labels = re.split("_|->", re.search(r"dim_labels=([\w>-]+)", i.attributes)[1])
    left, kernel, out = (dict(zip(label, shape, strict=True)) for label, shape in zip(labels, shapes, strict=True))
    window = _window(i.attributes)
    groups = int((re.search(r"batch_group_count=(\d+)", i.attributes) or ("", "1"))[1])
    products = kernel["i"] * kernel["o"] * left["b"] / groups
    for n, dim in enumerate(sorted(key for key in out if key.isdigit())):
        products *= _overlaps(left[dim], kernel[dim], out[dim], {key: value[n] for key, value in window.items()})
    return 2.0 * products


def _window(attributes):
    """Return {'stride': [...], ...} by spatial axis; the defaults are 1, and no padding."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(item.split("=") for item in found[1].split()) if found else {}
    rank = len(given.get("size", "").split("x"))
    window = {"pad": [int(p.split("_")[0]) for p in given.get("pad", "x".join(["0_0"] * rank)).split("x")]}
    for key in ("stride", "lhs_dilate", "rhs_dilate"):
        window[key] = [int(n) for n in given.get(key, "x".join(["1"] * rank)).split("x")]
    return window


def _overlaps(size, kernel, out, window):
    """Return the number of (output, kernel) positions that meet an element of the input, along one axis."""
    count = 0
    for k in range(kernel):
        first = k * window["rhs_dilate"] - window["pad"]
        positions = range(first, first + out * window["stride"], window["stride"])
        inside = range(0, (size - 1) * window["lhs_dilate"] + 1, window["lhs_dilate"])
        count += sum(1 for p in positions if p in inside)
    return count
