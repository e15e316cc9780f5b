"""Runs a function in every thread of a grid, as a Pallas kernel on the Mosaic GPU backend."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import ManualAxisType

from pallas_qk._mosaic_gpu.emit import Int, Pointer

_GRID_AXIS, _WARPGROUP_AXIS = "pallas_qk_program", "pallas_qk_warpgroup"  # must differ from the axes of a user's mesh


def launch(
    name: str,
    thread: Callable[[Int, Any, Any], None],
    inputs,
    outputs,
    *,
    num_programs: int,
    num_warpgroups: int,
):
    """Runs `thread(program, inputs, outputs)` in every thread of every program.

    `inputs` are arrays. `outputs` are types, and arrays that are updated in place. Both are in any containers, and a
    thread sees a `Pointer` in the place of each.
    """

    def kernel(inputs, outputs):
        @in_threads((inputs, outputs), SPLAT)
        def body(pointers, program):
            thread(number(program), *pointers)

        body(lax.axis_index(_GRID_AXIS))

    return run_kernel(
        name,
        kernel,
        inputs,
        outputs,
        plgpu.LoweringSemantics.Lane,
        grid=(num_programs,),
        grid_names=(_GRID_AXIS,),
        # A name for a single warpgroup would cost a second barrier at the start of each program.
        num_threads=None if num_warpgroups == 1 else num_warpgroups,
        thread_name=None if num_warpgroups == 1 else _WARPGROUP_AXIS,
    )


SPLAT = plgpu.Layout.WG_SPLAT(())  # of a scalar, which every thread holds


def number(splat: Any) -> Int:
    """The integer that is a scalar of the kernel."""
    return Int(splat.registers.item())


def in_threads(refs: Any, *layouts: Any, return_type: Any = None) -> Callable:
    """Turns `body(pointers, *arrays)` into a function of the arrays alone.

    The body runs in every thread, with a Pointer in the place of each of the refs, in any containers.
    """
    dtypes, ref_types = jax.tree.map(lambda ref: ref.dtype, refs), jax.tree.map(lambda _: plgpu.RefType(), refs)

    def decorator(body: Callable) -> Callable:
        def with_pointers(context, refs, *arrays):
            del context
            return body(jax.tree.map(Pointer.to, refs, dtypes), *arrays)

        inlined = plgpu.inline_mgpu(arg_types=(ref_types, *layouts), return_type=return_type)(with_pointers)
        return functools.partial(inlined, refs)

    return decorator


def run_kernel(
    name: str,
    kernel: Callable[[Any, Any], None],
    inputs,
    outputs,
    semantics: plgpu.LoweringSemantics,
    **grid: Any,
):
    """Runs `kernel(inputs, outputs)`, which sees a Ref in the place of each array and type, on a grid of programs.

    `inputs` and `outputs` are those of `launch`, and `grid` is what `plgpu.Mesh` takes.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    leaves, outputs_tree = jax.tree.flatten(outputs)
    # Barriers around all that a kernel reads and writes keep slices out of it. XLA of JAX 0.11.2 fuses a kernel with a
    # slice in front of it, and with an update of a larger array behind it. A slice may start at no multiple of 256
    # bytes, and Mosaic GPU refuses such an array when the kernel runs. What is updated in place loses its alias: the
    # kernel writes into the array that was sliced, and nothing writes the result (H200).
    arrays = [lax.optimization_barrier(x) for x in arrays]
    # An array is updated in place as a Ref, which all supported versions of JAX lower to an alias.
    updated = [jax.new_ref(lax.optimization_barrier(x)) for x in leaves if not isinstance(x, jax.ShapeDtypeStruct)]
    types = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]
    # The functions below hold no array: JAX keeps them longer than a trace may last.
    is_type = [isinstance(x, jax.ShapeDtypeStruct) for x in leaves]
    first, second = len(arrays), len(arrays) + len(updated)

    def in_order(of_updated: Sequence, of_types: Sequence) -> Any:
        """The outputs, from those of each sort."""
        sorts = iter(of_updated), iter(of_types)
        return jax.tree.unflatten(outputs_tree, [next(sorts[which]) for which in is_type])

    def body(*refs):
        kernel(jax.tree.unflatten(inputs_tree, refs[:first]), in_order(refs[first:second], refs[second:]))

    grid["kernel_name"] = name
    params = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=semantics)
    if updated:  # plgpu.kernel takes no Ref under jit before JAX 0.11.1; JAX 0.10 loses the name on this way
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=ManualAxisType()) for x in types]
        launched = pl.kernel(body, out_type=tuple(types), mesh=plgpu.Mesh(**grid), compiler_params=params, name=name)
    else:
        launched = plgpu.kernel(body, out_type=tuple(types), compiler_params=params, **grid)
    results = launched(*arrays, *updated)
    return in_order(
        [lax.optimization_barrier(jax.freeze(ref)) for ref in updated],
        [lax.optimization_barrier(x) for x in results],
    )
