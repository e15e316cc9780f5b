"""The op as a Pallas GPU kernel on the Mosaic GPU backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, G threads of a row, V lanes of a vector.

The kernel is written per thread, as one `inline_mgpu` body: G threads of a warp own a row (token, head), keep it in
registers and sum it with lane shuffles. That fixes what array code leaves to the compiler: width and address space of
every access, order of the sum, form of every rounding. Pallas's interpret mode can't run such a body;
`tests/mosaic_interpreter.py` runs the emitted code instead.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxlib.mlir.dialects import arith

from pallas_qk._mosaic_gpu.config import MosaicForward, mosaic_forward, widest_vector
from pallas_qk._mosaic_gpu.emit import (
    ACCESS_BYTES,
    WARP,
    WARPGROUP,
    Int,
    Pointer,
    Value,
    bits_of,
    constant,
    keep_above,
    narrow,
    select,
    thread_index,
    when,
    widen,
)
from pallas_qk._mosaic_gpu.launch import launch
from pallas_qk._mosaic_gpu.thread import (
    Destination,
    Layout,
    RowsIn,
    Slot,
    Table,
    Vector,
    copied_vectors,
    effective_weights,
    frequencies_of_pairs,
    inv_rms,
    rotate,
    spread_k,
    sum_of_squares,
    vector,
)
from pallas_qk._options import Options, Spec, chunk_lanes, next_power_of_2, rotation_fuses_y2
from pallas_qk._rows import (
    Inputs,
    Outputs,
    Place,
    Rows,
    empty,
    output_types,
    rows_for,
    sharing,
    spec_of,
    stored,
    weight_of,
    with_caches,
)

FORWARD_NAME = "pallas_qk_mosaic_gpu_forward"


def forward(inputs: Inputs, *, options: Options, config: MosaicForward | None = None) -> Outputs:
    """The contract of `_reference.forward`."""
    spec, types = spec_of(inputs, options), output_types(inputs, options)
    if spec.num_tokens == 0:
        return empty(with_caches(inputs, types)[1])
    rows = rows_for(spec, options)
    config = config or configuration(inputs, options)
    inputs, written = with_caches(inputs, types)
    layout = _layout(config, spec, inputs.q.dtype)
    groups_per_program = WARPGROUP // layout.threads
    works = {heads: _works(rows, heads) for heads in ("q", "k")}
    programs_each = {
        heads: pl.cdiv(spec.num_tokens * num_heads // config.heads_of(num_heads), groups_per_program)
        for heads, num_heads in (("q", spec.num_q_heads), ("k", spec.num_kv_heads))
    }
    num_programs = sum(len(works[heads]) * programs_each[heads] for heads in works)
    thread = functools.partial(
        _forward_thread,
        works=works,
        groups_per_program=groups_per_program,
        programs_each=programs_each,
        max_position=0 if inputs.cos_sin_cache is None else inputs.cos_sin_cache.shape[0],
        spec=spec,
        options=options,
        config=config,
        layout=layout,
    )
    return launch(FORWARD_NAME, thread, inputs, written, num_programs=num_programs, num_warpgroups=1)


class _Work(NamedTuple):
    """The kinds of rows that one thread treats together: they share an axis of heads."""

    normed: Rows
    copied: list[Rows]


def _works(rows: dict[str, Rows], heads: str) -> list[_Work]:
    """What programs of these heads do: one kind of rows that are normalised each, and the first copies the others.

    A thread with k and a normalised v would need registers for both, and so would each thread of the kernel (H200, 16/2
    heads, T = 16384: 146.96 us instead of 145.68).
    """
    normed, copied = sharing(stored(rows), heads)
    return [_Work(kind, [] if number else [*copied.values()]) for number, kind in enumerate(normed.values())]


def configuration(inputs: Inputs, options: Options) -> MosaicForward:
    """What the rule has for a call."""
    spec = spec_of(inputs, options)
    q_copied, k_copied = (bool(sharing(stored(rows_for(spec, options)), heads)[1]) for heads in ("q", "k"))
    by_slot = inputs.slots is not None
    return mosaic_forward(spec, q_copied=q_copied, k_copied=k_copied, by_slot=by_slot, num_axes=options.num_axes)


def _layout(config: MosaicForward, spec: Spec, dtype: jnp.dtype) -> Layout:
    head_dim, rotary_dim = spec.head_dim, spec.rotary_dim
    half, offsets = rotary_dim // 2, [0]
    widest = widest_vector(ACCESS_BYTES, head_dim, rotary_dim, spec.rotation, dtype.itemsize)
    # Tiles of `width` lanes at `offsets` of the row, shared out among the threads, a vector at a time.
    match config.layout:
        case "chunks":
            width = chunk_lanes(head_dim, 2 * rotary_dim if spec.rotation == "pairs" else rotary_dim)
            offsets = list(range(0, head_dim, width))
        case "halves":
            width, offsets = head_dim // 2, [0, half]
        case "row":
            width = next_power_of_2(head_dim)
    threads = WARP // config.rows_per_warp
    lanes = max(1, min(widest, width // threads))
    threads = min(threads, width // lanes)

    def column(lane: int) -> int:
        # Halves leave out the bit that tells partners apart.
        return lane + (lane & -half) if config.layout == "halves" else lane

    bits = tuple(column(lanes << i).bit_length() - 1 for i in range(threads.bit_length() - 1))
    bases = (offset + column(lane) for offset in offsets for lane in range(0, width, threads * lanes))
    return Layout(threads, lanes, tuple(sorted(b for b in bases if b < head_dim)), bits, config.layout != "row")


def _forward_thread(
    program: Int,
    inputs: Inputs,
    outputs: Outputs,
    *,
    works: dict[str, list[_Work]],
    groups_per_program: int,
    programs_each: dict[str, int],
    max_position: int,
    spec: Spec,
    options: Options,
    config: MosaicForward,
    layout: Layout,
) -> None:
    """One thread: its lanes of a group of rows, of every kind of one `_Work`.

    A group is `heads_per_thread` heads of one token, or one row. What its first rows need is loaded before the first
    store, and each further row before the arithmetic of a row before it. A group past the end repeats the last one,
    with equal bits, so that stores need no mask.
    """
    num_tokens, head_dim, dtype = spec.num_tokens, spec.head_dim, outputs.q.dtype
    table = Table(inputs.cos_sin_cache, inputs.positions, max_position, num_tokens, options)
    thread = thread_index()
    member = thread & layout.threads - 1
    vectors, rotations = _vectors_and_rotations(layout, member, head_dim, options)
    wide_vectors = copied_vectors(layout, member, head_dim, dtype)

    def treat(block: Int, work: _Work, num_heads: int):
        size = config.heads_of(num_heads)
        groups_of_token = num_heads // size
        apart = groups_of_token if config.heads_apart else 1
        # Each head of a group is the group's first row, of a kind that lies so many heads further on.
        normed = [work.normed.ahead(head * apart) for head in range(size)]
        copied = [[kind.ahead(head * apart) for kind in work.copied] for head in range(size)]
        num_groups = num_tokens * groups_of_token
        group = block * groups_per_program + thread // layout.threads
        if num_groups % groups_per_program:
            group = group.minimum(num_groups - 1)
        token, row = group // groups_of_token, group
        if size > 1:
            row = group + token * (num_heads - groups_of_token) if config.heads_apart else group * size
        positions = table.positions_of(token)
        table_rows = [table.row(position) for position in positions]

        def start_of_row(place: Place) -> Pointer:
            return RowsIn(getattr(inputs, place.array), place, num_heads).row(row)

        lead = work.normed.source
        lead_row = start_of_row(lead)

        def source(kind: Rows) -> Pointer:
            """Kinds that lie side by side share one offset."""
            if kind.source._replace(first=lead.first) == lead:
                return lead_row + (kind.source.first - lead.first) if kind.source != lead else lead_row
            return start_of_row(kind.source)

        places = next((p.slots for kind in (*normed, *copied[0]) for p in kind.targets if p.slots), None)
        slot = None if places is None else Slot.of(token, inputs.slots, inputs.layer, places)

        def destinations_of(kind: Rows) -> list[Destination]:
            return [
                Destination.of(
                    getattr(outputs, place.array), place, num_heads, row, slot, inputs, cast_first=config.cast_first
                )
                for place in kind.targets
            ]

        destinations = [destinations_of(kind) for kind in normed]
        early = {}
        if options.scale_per_head is not None:  # scales are loaded with x
            early = {head: [destinations_of(kind) for kind in kinds] for head, kinds in enumerate(copied)}
        is_rotated = work.normed.rotation is not None
        is_rotated_first = is_rotated and options.norm_order == "rotation_first"
        own = len(layout.bases)  # the vectors behind are partners that are only loaded
        xs: list[list[list[Value]]] = []
        copies: list[list[list[list[Int]]]] = []

        def load(head: int):
            read = vectors if is_rotated else vectors[:own]
            xs.append([widen(v.load(source(normed[head])), dtype) for v in read])
            copies.append([[v.load(source(kind)) for v in wide_vectors] for kind in copied[head]])

        def store_copies(head: int):
            of_kinds = early.get(head) or map(destinations_of, copied[head])
            for words, of_kind in zip(copies[head], of_kinds, strict=True):
                for destination in of_kind:
                    destination.store(wide_vectors, words, dtype, cast_first=config.cast_first)

        ahead = min(size, config.heads_ahead)
        for head in range(ahead):
            load(head)
        angles = [table.load(table_rows, rotation.frequency, rotation.frequencies) for rotation in rotations]
        weight = weight_of(inputs, work.normed)
        weighted = vectors if is_rotated and not is_rotated_first else vectors[:own]
        weights: list[list[Int]] = []

        def load_weights(when_: str, after: Int | None = None):
            if config.weights == when_ and weight is not None:
                start = weight if after is None else weight + after
                weights.extend(v.load(start) for v in weighted)

        load_weights("first")
        for head in range(ahead):
            store_copies(head)
        # Loaded after a store they might alias, the weights keep ptxas from moving that store, and the loads before it,
        # below the sum.
        load_weights("after_gate")
        if work.copied and weight is None:
            keep_above(row)  # 136.1 us instead of 139.3 (H200, 16/2 heads, T = 16384)

        # What the heads of a group share is computed where the first of them needs it.
        @functools.cache
        def angles_of(rotation: int) -> tuple[list[Value], list[Value]]:
            return table.angles(positions, angles[rotation], rotations[rotation].frequency)

        @functools.cache
        def weights_of(index: int) -> list[Value]:
            assert weight is not None
            return effective_weights(weights[index], weight.dtype, options.norm_beta)

        def rotated(ys: list[list[Value]]) -> Iterator[tuple[int, list[Value], Int | None]]:
            """The rotated vectors, and where they count."""
            for number, rotation in enumerate(rotations):
                cos, sin = angles_of(number)
                for index, lanes in rotation.apply(ys, cos, sin, rotation_fuses_y2(options, dtype)).items():
                    yield index, lanes, rotation.where

        for head in range(size):
            if head + ahead < size:
                load(head + ahead)
            x = xs[head]
            if is_rotated_first:
                z = list(x)
                for index, lanes, where in rotated(x):
                    lanes = widen(narrow(lanes, dtype), dtype) if options.round_norm else lanes
                    z[index] = select(where, lanes, x[index])
                x = z[:own]
            total = sum_of_squares(x, vectors, layout, member, head_dim)
            if not weights:
                # The sum's sign bit is 0 (PTX's NaN has none either), which the compiler can't know: the loads stay
                # behind.
                load_weights("after_sum", after=bits_of(total) >> 31)
            r = inv_rms(total, head_dim, options.eps)
            words: list[list[Int]] = []
            ys: list[list[Value]] = []
            for index, lanes in enumerate(x):
                if weight is None:
                    y = [arith.mulf(lane, r) for lane in lanes]
                else:
                    y = [arith.mulf(arith.mulf(lane, r), w) for lane, w in zip(lanes, weights_of(index), strict=True)]
                words.append(narrow(y, dtype))
                ys.append(widen(words[-1], dtype) if options.round_norm else y)
            if is_rotated and not is_rotated_first:
                for index, lanes, where in rotated(ys):
                    words[index] = select(where, narrow(lanes, dtype), words[index])
            for destination in destinations[head]:
                destination.store(vectors[:own], words[:own], dtype, cast_first=config.cast_first)
            if head + ahead < size:
                store_copies(head + ahead)

    k_each = programs_each["k"]
    q_programs, k_programs = (len(works[heads]) * programs_each[heads] for heads in ("q", "k"))
    if config.k_first:
        is_k, k_before = program < k_programs, program
    else:
        is_k, k_before = spread_k(program, q_programs, k_programs)
    for number, work in enumerate(works["k"]):
        block = k_before - number * k_each if number else k_before
        # Unsigned: a block below 0 is a large one.
        is_own = is_k & (block < k_each) if len(works["k"]) > 1 else is_k
        with when(is_own):
            treat(block, work, spec.num_kv_heads)
    (work,) = works["q"]
    with when(is_k.equals(0)):
        treat(program - k_before.minimum(k_programs), work, spec.num_q_heads)


class Rotation(NamedTuple):
    """A pair of vectors that RoPE rotates into each other."""

    own: int
    other: int
    is_first: Int | None  # whether own is the pair's first and other was only loaded; None: both are the thread's
    where: Int | None  # None: everywhere
    frequency: Int  # the first of those of own
    frequencies: int

    def apply(
        self, ys: list[list[Value]], cos: list[Value], sin: list[Value], fuses_y2: bool
    ) -> dict[int, list[Value]]:
        own, other = ys[self.own], ys[self.other]
        if self.is_first is None:
            first, second = rotate(own, other, cos, sin, fuses_y2)
            return {self.own: first, self.other: second}
        halves = select(self.is_first, own, other), select(self.is_first, other, own)
        first, second = rotate(*halves, cos, sin, fuses_y2)
        return {self.own: select(self.is_first, first, second)}


class PairRotation(NamedTuple):
    """A vector whose neighbouring lanes RoPE rotates into each other."""

    own: int
    where: Int | None  # None: everywhere
    frequency: Int  # the first of the vector's
    frequencies: int

    def apply(
        self, ys: list[list[Value]], cos: list[Value], sin: list[Value], fuses_y2: bool
    ) -> dict[int, list[Value]]:
        own = ys[self.own]
        pairs = zip(*rotate(own[::2], own[1::2], cos, sin, fuses_y2), strict=True)
        return {self.own: [lane for pair in pairs for lane in pair]}


def _vectors_and_rotations(
    layout: Layout, member: Int, head_dim: int, options: Options
) -> tuple[list[Vector], Sequence[Rotation | PairRotation]]:
    """A thread's vectors, those of the layout's bases first, and their rotations."""
    rotary_dim, rotations = options.rotary_dim, []
    half = rotary_dim // 2
    column = _scatter(member, layout.bits)
    vectors = [vector(column, base, layout.lanes, layout.reach, head_dim) for base in layout.bases]
    if options.rotation == "pairs":
        return vectors, [
            PairRotation(index, where, frequency, layout.lanes // 2)
            for index, (where, frequency) in enumerate(frequencies_of_pairs(vectors, layout, rotary_dim))
        ]
    for index, base in enumerate(layout.bases):
        if layout.partners and base < half:
            where = None if layout.reach <= rotary_dim else column < rotary_dim
            frequency = (column if layout.reach <= half else column & half - 1) + base
            partner_index = layout.bases.index(base + half)
            rotations.append(Rotation(index, partner_index, None, where, frequency, layout.lanes))
        elif not layout.partners and base < rotary_dim:
            lane = vectors[index].column + base
            is_first = lane < half
            where = None if base + layout.reach <= rotary_dim else lane < rotary_dim
            # Lanes without a partner read themselves and frequency 0.
            (partner,) = select(where, select(is_first, [lane + half], [lane + -half]), [lane])
            (frequency,) = select(where, select(is_first, [lane], [lane + -half]), [constant(0)])
            rotations.append(Rotation(index, len(vectors), is_first, where, frequency, layout.lanes))
            vectors.append(Vector(partner, 0, layout.lanes))
    return vectors, rotations


def _scatter(member: Int, bits: tuple[int, ...]) -> Int:
    """The column whose bits[i] is bit i of `member`."""
    column = constant(0)
    for shift in sorted({bit - i for i, bit in enumerate(bits)}):
        mask = sum(1 << i for i, bit in enumerate(bits) if bit - i == shift)
        column = column + (member & mask) * (1 << shift)
    return column
