"""The product of hidden states and a packed weight, with the op as its epilogue: one kernel for Hopper.

T num_tokens, E width of the hidden states, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim.

The grid is persistent: a cluster of two programs, one on each of two SMs, walks over its share of tiles. A tile is one
head of q, gate, k or v, that is D columns of the weight, and 128 tokens for each of the two programs. A program has
three warpgroups. One loads steps of 64 columns of the hidden states and 64 rows of the weight by TMA into a ring of
four stages; each program of a cluster loads half of the weight's for both. The other two multiply 64 tokens each. After
its last step such a warpgroup holds whole rows in registers. It rounds them as a product is rounded, normalises and
rotates them, and stores them by TMA through shared memory while the ring fills again. Into a KV cache its threads store
rows of k and v themselves.

H200, bf16, 16/2 heads, E = 2048, T = 16384: 777.5 us, where the product by cuBLAS takes 749.7 and product and op 893.7,
or 833.1 with the gate in place; at T = 4096 206.6 against 232.6 and 217.1. 32/2 heads, E = 4096: 735.7 against 770.7
and 740.2 at T = 4096, 3011 against 3063 and 2944 at 16384, where the GPU is at its power limit. Few tiles leave SMs
idle: 70.8 against 61.4 at T = 1024. With a cache it took 787.3, and 788.6 with one of 8 bits, in runs in which it took
784.0 and 782.5 without.

Nothing but the epilogue waits for positions and table; when each tile did, it took 802.4. Lost: an epilogue in pieces
under the next tile's first products (895.2 where this took 791.3), and no cluster (811.9). Two products in flight,
other lags, and 4 or 16 columns walked side by side changed some 0.3 % at E = 4096. Three warpgroups that multiply don't
fit: ptxas has 160 registers for a thread that holds 128 sums.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as mgpu_array
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_qk._mosaic_gpu.emit import WARPGROUP, Int, Pointer, Value, bits_of, thread_index
from pallas_qk._mosaic_gpu.epilogue import (
    HEAD_DIM,
    ROTARY_DIM,
    ROWS_OF_THREAD,
    Words,
    normed,
    rounded,
    words_of_angles,
    write_by_slot,
)
from pallas_qk._mosaic_gpu.launch import SPLAT, in_threads, number, run_kernel
from pallas_qk._mosaic_gpu.thread import Table
from pallas_qk._options import Options, Spec, Target
from pallas_qk._rows import (
    CACHES,
    WEIGHTS,
    Inputs,
    Outputs,
    Place,
    Rows,
    empty,
    flat_output_types,
    on_rows,
    rows_of,
    with_caches,
)
from pallas_qk._target import cuda_target

PROJECTION_NAME = "pallas_qk_mosaic_gpu_projection_forward"

STEP = 64  # columns of the hidden states, and rows of the weight
_STAGES = 4  # of the ring: 192 of an SM's 227 KB
_CLUSTER = 2  # programs that share a tile of the weight
_ROWS, _MULTIPLIERS = 64, 2  # tokens of a warpgroup that multiplies, and how many of these a program has
_TOKENS = _ROWS * _MULTIPLIERS  # of a program
_CHUNK, _BUFFERS = 64, 2  # columns that a warpgroup stores at once, and its buffers for them
_SWIZZLED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # what wgmma reads: rows of 128 bytes
_WALKED = 8  # columns of tiles that are walked side by side, so that L2 holds what they read
_LAG = 2  # steps that the second of these warpgroups begins late, so that one stores while the other multiplies
# Of a thread that loads, and of one that multiplies. 40 * 128 + 232 * 256 are the 168 * 384 that a program is launched
# with: for more it would wait forever.
_REGISTERS = 40, 232

# Names that must differ from the axes of a user's mesh.
_PROGRAM, _IN_CLUSTER, _WARPGROUP = "pallas_qk_program", "pallas_qk_cluster", "pallas_qk_warpgroup"

FLOAT32 = jnp.dtype(jnp.float32)


def unsupported_projection(spec: Spec, width: int, target: Target) -> str | None:
    """Why the kernel can't run `spec` on `target`, from hidden states of this width; None if it can."""
    if target.compute_capability != (9, 0):
        major, minor = target.compute_capability
        return f"it needs compute capability 9.0 (wgmma), got {major}.{minor}"
    if spec.dtype not in ("float16", "bfloat16"):
        return f"it multiplies float16 or bfloat16, got {spec.dtype}"
    if (spec.head_dim, spec.rotary_dim) != (HEAD_DIM, ROTARY_DIM):
        got = f"head_dim={spec.head_dim}, rotary_dim={spec.rotary_dim}"
        return f"it takes heads of {HEAD_DIM} elements of which {ROTARY_DIM} are rotated, got {got}"
    if not isinstance(width, int) or width % STEP or not width:
        return f"it takes hidden states whose width is a multiple of {STEP}, got {width}"
    return None


