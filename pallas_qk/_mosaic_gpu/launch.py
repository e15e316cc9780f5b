"""Runs a function in every thread of a grid, as a Pallas kernel on the Mosaic GPU backend."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

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

    `inputs` are arrays, `outputs` types, in any containers; a thread sees a `Pointer` in the place of each.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    types, outputs_tree = jax.tree.flatten(outputs)

    def kernel(*refs):
        dtypes = [ref.dtype for ref in refs]

        def body(launch_context, program, *refs):
            del launch_context
            pointers = [Pointer.to(ref, dtype) for ref, dtype in zip(refs, dtypes, strict=True)]
            read, written = pointers[: len(arrays)], pointers[len(arrays) :]
            thread(
                Int(program.registers.item()),
                jax.tree.unflatten(inputs_tree, read),
                jax.tree.unflatten(outputs_tree, written),
            )

        arg_types = (plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs))
        plgpu.inline_mgpu(arg_types=arg_types)(body)(lax.axis_index(_GRID_AXIS), *refs)

    results = plgpu.kernel(
        kernel,
        out_type=tuple(types),
        grid=(num_programs,),
        grid_names=(_GRID_AXIS,),
        # A name for a single warpgroup would cost a second barrier at the start of each program.
        num_threads=None if num_warpgroups == 1 else num_warpgroups,
        thread_name=None if num_warpgroups == 1 else _WARPGROUP_AXIS,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*arrays)
    return jax.tree.unflatten(outputs_tree, results)
