"""Every kernel under NVIDIA's compute-sanitizer, on small cases: `make sanitize`, on a machine with a GPU.

python -m tests.sanitize [memcheck racecheck initcheck synccheck]

A report that names a kernel of ours makes it fail; reports on other kernels (XLA's, cuBLAS's) are listed.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

from tests.cached import CachedCase
from tests.cases import Case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUR_KERNEL = "pallas_qk_"
DONE = "every kernel ran"

# Masks, tails and layouts of every kind: rows that fill no program, lanes that D lacks, mRoPE, a lone k row.
CASES = (
    Case(1, 1, 1),
    Case(3),
    Case(37, 5, 2, mrope_section=(11, 11, 10)),
    Case(7, 3, 1, head_dim=80, rotary_dim=40, dtype="float16"),
    Case(5, 2, 5, head_dim=96, rotary_dim=96, dtype="float16", cache_dtype="float32", weight_dtype="float32"),
    Case(3, 1, 2, head_dim=32, rotary_dim=2, dtype="float16"),
    Case(3, 2, 1, head_dim=64, rotary_dim=6),
    Case(5, 2, 1, head_dim=128, rotary_dim=64, dtype="float32", norm_beta=1.0),
    Case(300, 16, 2),
    # The other forms: what is copied beside a row, or nothing, and where it lies.
    Case(37, 5, 2, gate="in_place"),
    Case(7, 3, 1, gate=None),
    Case(5, 3, 1, head_dim=80, rotary_dim=40, packed=True, gate="in_place"),
    Case(37, 5, 2, gate="handed_on"),
    Case(5, 3, 1, head_dim=80, rotary_dim=40, dtype="float32", packed=True, gate="handed_on"),
    Case(37, 4, 2, packed=True),
    Case(7, 3, 1, packed=True, gate=None),
    Case(5, 2, 1, gathered=True),
    # The options, and several heads of one token a thread.
    Case(37, 5, 2, rotation="pairs"),
    Case(600, 16, 2, rotation="pairs", gate=None),
    Case(7, 3, 1, head_dim=80, rotary_dim=40, round_norm=False),
    Case(9, 4, 2, rotary_dim=0),
    Case(37, 5, 2, norm_order="rotation_first", dtype="float16"),
    Case(7, 4, 2, weights=False, separate_v=True, v_norm=True),
    Case(5, 3, q_alone=True),
    Case(300, 16, 4, head_dim=128, rotary_dim=128, gate=None),
    Case(1100, 4, 2, head_dim=128, rotary_dim=128, gate=None, mrope_section=(24, 20, 20)),
    *(Case(num_tokens, 32, 8, head_dim=128, rotary_dim=128, gate=None) for num_tokens in (513, 1025, 4097)),
    Case(40, 16, 2, head_dim=512, rotary_dim=512, gate=None),
)

# Calls that write a KV cache: slots below 0 and past the end, in 32 bits and less; layers outside, casts, lone places.
CACHED_CASES = (
    CachedCase(Case(37, 5, 2, packed=True), block_size=16, slots_dtype="int8"),
    CachedCase(Case(37, 5, 2, gate="in_place"), "b s (h c) d", num_blocks=9, return_kv=True),
    CachedCase(Case(9, 3, 1, head_dim=80, rotary_dim=40, dtype="float16", packed=True, gate=None), "b h s (c d)"),
    CachedCase(Case(7, 3, 1, head_dim=64, rotary_dim=6), "c h s b d", kv_dtype="float32", slots_dtype="uint8"),
    CachedCase(Case(5, 2, 1, head_dim=128, rotary_dim=64, dtype="float32"), "b s (c h) d", kv_dtype="float16"),
    *(CachedCase(Case(6, 4, 2), "l b s h d", layer=layer) for layer in (0, 2, -1, 3, 2**31 - 1)),
    # In 8 bits: one scale and one of each head, vectors of every width, codes alone in their store.
    CachedCase(Case(37, 5, 2, packed=True), kv_dtype="float8_e4m3fn", block_size=16),
    CachedCase(
        Case(9, 3, 1, head_dim=80, rotary_dim=40, dtype="float16"), "b h s (c d)", "float8_e5m2", return_kv=True
    ),
    CachedCase(
        Case(7, 3, 2, head_dim=65, rotary_dim=2, gate=None), "h b s d", "float8_e4m3fn", scale_per_head=(True, True)
    ),
    CachedCase(
        Case(5, 2, 3, head_dim=64, rotary_dim=6, dtype="float32"),
        "l b s (h c) d",
        "float8_e4m3fn",
        scale_per_head=(True, False),
    ),
    CachedCase(Case(300, 16, 2, gate="in_place"), "b s h d", "float8_e4m3fn", num_blocks=20, block_size=16),
    CachedCase(Case(1, 1, 1), num_blocks=1, block_size=1),
    CachedCase(Case(300, 16, 2, packed=True), num_blocks=20, block_size=16),
)


# The projection in the same kernel, and the width of the hidden states: one step and several, and tails of tokens.
PROJECTIONS = (
    (Case(1, 2, 1), 64),
    (Case(300, 4, 2), 192),
    (Case(37, 3, 1, dtype="float16", norm_beta=1.0), 256),
)
PROJECTIONS_WITH_CACHE = (
    (CachedCase(Case(37, 4, 2), kv_dtype="float8_e4m3fn"), 64),
    (CachedCase(Case(300, 3, 1), num_blocks=20, block_size=16, cache_axes="b h s (c d)"), 192),
)
TOOLS_FOR_PROJECTIONS = ("memcheck", "racecheck", "synccheck")  # initcheck had not ended after 78 s (H200)


class Report(NamedTuple):
    """One finding of compute-sanitizer: its first line, and all of them."""

    title: str
    text: str


def read_reports(output: str) -> list[Report]:
    """The findings in what compute-sanitizer printed; its banner and summaries are none."""
    reports: list[list[str]] = []
    for line in output.splitlines():
        match = re.match(r"=========( *)(.*)", line)
        if match is None or not match[2]:
            continue
        indent, text = match.groups()
        if len(indent) > 1 and reports:
            reports[-1].append(text)
        elif not re.match(r"COMPUTE-SANITIZER|.*SUMMARY|Target application|LEAK", text):
            reports.append([text])
    return [Report(lines[0], "\n".join(lines)) for lines in reports]


def run_tool(tool: str) -> bool:
    """Whether the tool ran all cases and found nothing in a kernel of ours."""
    environment = os.environ | {
        # One cudaMalloc an array, so that a stray access leaves it, and plain launches.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=",
    }
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000", sys.executable, "-m", "tests.sanitize"]
    start = time.monotonic()
    done = subprocess.run([*command, "--run", tool], env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    ran = DONE in output and re.search(r"(ERROR|RACECHECK) SUMMARY", output) is not None
    reports = read_reports(output)
    ours = [report for report in reports if OUR_KERNEL in report.text]
    found = f"{len(ours)} reports on our kernels, {len(reports) - len(ours)} on others"
    print(f"{tool}: {found if ran else 'DID NOT RUN'}, {time.monotonic() - start:.0f} s", flush=True)
    for report in ours:
        print(report.text)
    for report in {report.title: report for report in reports if report not in ours}.values():
        print(f"  elsewhere: {report.text.splitlines()[:2]}")
    if not ran:
        print(output[-3000:])
    return ran and not ours


def run_kernels(tool: str) -> None:
    """Forward and backward of every case, by both kernels; what writes a cache has no backward."""
    import jax
    import jax.numpy as jnp

    import pallas_qk
    from benchmarks import projection
    from tests import cached, forms
    from tests.cases import make_inputs
    from tests.fuzz import runs
    from tests.gradients import outputs_and_gradients
    from tests.lowering import GPU_IMPLEMENTATIONS

    def multiplied(op):
        """The op with q * sigmoid(gate) in the place of a gate that is handed on."""

        def run(*arrays):
            q, *others, gate = op(*arrays)
            return q, *others, pallas_qk.apply_gate(q, gate)

        return run

    def narrowed(case: Case, width: int):
        """The arrays of a projection from hidden states of this width."""
        hidden, weight, *others = projection.arrays_of(case, make_inputs(case))
        return hidden[:, :width], weight[:width], *others

    for case in CASES:
        arrays = forms.arguments(case, make_inputs(case))
        floats = sum(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)
        floats -= bool(case.rotary_dim)  # the table's gradient is XLA's
        for op in (forms.op(case, name) for name in GPU_IMPLEMENTATIONS if runs(name, case)):
            run = multiplied(op) if case.gate == "handed_on" else op
            both = outputs_and_gradients(run, of=floats, arguments=len(arrays))
            jax.block_until_ready(jax.jit(both)(*arrays, *forms.cotangents_of(case)))
    for call in CACHED_CASES:
        layer = {"layer": jnp.int32(call.layer)} if "l" in call.sizes else {}
        for name in GPU_IMPLEMENTATIONS:
            op = jax.jit(functools.partial(cached.op(call, name), **layer), donate_argnums=5)  # the cache, in place
            jax.block_until_ready(op(*cached.arguments(call)))
    if tool in TOOLS_FOR_PROJECTIONS:
        for case, width in PROJECTIONS:
            jax.block_until_ready(projection.in_one("mosaic_gpu", case)(*narrowed(case, width)))
        for form, width in PROJECTIONS_WITH_CACHE:
            caches = tuple(map(jnp.asarray, cached.caches(form)))
            arrays = *narrowed(form.case, width), jnp.asarray(cached.slots_of(form)), form.scales
            op = jax.jit(projection.in_one_with_cache("mosaic_gpu", form), donate_argnums=0)
            jax.block_until_ready(op(caches if len(caches) == 2 else caches[0], *arrays))
    print(DONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="tool", help=f"of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--run", metavar="TOOL", help="run the kernels, as compute-sanitizer's target under this tool")
    arguments = parser.parse_args()
    if arguments.run:
        run_kernels(arguments.run)
    elif shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer must be on the PATH, got none. It comes with NVIDIA's CUDA toolkit.")
    else:
        results = [run_tool(tool) for tool in arguments.tools or TOOLS]
        sys.exit(not all(results))


if __name__ == "__main__":
    main()
