"""What a compiled XLA module does, counted from its text: FLOPs, HBM and collective bytes.

It is counted by hand, because XLA's own `cost_analysis` counts the body of a loop once; here it
counts as often as it runs. All numbers are those of one chip, since a partitioned module is what
one chip runs. What is not counted: the inside of Pallas kernels (`topology.kernel_flops` counts
their products elsewhere), the FLOPs of anything but matrix products, and the padding of tiled
arrays.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r'(ENTRY )?%(\S+) .*\{$')
# The type of a result may hold spaces, if it is a tuple, but none before a word and a bracket.
_INSTRUCTION = re.compile(r'  (ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_ELSEWHERE = re.compile(r'S\([1-9]')  # a memory other than the HBM
_NAME = r'%([\w.-]+)'
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# These move nothing: names of other values, buffers without contents, the ends of asynchronous
# instructions, and loops and calls, whose insides are counted instead.
_FREE = re.compile(
    'parameter|constant|tuple|get-tuple-element|bitcast|after-all|opt-barrier|partition-id|'
    'replica-id|while|conditional|call|async-start|.*-done'
)


class Chip(NamedTuple):
    """Rates of one chip, as cloud.google.com/tpu/docs/{v5e,v5p,v6e} gives them."""

    peak_flops: float  # bfloat16, 1/s
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that a chip can send, over all its links


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool  # else in a memory that the type names: S(1) is VMEM, S(6) SMEM

    @property
    def bytes(self) -> float:
        bits = re.search(r'\d+', self.dtype)  # of f32, bf16, s4; none in pred and token
        width = int(bits[0]) / 8 if bits else float(self.dtype == 'pred')
        return width * math.prod(self.dims)


class Instruction(NamedTuple):
    is_root: bool
    shapes: tuple[Shape, ...]  # of the result; several if it is a tuple
    opcode: str
    arguments: str  # as written; a parameter's is its number, a constant's its value
    operands: list[str]  # names of the values among the arguments
    attributes: str  # as written

    @property
    def called(self) -> str:
        """The computation that a fusion, a call or a loop runs."""
        return _search(rf'\b(?:calls|body|to_apply)={_NAME}', self.attributes)[1]


Computation = dict[str, Instruction]  # by name


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does, and the least time that it takes for it."""

    flops: float = 0.0  # of matrix products; a multiply and an add are two
    hbm_bytes: float = 0.0  # read and written
    sent_bytes: float = 0.0  # over the interconnect, as rings would
    seconds: float = 0.0  # see `module_cost`

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: float) -> 'Cost':
        return Cost(*(times * value for value in dataclasses.astuple(self)))


def module_cost(text: str, chip: Chip, *, devices: int, unknown_trips: int) -> Cost:
    """The cost of `compiled.as_text()`, each loop counted as often as it runs.

    A loop runs as often as the constant says that its condition compares with, and `unknown_trips`
    times if there is none. `devices` take part in a collective whose groups are not written out.
    `seconds` sums, over the instructions of the schedule, the longest of an instruction's FLOPs,
    HBM bytes and sent bytes at the chip's rates. What an asynchronous collective sends is not in
    it: the schedule goes on meanwhile.
    """
    computations, entry = _parse(text)
    return _Module(computations, chip, devices, unknown_trips).cost(entry)


