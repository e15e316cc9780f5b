"""What a thread does with rows of a product: its part of the projection's epilogue.

D head_dim, R rotary_dim. A warpgroup holds 64 rows of one head as wgmma leaves its sums: a thread has two rows, and
four threads, a quad, share each. Words are [j][h]: of elements 8j + 2 * quad and the next, in row h of the thread's
two. So partners of the rotation are the thread's own, and of the sum of squares two bits of the column lie in other
threads.
"""

import functools

import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_qk._mosaic_gpu.emit import (
    WARPGROUP,
    Int,
    Pointer,
    Value,
    butterfly,
    constant,
    narrow,
    select,
    thread_index,
    widen,
)
from pallas_qk._mosaic_gpu.thread import (
    Destination,
    Layout,
    Slot,
    Table,
    Vector,
    effective_weights,
    inv_rms,
    rotate,
    sum_of_squares,
)
from pallas_qk._options import rotation_fuses_y2
from pallas_qk._rows import Inputs, Place

HEAD_DIM, ROTARY_DIM = 256, 64  # D and R
ROWS_OF_THREAD = 2
Words = list[list[list[Int]]]

_QUADS = Layout(threads=4, lanes=2, bases=tuple(range(0, HEAD_DIM, 8)), bits=(1, 2), partners=True)
_CAST_FIRST = True  # see `MosaicForward.cast_first`; 788.6 us, and 790.8 where casts follow (H200, 16/2, T = 16384)


def quad() -> Int:
    """The thread's number among the four of its rows."""
    return thread_index() & 3


def row_of_thread(row: int) -> Int:
    """The first or the second of the thread's rows, among the 64."""
    thread = thread_index() & WARPGROUP - 1
    return (thread >> 5) * 16 + ((thread & 31) >> 2) + 8 * row


def positions_of_rows(table: Table, first_token: Int) -> list[list[Int]]:
    """The positions of the thread's rows, from a token on; past the last token those of the last."""
    tokens = ((first_token + row_of_thread(row)).minimum(table.num_tokens - 1) for row in range(ROWS_OF_THREAD))
    return [table.positions_of(token) for token in tokens]