class _Sizes(NamedTuple):
    num_tokens: int
    width: int
    num_q_heads: int
    num_kv_heads: int
    max_position: int
    cache_shape: tuple[int, ...] | None

    @property
    def row_blocks(self) -> int:
        """Tiles along the tokens."""
        return pl.cdiv(self.num_tokens, _TOKENS * _CLUSTER)

    @property
    def heads(self) -> int:
        """Tiles along the columns of the weight: q and gate by turns, then k, then v."""
        return 2 * (self.num_q_heads + self.num_kv_heads)

    def rows(self, options: Options) -> dict[str, Rows]:
        return rows_of(options, self.num_q_heads, self.num_kv_heads, HEAD_DIM, self.cache_shape)


def project(hidden: jax.Array, weight: jax.Array, inputs: Inputs, *, options: Options) -> Outputs:
    """The op on hidden (T, E) @ weight (E, N), whose columns are packed; `inputs` has what else the op reads.

    Results are flat in heads. A cache is updated in place.
    """
    num_q_heads, num_kv_heads = options.packed or (0, 0)
    num_tokens, width = hidden.shape
    cache_shape = None if inputs.k_cache is None else inputs.k_cache.shape
    sizes = _Sizes(num_tokens, width, num_q_heads, num_kv_heads, inputs.cos_sin_cache.shape[0], cache_shape)
    # TMA knows rows by tiles of eight. XLA fuses the padding into what computes the hidden states; cutting it off the
    # results takes a copy of them.
    padding = -num_tokens % 8
    if padding:
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    product = jax.ShapeDtypeStruct((num_tokens + padding, weight.shape[1]), hidden.dtype)
    inputs, written = with_caches(inputs, flat_output_types(inputs._replace(q=product), options))
    if not num_tokens:
        return empty(written)
    if inputs.q_weight.dtype != inputs.k_weight.dtype:  # a thread loads either
        both = (inputs.q_weight, inputs.k_weight)
        inputs = inputs._replace(**dict(zip(WEIGHTS, (x.astype(jnp.float32) for x in both), strict=True)))
    num_programs = max(2, cuda_target().num_sms // (2 * _CLUSTER) * 2)  # clusters; even, see `_tile`
    with jax.enable_x64(False):  # the grid and loops count in 32 bits, whatever the positions have
        results = run_kernel(
            PROJECTION_NAME,
            functools.partial(_program, sizes=sizes, options=options, num_programs=num_programs),
            (hidden, weight, inputs),
            written,
            plgpu.LoweringSemantics.Warpgroup,
            grid=(num_programs,),
            grid_names=(_PROGRAM,),
            cluster=(_CLUSTER,),
            cluster_names=(_IN_CLUSTER,),
            num_threads=_MULTIPLIERS + 1,
            thread_name=_WARPGROUP,
        )
    return on_rows(lambda x: x[:num_tokens], results) if padding else results


def _tile(number: Any, turn: Any, row_blocks: int, heads: int) -> tuple[Any, Any]:
    """The rows and the head of a tile, which its cluster takes at its `turn`.

    Clusters take tiles `num_programs` apart, an even number, so each would have heads of q alone, whose epilogue is
    long, or of gate alone. At every other turn the two of a pair are exchanged: 895 us, where 956 without it (H200,
    16/2 heads, E = 2048, T = 16384, with another epilogue).
    """
    row_block, head = plgpu.planar_snake(number, (row_blocks, heads), 1, _WALKED)
    return row_block, lax.bitwise_xor(head, lax.bitwise_and(turn, 1))


def _program(arrays, outputs: Outputs, *, sizes: _Sizes, options: Options, num_programs: int):
    """Three warpgroups of one program: the last loads, the others multiply."""
    hidden, weight, inputs = arrays
    dtype, steps, kinds = hidden.dtype, sizes.width // STEP, sizes.rows(options)
    lag = min(_LAG, steps - 1)

    @functools.partial(
        pl.run_scoped,
        collective_axes=_WARPGROUP,
        hidden_smem=plgpu.SMEM((_STAGES, _TOKENS, STEP), dtype, transforms=_SWIZZLED),
        weight_smem=plgpu.SMEM((_STAGES, STEP, HEAD_DIM), dtype, transforms=_SWIZZLED),
        buffers_smem=plgpu.SMEM((_MULTIPLIERS * _BUFFERS, _ROWS, _CHUNK), dtype, transforms=_SWIZZLED),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        free=plgpu.ClusterBarrier(collective_axes=(_IN_CLUSTER,), num_arrivals=_MULTIPLIERS, num_barriers=_STAGES),
        lagging=plgpu.Barrier(num_arrivals=1),
    )
    def scope(hidden_smem, weight_smem, buffers_smem, full, free, lagging):
        warpgroup, in_cluster = lax.axis_index(_WARPGROUP), lax.axis_index(_IN_CLUSTER)
        program = lax.axis_index(_PROGRAM)
        num_tiles = sizes.row_blocks * sizes.heads
        turns = lax.div(num_tiles - program + (num_programs - 1), num_programs)

        def tile(turn):
            row_block, head = _tile(program + turn * num_programs, turn, sizes.row_blocks, sizes.heads)
            return (row_block * _CLUSTER + in_cluster) * _TOKENS, head

        def stage_of(turn, step):
            return lax.rem(step if steps % _STAGES == 0 else turn * steps + step, _STAGES)

        def load():
            plgpu.set_max_registers(_REGISTERS[0], action="decrease")

            @_repeat(turns)
            def _(turn):
                token, head = tile(turn)

                @_repeat(steps)
                def _(step):
                    stage, of_step = stage_of(turn, step), pl.ds(step * STEP, STEP)
                    plgpu.barrier_wait(free.at[stage])
                    plgpu.copy_gmem_to_smem(
                        hidden.at[pl.ds(token, _TOKENS), of_step], hidden_smem.at[stage], full.at[stage]
                    )
                    plgpu.copy_gmem_to_smem(
                        weight.at[of_step, pl.ds(head * HEAD_DIM, HEAD_DIM)],
                        weight_smem.at[stage],
                        full.at[stage],
                        collective_axes=_IN_CLUSTER,
                    )

            # The other program's last arrivals come before this one ends.
            @_repeat(_STAGES)
            def _(stage):
                plgpu.barrier_wait(free.at[stage])

        def multiply():
            plgpu.set_max_registers(_REGISTERS[1], action="increase")

            @_repeat(_STAGES)
            def _(stage):
                plgpu.barrier_arrive(free.at[stage])

            @pl.when((warpgroup > 0) & (turns > 0) & (lag > 0))
            def _():
                plgpu.barrier_wait(lagging)

            @_repeat(turns)
            def _(turn):
                token, head = tile(turn)
                token = token + warpgroup * _ROWS
                behind_q = head - 2 * sizes.num_q_heads
                is_of_q = behind_q < 0  # q or its gate; else k or v
                is_normed = lax.select(is_of_q, lax.rem(head, 2) == 0, behind_q < sizes.num_kv_heads)

                # Loaded before the product, and read after it.
                cos, sin = _angles(sizes, options, inputs)(token)

                def products(sums):
                    @_repeat(steps)
                    def _(step):
                        stage = stage_of(turn, step)
                        plgpu.barrier_wait(full.at[stage])
                        plgpu.wgmma(sums, hidden_smem.at[stage, pl.ds(warpgroup * _ROWS, _ROWS)], weight_smem.at[stage])
                        # No second product in flight: the other warpgroup's keep the tensor cores busy (791.3 us,
                        # where 795.5 with two).
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[stage])
                        if lag:

                            @pl.when((warpgroup == 0) & (turn == 0) & (step == lag))
                            def _():
                                plgpu.barrier_arrive(lagging)

                    return sums[...]

                product = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((_ROWS, HEAD_DIM), jnp.float32))

                def store(rows, of_q: Rows, of_kv: Rows):
                    """Rows of one of two kinds: by TMA a chunk of columns at a time, and into a cache by slots."""
                    own = lax.select(is_of_q, lax.div(head, 2), lax.rem(behind_q, sizes.num_kv_heads))
                    places = (*of_q.targets, *of_kv.targets)
                    arrays = [getattr(outputs, place.array) for place in places if place.slots is None]

                    def by_tma():
                        for chunk in range(HEAD_DIM // _CHUNK):
                            buffer = buffers_smem.at[warpgroup * _BUFFERS + chunk % _BUFFERS]
                            plgpu.wait_smem_to_gmem(_BUFFERS - 1, wait_read_only=True)
                            _put(chunk * _CHUNK, dtype)(rows, buffer)
                            plgpu.commit_smem()
                            here = pl.ds(token, _ROWS), pl.ds(own * HEAD_DIM + chunk * _CHUNK, _CHUNK)
                            copies = [functools.partial(plgpu.copy_smem_to_gmem, buffer, x.at[*here]) for x in arrays]
                            if len(copies) == 1:
                                copies[0]()
                            else:
                                lax.cond(is_of_q, *copies)

                    if len(arrays) == 1:  # k and v lie in a cache alone
                        pl.when(is_of_q)(by_tma)
                    else:
                        by_tma()
                    for place in places:
                        if place.slots is not None:
                            write = _write_by_slot(sizes, inputs, outputs, place, dtype)
                            pl.when(jnp.logical_not(is_of_q))(functools.partial(write, rows, token, own))

                def store_normed():
                    of_which = is_of_q.astype(jnp.int32)
                    rows = _normed_rows(sizes, options, inputs, dtype)(product, cos, sin, of_which, token)
                    store(rows, kinds["q"], kinds["k"])

                def store_copied():
                    store(_copied_rows(dtype)(product), kinds["gate"], kinds["v"])

                lax.cond(is_normed, store_normed, store_copied)

            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup == _MULTIPLIERS, load, multiply)