# ------------------------------------------------------------------------------- reading the text


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f'the compiler wrote {text!r}; expected {pattern} in it: planner/hlo.py has to learn '
            'how this version writes it'
        )
    return found


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name; the name of the entry)."""
    computations, entry, current = {}, '', {}
    for line in text.splitlines():
        computation, found = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if found:
            root, name, result, opcode, arguments, attributes = found.groups('')
            shapes = tuple(
                Shape(dtype, _numbers(dims), not _ELSEWHERE.search(tiles))
                for dtype, dims, tiles in _SHAPE.findall(result)
            )
            operands = re.findall(_NAME, arguments)
            current[name] = Instruction(bool(root), shapes, opcode, arguments, operands, attributes)
        elif computation:
            current = computations[computation[2]] = {}
            entry = computation[2] if computation[1] else entry
    return computations, entry


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', text)))


# -------------------------------------------------------------------------------------- counting


@dataclasses.dataclass(eq=False)
class _Module:
    computations: dict[str, Computation]
    chip: Chip
    devices: int
    unknown_trips: int

    @functools.cache  # noqa: B019  the cache lives as long as the one count that it is made for
    def cost(self, name: str) -> Cost:
        """The cost of a computation that is a schedule: the entry, a loop's body, a branch."""
        defined = self.computations[name]
        return sum((self._instruction(defined, i) for i in defined.values()), start=Cost())

    def _instruction(self, defined: Computation, i: Instruction) -> Cost:
        if i.opcode == 'while':
            return self.cost(i.called) * self._trips(defined, i)
        if i.opcode == 'conditional':
            branches = [n for n in re.findall(_NAME, i.attributes) if n in self.computations]
            return max(map(self.cost, branches), key=lambda cost: cost.seconds)
        if i.opcode in ('call', 'async-start'):
            return self.cost(i.called)
        flops, sent = self._work(defined, i)
        moved = self._traffic(defined, i)
        waited_for = 0.0 if i.opcode.endswith('-start') else sent
        seconds = max(
            flops / self.chip.peak_flops,
            moved / self.chip.hbm_bandwidth,
            waited_for / self.chip.ici_bandwidth,
        )
        return Cost(flops, moved, sent, seconds)

    def _work(self, defined: Computation, i: Instruction) -> tuple[float, float]:
        """(FLOPs, bytes sent) of one instruction; a fusion's are those of all that is in it."""
        operands = [defined[operand] for operand in i.operands]
        if i.opcode == 'fusion':
            inside = self.computations[i.called]
            work = [self._work(inside, j) for j in inside.values()]
            sent = sum(sent for _, sent in work)
            # A TPU's reduce-scatter: an all-reduce of which each chip keeps, and is sent, a part.
            sent /= 2 if i.called.startswith('all-reduce-scatter') else 1
            return sum(flops for flops, _ in work), sent
        if i.opcode in ('convolution', 'dot'):
            return _product_flops(i, *(operand.shapes[0] for operand in operands)), 0.0
        kind = i.opcode.removesuffix('-start')
        if kind in _COLLECTIVES:
            size = sum(shape.bytes for operand in operands for shape in operand.shapes)
            n = self._group(i.attributes)
            share = {
                'all-gather': n - 1,
                'all-reduce': 2 * (n - 1) / n,
                'collective-permute': 1,
            }.get(kind, (n - 1) / n)
            return 0.0, size * share
        return 0.0, 0.0

    def _group(self, attributes: str) -> int:
        """How many chips take part in one group of a collective."""
        groups = re.search(r'replica_groups=(\S*( \{[^}]*\})?)', attributes)
        text = groups[1] if groups else ''
        if text.startswith('mesh'):
            axes = dict(re.findall(r"'(\w+)'=(\d+)", text))
            used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", text.partition('{')[2])
            return math.prod(int(part or axes[axis]) for axis, part in used)
        size = re.match(r'\[\d+,(\d+)\]', text)
        if size:
            return int(size[1])
        members = re.match(r'\{\{([\d,]+)\}', text)
        return len(members[1].split(',')) if members else self.devices

    def _trips(self, defined: Computation, loop: Instruction) -> int:
        """How often a loop runs whose counter grows by a constant to a constant."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[_search(f'condition={_NAME}', loop.attributes)[1]]
        test = _root(condition)
        if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
            return self.unknown_trips
        counter, end = condition[test.operands[0]], _number(condition, test.operands[1])
        if counter.opcode != 'get-tuple-element' or end is None:
            return self.unknown_trips
        k = int(_search(r'index=(\d+)', counter.attributes)[1])
        first, body = defined[loop.operands[0]], self.computations[loop.called]
        start = _number(defined, first.operands[k]) if first.opcode == 'tuple' else None
        return -(-(end - (start or 0)) // _increment(body, _root(body).operands[k]))

    # ---- HBM

    def _traffic(self, defined: Computation, i: Instruction) -> float:
        """Bytes that an instruction of the schedule reads from HBM and writes to it."""
        if _FREE.fullmatch(i.opcode) or '"AllocateBuffer"' in i.attributes:
            return 0.0
        read = sum(
            self._read(defined, i, k)
            for k, operand in enumerate(i.operands)
            if all(shape.in_hbm for shape in defined[operand].shapes)
        )
        return read + self._written(defined, i)

    def _read(self, defined: Computation, i: Instruction, k: int) -> float:
        """Bytes of operand k that `i` reads: a slice reads its result, a fusion as its insides."""
        whole = sum(shape.bytes for shape in defined[i.operands[k]].shapes)
        match i.opcode:
            case 'dynamic-slice' | 'slice' | 'gather' if k == 0:
                return i.shapes[0].bytes
            case 'dynamic-update-slice' if k == 0:
                return 0.0  # it is written in place
            case 'fusion':
                inside = self.computations[i.called]
                numbers = {j.arguments: n for n, j in inside.items() if j.opcode == 'parameter'}
                return min(whole, self._read_by_users(inside, numbers[str(k)]))
        return whole

    def _read_by_users(self, defined: Computation, name: str) -> float:
        total = 0.0
        for other, user in defined.items():
            if name in user.operands:
                if user.opcode == 'bitcast':
                    total += self._read_by_users(defined, other)
                else:
                    total += self._read(defined, user, user.operands.index(name))
        return total

    def _written(self, defined: Computation, i: Instruction) -> float:
        """Bytes of the result that land in HBM; of an update in place, those of the update."""
        shapes = i.shapes
        match i.opcode:
            case 'copy-start':  # result, operand, context
                shapes = shapes[:1]
            case 'all-gather-start' | 'collective-permute-start':  # operand, result, contexts
                shapes = shapes[1:]
            case 'dynamic-update-slice':
                return defined[i.operands[1]].shapes[0].bytes if shapes[0].in_hbm else 0.0
            case 'fusion':
                return self._written_by_fusion(i)
        return sum(shape.bytes for shape in shapes if shape.in_hbm)

    def _written_by_fusion(self, i: Instruction) -> float:
        inside = self.computations[i.called]
        root = _root(inside)
        parts = [inside[o] for o in root.operands] if root.opcode == 'tuple' else [root]
        total = 0.0
        for shape, part in zip(i.shapes, parts):
            while part.opcode == 'bitcast':
                part = inside[part.operands[0]]
            if part.opcode == 'dynamic-update-slice':
                shape = inside[part.operands[1]].shapes[0]._replace(in_hbm=shape.in_hbm)
            total += shape.bytes if shape.in_hbm else 0.0
        return total


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _number(computation: Computation, name: str) -> int | None:
    """The integer that a value is, or None if it is no constant."""
    i = computation[name]
    while i.opcode in ('copy', 'bitcast'):
        i = computation[i.operands[0]]
    return int(i.arguments) if i.opcode == 'constant' and i.arguments.isdigit() else None


def _increment(body: Computation, name: str) -> int:
    """By how much a body's end has increased the loop's counter; one unrolled by two adds 2."""
    total, i = 0, body[name]
    while i.opcode in ('add', 'copy', 'bitcast'):
        numbers = [_number(body, operand) for operand in i.operands]
        total += next((n for n in numbers if n is not None), 0)
        i = body[next((o for o, n in zip(i.operands, numbers) if n is None), i.operands[0])]
    return total or 1


def _product_flops(i: Instruction, lhs: Shape, rhs: Shape) -> float:
    """FLOPs of a product: 2 x the elements of the result x the products that each sums."""
    if i.opcode == 'dot':
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
        dims = _numbers(contracted[1]) if contracted else ()
        return 2.0 * math.prod(i.shapes[0].dims) * math.prod(lhs.dims[d] for d in dims)
    # TPUs write every product as a convolution, with heads or batches as padded spatial dimensions:
    # only the pairs of a result and a window position that do not fall on padding are products.
    labels = _search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
    lhs_names, rhs_names, out_names = labels.groups()
    size = dict(zip(lhs_names, lhs.dims))
    kernel = dict(zip(rhs_names, rhs.dims))
    out = dict(zip(out_names, i.shapes[0].dims))
    pairs = math.prod(
        _pairs(size[d], kernel[d], out[d], *_window(i.attributes, int(d)))
        for d in out_names
        if d.isdigit()
    )
    # If the convolution has groups, the kernel's input features are those of one group already.
    return 2.0 * out['b'] * out['f'] * kernel['i'] * pairs


def _window(attributes: str, d: int) -> list[int]:
    """[stride, padding before, dilation of the input, and of the kernel] of spatial dimension d.

    They are written for all dimensions together, as in window={size=1x3 pad=0_0x2_2 stride=1x2}.
    """
    parts = dict(re.findall(r'(\w+)=(\S+)', _search(r'window=\{([^}]*)\}', attributes)[1]))
    defaults = {'stride': '1', 'pad': '0', 'lhs_dilate': '1', 'rhs_dilate': '1'}
    written = [parts[key].split('x')[d] if key in parts else defaults[key] for key in defaults]
    return [int(text.partition('_')[0]) for text in written]


def _pairs(size, kernel, out, stride, before, dilation, kernel_dilation) -> int:
    """How many pairs (result position, kernel position) meet an element of the input."""
    end = (size - 1) * dilation
    places = (o * stride + k * kernel_dilation - before for o in range(out) for k in range(kernel))
    return sum(0 <= place <= end and place % dilation == 0 for place in places)
