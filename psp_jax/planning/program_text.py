"""What the text of a compiled program (`compiled.as_text()`, HLO) tells: estimated cycles and collectives.

The TPU compiler writes its own estimate of the cycles beside every instruction but collectives, copies that run beside
the computation, and some few others, which are listed. All numbers are of one chip.
"""

import collections
import math
import re
from dataclasses import dataclass, field

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Of these a missing estimate is told: they move or compute as much as a fusion may.
_WORK = ("convolution", "dot", "fusion", "reduce", "reduce-window", "scatter", "select-and-scatter", "sort")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"([a-z]+\d*)[a-z\d]*\[([\d,]*)\]")


@dataclass
class Traffic:
    """The collectives of one kind.

    Attributes:
      count: how many run; an asynchronous one is one.
      bytes: of what they give: the sums, the gathered array, a shard of the sums, the exchanged or received array.
      least: bytes that must leave or enter a chip, by whatever algorithm without sums in the network.
      groups: how many chips take part in one together.
    """

    count: int = 0
    bytes: int = 0
    least: float = 0.0
    groups: set[int] = field(default_factory=set)


@dataclass
class Cost:
    """Cycles and collectives of one run of a computation.

    Attributes:
      cycles: as the compiler estimates them; of the branches of a conditional the dearest counts.
      traffic: by kind of collective.
      loops: cycles of one turn of each loop whose number of turns is not known, in the order of the program; `cycles`
        holds one turn of each.
      unpriced: how many instructions, by operation, have no estimate.
    """

    cycles: int = 0
    traffic: dict[str, Traffic] = field(default_factory=lambda: collections.defaultdict(Traffic))
    loops: list[int] = field(default_factory=list)
    unpriced: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add what another computation costs each of `times` times."""
        self.cycles += times * other.cycles
        self.loops += other.loops
        for operation, count in other.unpriced.items():
            self.unpriced[operation] += times * count
        for kind, theirs in other.traffic.items():
            ours = self.traffic[kind]
            ours.count += times * theirs.count
            ours.bytes += times * theirs.bytes
            ours.least += times * theirs.least
            ours.groups |= theirs.groups


def program_cost(text: str) -> Cost:
    """Add up what the entry computation of a program costs, loops times their turns."""
    bodies, entry = _computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    chips = int(partitions[1]) if partitions else 1
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = total = Cost()
            for line in bodies[name]:
                if found := _INSTRUCTION.match(line):
                    count(total, name, line, found[1], found[2])
        return known[name]

    def count(total: Cost, name: str, line: str, shape: str, operation: str) -> None:
        cycles = _CYCLES.search(line)
        if cycles:
            total.cycles += int(cycles[1])
        elif operation in _WORK:
            total.unpriced[operation] += 1
        kind = operation.removesuffix("-start")
        if kind in _COLLECTIVES and not _carries_on(line, bodies[name]):
            total.add(Cost(traffic={kind: _traffic(kind, operation != kind, shape, line, chips)}))
        if operation == "while":
            turns, turn = _turns(line, bodies), Cost()
            for part in _called(line, "condition|body"):
                turn.add(of(part))
            total.add(turn, turns or 1)
            total.loops += [] if turns else [turn.cycles]
        elif operation == "conditional":
            branches = _called(line, "true_computation|false_computation|branch_computations")
            total.add(max((of(branch) for branch in branches), key=lambda branch: branch.cycles))
        elif operation == "call":
            for part in _called(line, "to_apply"):
                total.add(of(part))
        elif operation in ("fusion", "async-start"):  # their cycles stand beside themselves
            for part in _called(line, "calls"):
                total.add(Cost(traffic=of(part).traffic))

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by its name, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    if not entry:
        raise ValueError("This is no text of a compiled program: it has no ENTRY computation.")
    return bodies, entry


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    """Return how many turns a while loop takes, 0 where that is not known.

    Where the compiler does not say so, as the one for TPUs often does not, a loop that `lax.scan` made counts from 0,
    by 1, to a constant that its condition holds.
    """
    if told := _TRIPS.search(line):
        return int(told[1])
    lines = bodies[_called(line, "condition")[0]]
    for test in lines:
        if found := re.search(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", test):
            constants = (re.search(rf"%?{re.escape(found[1])} = s32\S* constant\((\d+)\)", entry) for entry in lines)
            return next((int(constant[1]) for constant in constants if constant), 0)
    return 0


def _called(line: str, attributes: str) -> list[str]:
    """Return the names of the computations that `attributes` (a|b) of an instruction name, alone or in {}."""
    named = re.findall(rf"\b(?:{attributes})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", line)
    return [part.strip().lstrip("%") for several, one in named for part in (several or one).split(",")]


def _carries_on(line: str, body: list[str]) -> bool:
    """Say whether a collective was begun by another fusion, which counts it.

    The TPU compiler spreads an asynchronous collective over fusions: each repeats it with the same chain_id, the first
    beside AsyncCollectiveStart.
    """
    return 'chain_id="' in line and not any('"AsyncCollectiveStart"' in other for other in body)


def _traffic(kind: str, asynchronous: bool, shape: str, line: str, chips: int) -> Traffic:
    parts = _elements(shape)
    if asynchronous and kind in ("all-gather", "collective-permute"):
        parts = parts[1:2]  # (what is given, what is received, and for a permute two words of the hardware)
    size = sum(_bytes(part) for part in parts)
    group = 2 if kind == "collective-permute" else _group_size(line, chips)
    share = (group - 1) / group
    least = {
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (group - 1),  # `size` is a shard
        "collective-permute": size,
    }.get(kind, size * share)
    return Traffic(1, size, least, {group})


def _elements(shape: str) -> list[str]:
    """Return the parts of the text of a tuple's shape, or the one shape, without layouts and comments."""
    shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(shape: str) -> int:
    """Return the bytes of all arrays in the text of a shape, without the padding of tiles: bf16[2,3] has 12."""
    total = 0
    for kind, sides in _SHAPE.findall(shape):
        bits = int(re.sub(r"\D", "", kind) or 8)  # pred, which has no number, is a byte
        total += math.prod(int(side) for side in sides.split(",") if side) * bits // 8
    return total


def _group_size(line: str, chips: int) -> int:
    """Return how many chips an instruction's replica_groups join, in each of the three ways that XLA writes them."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sides = dict(part.split("=") for part in found[1].split(","))
        return math.prod(int(sides[axis.strip()]) for axis in found[2].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return chips