def words_of_angles(table: Table, first_token: Int) -> tuple[Words, Words]:
    """cos and sin of the rows from a token on, in the dtype of the table, which loses nothing.

    Of a single axis as they are loaded, which nothing waits for before `normed` reads them.
    """
    blocks, dtype = range(ROTARY_DIM // 2 // 8), table.cache.dtype
    loaded = []
    for positions in positions_of_rows(table, first_token):
        starts = [table.row(position) + (quad() * 2).resized(64) for position in positions]
        loaded.append((positions, [table.load(starts, constant(8 * j), 2) for j in blocks]))
    if table.options.num_axes == 1:
        cos, sin = ([[words[j][0][i] for _, words in loaded] for j in blocks] for i in range(2))
        return cos, sin
    angles = [[table.angles(positions, words[j], quad() * 2 + 8 * j) for positions, words in loaded] for j in blocks]
    cos, sin = ([[narrow(of_row[i], dtype) for of_row in of_block] for of_block in angles] for i in range(2))
    return cos, sin


def normed(
    product: Words,
    cos: Words,
    sin: Words,
    weight: Pointer,
    table: Table,
    first_token: Int,
    dtype: jnp.dtype,
) -> Words:
    """Rows of the float32 product: rounded, normalised, rounded, rotated and rounded again, as the op's kernel does."""
    half, options, table_dtype = ROTARY_DIM // 2 // 8, table.options, table.cache.dtype  # half of the rotated blocks
    has_loaded = options.num_axes == 1  # cos as they are loaded
    positions = positions_of_rows(table, first_token) if has_loaded else []
    start = weight + (quad() * 2).resized(64)
    weights = [(start + base).load(2) for base in _QUADS.bases]
    xs = [[widen(rounded(words, dtype), dtype) for words in of_block] for of_block in product]
    vectors = [Vector(quad() * 2, base, 2) for base in _QUADS.bases]
    inverses = []
    for row in range(ROWS_OF_THREAD):
        total = sum_of_squares([x[row] for x in xs], vectors, _QUADS, quad(), HEAD_DIM)
        inverses.append(inv_rms(total, HEAD_DIM, options.eps))

    @functools.cache
    def weights_of(block: int) -> list[Value]:
        return effective_weights(weights[block], weight.dtype, options.norm_beta)

    def of_block(block: int) -> list[list[Int]]:
        ws = weights_of(block)
        return [
            narrow([arith.mulf(arith.mulf(lane, r), w) for lane, w in zip(lanes, ws, strict=True)], dtype)
            for lanes, r in zip(xs[block], inverses, strict=True)
        ]

    words = [of_block(block) for block in range(2 * half)]
    for block in range(half):
        for row in range(ROWS_OF_THREAD):
            first, second = (widen(words[block + offset][row], dtype) for offset in (0, half))
            of_cos, of_sin = cos[block][row], sin[block][row]
            if has_loaded:
                of_cos = table.spoiled(of_cos, positions[row][0])
            cosine, sine = (widen(of_angle, table_dtype) for of_angle in (of_cos, of_sin))
            rotated = rotate(first, second, cosine, sine, rotation_fuses_y2(options, dtype))
            words[block][row], words[block + half][row] = (narrow(lanes, dtype) for lanes in rotated)
    return words + [of_block(block) for block in range(2 * half, len(xs))]


def write_by_slot(
    words: Words, first_token: Int, head: Int, num_tokens: int, num_heads: int, place: Place, arrays: Inputs, dtype
) -> None:
    """The thread's rows of one head of k or of v into the cache, where the slots of their tokens say."""
    vectors = [Vector(quad() * 8, base, 8) for base in range(0, HEAD_DIM, 32)]
    for row in range(ROWS_OF_THREAD):
        token = first_token + row_of_thread(row)
        is_token, token = token < num_tokens, token.minimum(num_tokens - 1)
        assert place.slots is not None
        slot = Slot.of(token, arrays.slots, arrays.layer, place.slots)
        slot, of_row = slot._replace(exists=slot.exists & is_token), token * num_heads + head
        cache = getattr(arrays, place.array)
        destination = Destination.of(cache, place, num_heads, of_row, slot, arrays, cast_first=_CAST_FIRST)
        destination.store(vectors, _whole_blocks([of_block[row] for of_block in words]), dtype, cast_first=_CAST_FIRST)


def _whole_blocks(words: list[list[Int]]) -> list[list[Int]]:
    """Every fourth block of the thread's row whole, from two lanes of each: blocks 4i + quad.

    In 16 bits a warp then stores 64 bytes of a row side by side, and 16 bytes without this: 787.3 us instead of 801.3,
    and with codes of 8 bits 788.6 instead of 806.6 (H200, 16/2 heads, E = 2048, T = 16384).
    """

    def exchanged(first: Int, second: Int, bit: int) -> list[Int]:
        """Both threads' `first` in the one whose number lacks the bit, both threads' `second` in the other."""
        is_upper = (quad() >> bit & 1).equals(1)
        (sent,), (kept,) = select(is_upper, [first], [second]), select(is_upper, [second], [first])
        received = Int(butterfly(sent.value, 1 << bit))
        return select(is_upper, [received, kept], [kept, received])

    blocks = []
    for start in range(0, len(words), 4):
        first, second, third, fourth = (word for (word,) in words[start : start + 4])
        low, high = exchanged(first, second, 0), exchanged(third, fourth, 0)
        (word0, word2), (word1, word3) = (exchanged(*pair, 1) for pair in zip(low, high, strict=True))
        blocks.append([word0, word1, word2, word3])
    return blocks


def rounded(words: list[Int], dtype: jnp.dtype) -> list[Int]:
    """Two float32 lanes in 16 bits each."""
    return narrow([word.as_float() for word in words], dtype)