def _repeat(times) -> Callable[[Callable[[Any], None]], None]:
    """Runs the decorated function for 0 … times - 1."""

    def run(body: Callable[[Any], None]) -> None:
        def step(index, carried):
            body(index)
            return carried

        lax.fori_loop(0, times, step, None)

    return run


# What threads do in the epilogue, as functions of the kernel's arrays.


def _array(columns: int, dtype: jnp.dtype) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((_ROWS, columns), dtype, layout=plgpu.Layout.WGMMA)


_WGMMA = plgpu.Layout.WGMMA


def _table(sizes: _Sizes, options: Options, pointers: Inputs) -> Table:
    return Table(pointers.cos_sin_cache, pointers.positions, sizes.max_position, sizes.num_tokens, options)


def _angles(sizes: _Sizes, options: Options, inputs: Inputs) -> Callable:
    """cos and sin (64, R/2), from the first token."""
    dtype = inputs.cos_sin_cache.dtype
    angles = _array(ROTARY_DIM // 2, dtype)

    @in_threads(inputs, SPLAT, return_type=(angles, angles))
    def body(pointers, first_token):
        cos, sin = words_of_angles(_table(sizes, options, pointers), number(first_token))
        return _as_array(cos, dtype), _as_array(sin, dtype)

    return body


def _normed_rows(sizes: _Sizes, options: Options, inputs: Inputs, dtype: jnp.dtype) -> Callable:
    """Rows (64, D) of q or of k."""
    table_dtype = inputs.cos_sin_cache.dtype

    @in_threads(inputs, _WGMMA, _WGMMA, _WGMMA, SPLAT, SPLAT, return_type=_array(HEAD_DIM, dtype))
    def body(pointers, product, cos, sin, is_q, first_token):
        both = [weight.address for weight in (pointers.q_weight, pointers.k_weight)]
        weight = Pointer(arith.select(number(is_q).equals(1).value, *both), pointers.q_weight.dtype)
        words = _words_of(product, FLOAT32), _words_of(cos, table_dtype), _words_of(sin, table_dtype)
        return _as_array(normed(*words, weight, _table(sizes, options, pointers), number(first_token), dtype), dtype)

    return body


def _write_by_slot(sizes: _Sizes, inputs: Inputs, outputs: Outputs, place: Place, dtype: jnp.dtype) -> Callable:
    """Writes rows (64, D) of k or of v into the cache. It takes them, their first token, and the number of the head."""
    caches = {name: getattr(outputs, name) for name in CACHES}

    @in_threads(inputs._replace(**caches), _WGMMA, SPLAT, SPLAT)
    def body(pointers, rows, first_token, head):
        numbers = number(first_token), number(head)
        write_by_slot(_words_of(rows, dtype), *numbers, sizes.num_tokens, sizes.num_kv_heads, place, pointers, dtype)

    return body


def _copied_rows(dtype: jnp.dtype) -> Callable:
    """Rows (64, D) of a gate or of v: the product, rounded."""

    def body(context, product):
        del context
        return _as_array([[rounded(words, dtype) for words in block] for block in _words_of(product, FLOAT32)], dtype)

    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_array(HEAD_DIM, dtype))(body)


def _put(first: int, dtype: jnp.dtype) -> Callable:
    """Writes the columns from `first` on into a buffer, each row 128 bytes in the order of a swizzle."""

    def body(context, rows, buffer_ref):
        del context
        blocks = _words_of(rows, dtype)[first // 8 : (first + _CHUNK) // 8]
        buffer = Int(llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.memref_ptr(buffer_ref)))
        thread = thread_index() & WARPGROUP - 1
        lane = thread & 31
        row = (thread >> 5) * 16 + (lane & 15)
        start = buffer + row * (2 * _CHUNK) + (((lane >> 4) ^ (lane & 7)) * 16)
        for block in range(0, len(blocks), 2):
            ((low_top,), (low_bottom,)), ((high_top,), (high_bottom,)) = blocks[block : block + 2]
            words = [low_top, low_bottom, high_top, high_bottom]
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [(start ^ (16 * block)).value, *(word.value for word in words)],
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
                "r,r,r,r,r,~{memory}",
                has_side_effects=True,
            )

    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_SWIZZLED)))(body)


def _words_of(array, dtype: jnp.dtype) -> Words:
    """What the thread holds of an array."""
    registers = list(array.registers.flatten())
    i32 = ir.IntegerType.get_signless(32)
    if dtype == FLOAT32:
        words = [[bits_of(_lane(register, i)) for i in range(2)] for register in registers]
    else:
        words = [[Int(llvm.bitcast(i32, register))] for register in registers]
    return [words[first : first + ROWS_OF_THREAD] for first in range(0, len(words), ROWS_OF_THREAD)]


def _as_array(blocks: Words, dtype: jnp.dtype):
    """The array whose words these are."""
    kind = ir.VectorType.get((2,), mgpu.dtype_to_ir_type(dtype))
    registers = [
        vector.from_elements(kind, [word.as_float() for word in words])
        if dtype == FLOAT32
        else llvm.bitcast(kind, words[0].value)
        for of_block in blocks
        for words in of_block
    ]
    layout = mgpu_array.WGMMA_LAYOUT
    array = np.empty(len(registers), dtype=object)
    array[:] = registers
    return mgpu_array.FragmentedArray(
        _registers=array.reshape(layout.registers_shape((_ROWS, 8 * len(blocks)))), _layout=layout, _is_signed=None
    )


def _lane(register: Value, index: int) -> Value:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))
