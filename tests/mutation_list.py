"""The mutations that `tests.mutations` tries, grouped by the file that they break, in the order of the package.

Each breaks one place and names tests that must fail. `what` is its id, which stays when the code moves.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which `file` holds exactly once, becomes `new`; some of `tests` must fail."""

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs_gpu: str = ""  # why no test can see it without one


def tests_of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{file}.py::{name}" for name in names) if names else (f"tests/test_{file}.py",)


def _in(file: str, *mutations: tuple) -> list[Mutation]:
    """Each is (what, old, new, tests), and where it needs a GPU the reason."""
    return [Mutation(file, *mutation) for mutation in mutations]


def cache_by(implementation: str, form: str = "", dtype: str = "bfloat16") -> tuple[str, ...]:
    case = f"{implementation}-T9-H4.3-D64-R16-{dtype}-max_position=40{form}"
    return tests_of("cache", f"test_rows_are_those_of_the_op_and_the_rest_keeps_its_bits[{case}]")


TREE = tests_of("tree", "test_reference_sum_is_the_tree")
TREE_OF_TRITON = tests_of("tree", "test_each_layout_of_the_triton_kernel_sums_the_tree")
FORMS_OF_XLA = tests_of("properties", "test_forward_keeps_to_its_definition[xla-6]")
FORMS_OF_MOSAIC = tests_of("properties", "test_forward_keeps_to_its_definition[mosaic_gpu-25]")
PACKED_IN_TRITON = tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[triton-copied-packed-table]")
PACKED_IN_MOSAIC = tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[mosaic_gpu-copied-packed-table]")
GRADIENTS_OF_XLA = tests_of("properties", "test_backward_of_plain_xla_keeps_to_its_definition")
GRADIENTS_OF_MOSAIC = tests_of("properties", "test_backward_agrees_with_plain_xla[mosaic_gpu-8]")
GRADIENTS_OF_TRITON = tests_of("triton_vjp", "test_every_layout_and_number_of_rows")
POSITIONS_OF_XLA = tests_of("positions", "test_positions_outside[xla-int32]")
OUTSIDE_OF_MOSAIC = "test_a_position_past_the_table_gives_nan_in_its_lanes_and_a_negative_one_row_0"
OUTSIDE_OF_TORCH = tests_of(
    "torch_ref", "test_a_position_past_the_table_gives_nan_in_its_rotated_lanes_and_a_negative_one_row_0"
)
# Each number, in three heads by three scales; and a scale for each head of v.
CODES = {
    name: tests_of("fp8_cache", f"test_every_number_and_every_scale[{name}-float16-float8_e4m3fn]")
    for name in ("xla", "mosaic_gpu", "triton")
}
CODES_OF_HEADS = {name: cache_by(name, "-kv_dtype=float8_e4m3fn") for name in CODES}
SLOTS_OUTSIDE = tests_of("kv_cache", "test_every_integer_dtype_and_what_lies_outside")
# A write farther off would end the process.
ORACLE_S_CACHE = tests_of("torch_kv_cache", "test_oracle_equals_the_reference[cpu-b s h d-torch.float16-near]")
ORACLE_S_CODES = tests_of("torch_kv_cache", "test_codes_of_any_heads_and_lanes[cpu-torch.float8_e4m3fn-3-256]")
RECIPE = tests_of("mosaic_gpu", "test_every_rounding_is_the_recipe_s")
SHARDED = tests_of("sharding", "test_tokens_and_heads[(4,2)-auto]")
BAD_CALL = tests_of("errors", "test_bad_call")
MROPE_AND_BETA = "xla-T5-H3.2-D16-R8-float32-mrope_section=(2,1,1)-norm_beta=1.0-max_position=32"
# The places of a sum or product show in float32, the round trip in 16 bits.
BITS_OF_TRITON = tests_of(
    "parity",
    "test_agrees_on_a_gpu[triton-T4096-H16.2-D256-R64-float32]",
    "test_agrees_on_a_gpu[triton-T127-H24.4-D128-R128-bfloat16]",
    "test_agrees_on_a_gpu[triton-T1025-H5.2-D96-R96-float32-norm_beta=1.0]",
)
# Both rotations and both roundings, by each implementation.
OF_PAIRS, OF_FLOAT32_PAIRS, OF_UNROUNDED = (
    {name: tests_of("forward", f"test_equals_the_definition[{name}-{case}]") for name in ("xla", "triton")}
    | {"mosaic_gpu": tests_of("mosaic_gpu", f"test_equals_the_definition[{case}]")}
    for case in (
        "T5-H3.2-D256-R64-bfloat16-rotation=pairs",
        "T4-H2.1-D128-R128-float32-cache_dtype=float16-rotation=pairs",
        "T9-H3.2-D256-R64-bfloat16-round_norm=False",
    )
)
GRADIENTS_OF_PAIRS = {
    dtype: tests_of("kernel_gradients", f"test_equal_their_float64_definition[mosaic_gpu-{case}-rotation=pairs]")
    for dtype, case in (
        ("bfloat16", "T7-H3.2-D80-R80-bfloat16"),
        ("float32", "T7-H3.2-D96-R96-float32"),
        ("odd", "T6-H5.2-D96-R6-bfloat16-norm_beta=1.0"),
    )
}
EVERY_FORM, TWO_HEADS = "test_every_form_has_the_bits_of_one_head", "T5-H4.2-D64-R64-bfloat16-max_position=40-gate=None"
PTX = "inline assembly, which only a GPU runs"

MUTATIONS = [
    # What a call is and may be: options, rows, checks, the public functions.
    *_in(
        "pallas_qk/_options.py",
        (
            "tree order: the warps from the lowest bit",
            "return [0, *range(5, 0, -1), *range(bits - 1, 5, -1)]",
            "return [0, *range(5, 0, -1), *range(6, bits)]",
            TREE,
        ),
        (
            "tree order: pairs also where a thread holds one lane",
            "if bits <= 5:\n        return list(range(bits - 1, -1, -1))",
            "if bits <= 5:\n        return [0, *range(bits - 1, 0, -1)]",
            TREE,
        ),
        (
            "the fused form of a single frequency with mRoPE",
            "(options.mrope_section is not None and options.rotary_dim > 2)",
            "options.mrope_section is not None",
            RECIPE,
        ),
        (
            "the fused form in float32",
            'options.rotary_dim > 2) or str(dtype) == "float32"',
            "options.rotary_dim > 2)",
            RECIPE,
        ),
        (
            "the fused form of pairs",
            'if options.rotation != "halves" or not options.round_norm or options.norm_order != "norm_first":',
            'if not options.round_norm or options.norm_order != "norm_first":',
            RECIPE,
        ),
        (
            "the fused form of norms that are not rounded",
            'if options.rotation != "halves" or not options.round_norm or options.norm_order != "norm_first":',
            'if options.rotation != "halves" or options.norm_order != "norm_first":',
            RECIPE,
        ),
        (
            "chunks as wide as the rotated lanes",
            "return math.gcd(rotary_dim // 2, head_dim, 1 << 30)",
            "return math.gcd(rotary_dim, head_dim, 1 << 30)",
            tests_of("forward", "test_every_layout_gives_the_same_bits"),
        ),
        (
            "the rows of k are not counted against 32 bits",
            "spec.num_tokens * max(spec.num_q_heads, spec.num_kv_heads), 2**31 - margin",
            "spec.num_tokens * spec.num_q_heads, 2**31 - margin",
            tests_of("choice", "test_rows_are_counted_in_32_bits"),
        ),
    ),
    *_in(
        "pallas_qk/_rows.py",
        (
            "a size that an export leaves open is not seen",
            "open_size=next(still_open, None),",
            "open_size=None,",
            tests_of("export", "test_a_table_of_any_length"),
        ),
        (
            "rows: k rotated in halves",
            "True, k_weight, rotation)",
            'True, k_weight, "halves")',
            OF_PAIRS["xla"],
        ),
        (
            "the kernels' rules see no pairs",
            "rotation=options.rotation,",
            'rotation="halves",',
            OF_PAIRS["triton"],
        ),
        (
            "rows: the gate at q's place",
            'rows["gate"] = Rows("q", q._replace(first=d), targets,',
            'rows["gate"] = Rows("q", q, targets,',
            tests_of("forward", "test_gate_bits_are_kept[xla]"),
        ),
        (
            "rows: a gate that is handed on is moved again",
            "for name, kind in rows.items() if not kind.handed_on}",
            "for name, kind in rows.items()}",
            tests_of("gate", "test_the_backward_of_each_implementation[nan-packed-mosaic_gpu]"),
        ),
        (
            "rows: packed v at k's place",
            'Place("q", d, token, first=q_width + kv_width),',
            'Place("q", d, token, first=q_width),',
            PACKED_IN_MOSAIC,
        ),
        (
            "a gate left in place is written by the kernel too",
            '(Place("gate", d, num_q_heads * d),) if options.gate == "copied" else ()',
            '(Place("gate", d, num_q_heads * d),)',
            tests_of("surface", "test_nothing_is_moved_beside_the_kernel[in place-mosaic_gpu]"),
        ),
        (
            "rounded gradients of weights are float32",
            "    if options.round_dweights:",
            "    if not options.round_dweights:",
            tests_of("kernel_forms", "test_weight_gradients_rounded_by_the_kernel[xla-9]"),
        ),
        (
            "an output does not vary with the rows of the table",
            "found += x.cos_sin_cache + x.positions",
            "pass",
            tests_of("surface", "test_rows_that_vary_alone"),
        ),
        (
            "the weights' gradients vary with nothing",
            "reads[kind.weight] += read",
            "reads[kind.weight] += ()",
            tests_of("sharding", "test_gradients_inside_shard_map"),
        ),
        (
            "a cache does not vary with its scales",
            "found += getattr(x, place.scale.array)",
            "found += ()",
            tests_of("cache_sharding", "test_a_scale_that_varies_alone"),
        ),
        (
            "sharding: the scales of all heads on each device",
            '("scale_h" if per_head else "scale" for',
            '("scale" for',
            tests_of("cache_sharding", "test_heads[8 bits-auto]"),
        ),
        (
            "the row of each token is taken for a shared table",
            'table = "... rotary" if trees[0].positions is None else "position rotary"',
            'table = "position rotary"',
            tests_of("surface", "test_vmap_over_activations_is_one_call[rows, copied-0]"),
        ),
    ),
    *_in(
        "pallas_qk/_checks.py",
        (
            "checks: sections that don't sum to R/2",
            "or min(section) < 0 or sum(section) != rotary_dim // 2:",
            "or min(section) < 0:",
            BAD_CALL,
        ),
        (
            "checks: traced options are named one at a time",
            "    if traced:\n        *names, last = traced\n",
            "    if traced:\n        *names, last = list(traced)[:1]\n",
            tests_of("errors", "test_traced_options_are_refused_together"),
        ),
        (
            "copy_gate=False copies the gate",
            'return "in_place"',
            'return "copied"',
            tests_of("surface", "test_nothing_is_moved_beside_the_kernel[in place-mosaic_gpu]"),
        ),
        (
            "checks: a bool is an integer",
            "return isinstance(value, numbers.Integral) and not isinstance(value, bool)",
            "return isinstance(value, numbers.Integral)",
            BAD_CALL,
        ),
        (
            "checks: a rotation that is an array",
            "if not _is_one_of(names, value):",
            "if value not in names:",
            BAD_CALL,
        ),
        (
            "checks: round_norm as a number",
            "if not isinstance(value, bool):",
            "if value not in (True, False):",
            BAD_CALL,
        ),
        (
            "checks: an eps of NaN",
            "if not 0 <= eps <= _LARGEST:",
            "if eps < 0 or eps > _LARGEST:",
            BAD_CALL,
        ),
        (
            "checks: a norm_beta of -0.0 keeps its sign",
            "return float(norm_beta) + 0.0",
            "return float(norm_beta)",
            tests_of("forward", "test_a_norm_beta_of_negative_zero_is_zero"),
        ),
    ),
    *_in(
        "pallas_qk/_array_checks.py",
        (
            "guard: NumPy's 64 bits narrowed unseen",
            "return within.astype(np.int32)",
            "return x.astype(np.int32)",
            tests_of("positions", "test_numpy_positions_of_64_bits_are_not_narrowed_unseen"),
        ),
        (
            "reduced types inside shard_map pass",
            "if spec.reduced | spec.unreduced | manual.reduced | manual.unreduced:",
            "if spec.reduced | spec.unreduced:",
            tests_of("sharding", "test_reduced_and_unreduced_arrays_in_shard_map_are_refused"),
        ),
        (
            "checks: a masked array loses its mask",
            "if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, np.ma.MaskedArray):",
            "if not isinstance(array, jax.Array | np.ndarray):",
            BAD_CALL,
        ),
    ),
    *_in(
        "pallas_qk/_sizes.py",
        (
            "sizes: heads of which a part is left over",
            "last // self.width * (last % self.width == 0)",
            "last // self.width",
            tests_of("sizes", "test_what_does_not_fit_is_refused"),
        ),
        (
            "sizes: k in front of q isn't told",
            "exchanged = function.gated and by_axis and _fit_exchanged(arrays)",
            "exchanged = False",
            tests_of("sizes", "test_what_does_not_fit_is_refused"),
        ),
        (
            "sizes: an axis of heads of another number",
            "return found if self.given in (None, found) else 0",
            "return found",
            tests_of("sizes", "test_what_does_not_fit_is_refused"),
        ),
        (
            "sizes: q and k in two forms",
            "if len({len(shape) for shape in shapes}) > 1:",
            "if False:",
            tests_of("sizes", "test_what_does_not_fit_is_refused"),
        ),
        (
            "sizes: a packed width with a part of a head",
            "return None if rest or heads < 1 else both",
            "return None if heads < 1 else both",
            tests_of("sizes", "test_a_packed_width_that_heads_do_not_fill_is_refused"),
        ),
        (
            "sizes: a table wider than the heads",
            "if shape[-1] % 2 or not 0 < shape[-1] <= head_dim:",
            "if shape[-1] % 2 or not shape[-1]:",
            tests_of("sizes", "test_what_does_not_fit_is_refused"),
        ),
    ),
    *_in(
        "pallas_qk/_mesh_checks.py",
        (
            "sharding: a head cut across devices",
            "if num_heads % num_shards:",
            "if num_heads < num_shards:",
            tests_of("sharding", "test_a_head_cut_across_devices_is_refused"),
        ),
        (
            "a fork of a process that ran the op goes on",
            "if _first_process() != os.getpid():",
            "if False:",
            tests_of("surroundings", "test_a_worker_forked_from_a_process_that_runs_jax_is_told_to_be_spawned"),
        ),
    ),
    *_in(
        "pallas_qk/_api.py",
        (
            "the default implementation is told of halves",
            "rotation=by_name if rotary_dim else None",
            'rotation="halves" if rotary_dim else None',
            tests_of("choice", "test_pairs_of_odd_heads_are_refused_by_mosaic_gpu_alone"),
        ),
    ),
    *_in(
        "pallas_qk/_call.py",
        (
            "float32 activations with norms that are not rounded",
            "options = dataclasses.replace(options, round_norm=True)",
            "pass",
            tests_of("emitted", "test_norms_of_float32_are_rounded_whatever_is_said"),
        ),
        (
            "a name is not refused for the rotation",
            "rotation=options.rotation,",
            "",
            tests_of("choice", "test_pairs_of_odd_heads_are_refused_by_mosaic_gpu_alone"),
        ),
        (
            "cache: a scale for each head by v's alone",
            "scale_per_head=(np.size(inputs.k_scale) > 1, np.size(inputs.v_scale) > 1)",
            "scale_per_head=(np.size(inputs.v_scale) > 1, np.size(inputs.v_scale) > 1)",
            tests_of("cache_sharding", "test_heads[8 bits-auto]"),
        ),
        (
            "each layer is traced and lowered",
            '@functools.partial(jax.jit, static_argnames=("name", "call", "split"))',
            "",
            tests_of("equal_layers"),
        ),
        (
            "positions of less than a byte reach the kernels",
            "if x is not None and jnp.iinfo(x.dtype).bits < 8:",
            "if False:",
            tests_of("positions", "test_a_kernel_is_given_whole_words_for_positions_of_less_than_a_byte"),
        ),
        (
            "NumPy's 64-bit positions are left to JAX",
            "dict.fromkeys(_INTEGERS, _array_checks.as_integers)",
            "dict.fromkeys((), _array_checks.as_integers)",
            tests_of("positions", "test_numpy_positions_of_64_bits_are_not_narrowed_unseen"),
        ),
        (
            "NumPy's 64-bit slots are left to JAX",
            '_INTEGERS = ("positions", "slots", "layer")',
            '_INTEGERS = ("positions",)',
            tests_of("cache", "test_numpy_slots_of_64_bits_are_not_narrowed_unseen"),
        ),
    ),
    *_in(
        "pallas_qk/_passed.py",
        (
            "True is taken for the 1 that passed",
            "parts.append(kind)  # 1, 1.0 and True are equal",
            "pass",
            tests_of("passed", "test_an_equal_value_of_another_type_is_refused"),
        ),
        (
            "the type of an array is not in a signature",
            "parts += x.aval, x.sharding",
            "parts += (x.sharding,)",
            tests_of("passed", "test_scales_of_other_types_are_refused"),
        ),
        (
            "the sharding of an array is not in a signature",
            "parts += x.aval, x.sharding",
            "parts += (x.aval,)",
            tests_of("passed", "test_a_sharding_that_cuts_heads_is_refused_after_one_that_does_not"),
        ),
        (
            "the dtype of NumPy's arrays is not in a signature",
            "parts += x.shape, x.dtype",
            "parts += (x.shape,)",
            tests_of("passed", "test_an_equal_value_of_another_type_is_refused[positions]"),
        ),
        (
            "the GPU that code is made for is not in a signature",
            "return function, jax.sharding.get_abstract_mesh(), _signature(values)",
            "return function, _signature(values)",
            tests_of("passed", "test_the_gpu_that_code_is_made_for_is_in_a_signature"),
        ),
        (
            "traced arrays have a signature",
            "issubclass(kind, jax.Array)",
            "issubclass(kind, jax.Array | jax.core.Tracer)",
            tests_of("passed", "test_traced_arrays_are_checked_at_each_trace_and_have_no_signature"),
        ),
        (
            "what passed its checks is kept without a bound",
            "_kept.clear()",
            "pass",
            tests_of("passed", "test_what_is_kept_has_a_bound"),
        ),
        (
            "every call is checked",
            "_kept[signature] = found",
            "pass",
            tests_of("passed", "test_an_equal_call_is_not_checked_again"),
        ),
    ),
    # The KV cache.
    *_in(
        "pallas_qk/_cache_api.py",
        (
            "cache: k's array returned for v",
            "(outputs.k_cache, outputs.v_cache)",
            "(outputs.k_cache, outputs.k_cache)",
            tests_of("cache", "test_the_public_functions"),
        ),
        (
            "cache: the k given is returned as v",
            "caches, outputs.k, outputs.v)",
            "caches, outputs.k, outputs.k)",
            tests_of("cache", "test_the_public_functions"),
        ),
    ),
    *_in(
        "pallas_qk/_cache_axes.py",
        (
            "cache: c runs slower than h in (h c)",
            '"hc": (size // 2, 2)',
            '"hc": (2, size // 2)',
            cache_by("mosaic_gpu", "-cache_axes=bs(hc)d"),
        ),
        (
            "cache: the stride of places counts one lane",
            "step *= sizes[name]",
            "step *= sizes[name] if name != 'd' else 1",
            cache_by("mosaic_gpu"),
        ),
        (
            "cache: layers in any place",
            'and names.find("l") <= 0',
            "",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: the capacity is that of one block",
            'sizes["b"] * sizes["s"])',
            'sizes["s"])',
            cache_by("mosaic_gpu"),
        ),
    ),
    *_in(
        "pallas_qk/_cache_write.py",
        (
            "cache: a negative slot writes the last row",
            "return (x >= 0) & (x < limit)",
            "return x < limit",
            tests_of("cache", "test_places_of_slots"),
        ),
        (
            "cache: a slot past the capacity writes the first row",
            'indices["b"] = jnp.where(inside, indices["b"], num_blocks)',
            'indices["b"] = jnp.where(inside, indices["b"], 0)',
            cache_by("xla"),
        ),
        (
            "cache: a layer outside writes another",
            "inside = inside & _is_below(layer, cache.num_layers)",
            "layer = layer % cache.num_layers",
            cache_by("xla", "-cache_axes=lbshd-layer=3"),
        ),
        (
            "cache: bfloat16 scattered by conversions",
            "converts = dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11)",
            "converts = False",
            cache_by("xla"),
        ),
        (
            "xla codes: the first head's scale for all",
            "_fp8.codes(x, scale[:, None], dtype)",
            "_fp8.codes(x, scale[:1, None], dtype)",
            CODES_OF_HEADS["xla"],
        ),
    ),
    *_in(
        "pallas_qk/_fp8.py",
        (
            "xla codes: ties go up",
            "(2 ** (dropped - 1) - 1) + odd)",
            "(2 ** (dropped - 1)))",
            CODES["xla"],
        ),
        (
            "xla codes: ties go down",
            "(2 ** (dropped - 1) - 1) + odd)",
            "(2 ** (dropped - 1) - 1))",
            CODES["xla"],
        ),
        (
            "xla codes: no saturation",
            "code = jnp.minimum(code, largest) | (bits >> 31 << 7)",
            "code = code | (bits >> 31 << 7)",
            CODES["xla"],
        ),
        (
            "xla codes: numbers without their signs",
            "jnp.minimum(code, largest) | (bits >> 31 << 7)",
            "jnp.minimum(code, largest)",
            CODES["xla"],
        ),
        (
            "xla codes: NaN is the largest number",
            "return jnp.where(magnitude > 0x7F800000, _NAN, code).astype(jnp.uint8)",
            "return code.astype(jnp.uint8)",
            CODES["xla"],
        ),
        (
            "xla codes: infinity is NaN",
            "magnitude > 0x7F800000",
            "magnitude >= 0x7F800000",
            CODES["xla"],
        ),
        (
            "xla codes: subnormal ones as normal ones",
            "jnp.where(magnitude < np.float32(smallest).view(np.uint32), subnormal, normal)",
            "normal",
            CODES["xla"],
        ),
        (
            "xla codes: the unit of subnormal ones is half of theirs",
            "np.float32(smallest * 2.0**dropped)",
            "np.float32(smallest * 2.0 ** (dropped - 1))",
            CODES["xla"],
        ),
        (
            "xla codes: quotients of float32, by XLA",
            "lax.convert_element_type(a, np.float64)",
            "lax.convert_element_type(a, np.float32)",
            tests_of("fp8_cache", "test_quotients_that_are_ties[xla]"),
        ),
        (
            "codes: quotients that are never corrected",
            "{correct} {correct} mov.f32 {result}",
            "mov.f32 {result}",
            tests_of("fp8_cache", "test_quotients_that_are_ties[mosaic_gpu]"),
        ),
        (
            "codes: 1 / scale as it is first approximated",
            "fma.rn.f64 p, r, t, r;",
            "mov.f64 p, r;",
            tests_of("fp8_cache", "test_quotients_that_are_ties[mosaic_gpu late]"),
        ),
        (
            "codes: 1 / scale is NaN for scales that are 0 or infinite",
            "selp.f64 p, r, p, special;",
            "",
            tests_of("fp8_cache", "test_every_number_and_every_scale[mosaic_gpu late-float16-float8_e4m3fn]"),
        ),
        (
            "codes: numbers are not cut off before they are divided",
            "min.NaN.xorsign.abs.f32 n, n, 0f49800000; ",
            "",
            CODES["mosaic_gpu"],
        ),
        (
            "codes: numbers are cut off below what saturates",
            "0f49800000",
            "0f43800000",
            CODES["mosaic_gpu"],
        ),
    ),
    *_in(
        "pallas_qk/_cache_checks.py",
        (
            "cache: a bool is a layer",
            "isinstance(layer, numbers.Integral) and not isinstance(layer, bool)",
            "isinstance(layer, numbers.Integral)",
            tests_of("cache_errors", "test_bad_layer"),
        ),
        (
            "cache: an empty cache passes",
            "if 0 in cache.shape:",
            "if False:",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: a scale beside a cache of 16 bits",
            "        if scale is not None:",
            "        if False:",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: 8 bits without a scale",
            "    if scale is None:",
            "    if False:",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: a bool is a scale",
            "np.floating) and not isinstance(scale, bool)",
            "np.floating)",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: a scale of any dtype",
            'if str(scale.dtype) != "float32" and not is_number:',
            "if False:",
            tests_of("cache_errors", "test_bad_call"),
        ),
        (
            "cache: a scale for each token",
            "if scale.shape not in ((), (1,), (num_kv_heads,)):",
            "if scale.ndim > 1:",
            tests_of("cache_errors", "test_bad_call"),
        ),
    ),
    # The op over a mesh, under vmap and differentiated, and the choice of what runs.
    *_in(
        "pallas_qk/_op.py",
        (
            "the partitioner's call on platforms without it",
            'for platform in ("cpu", "cuda"):',
            'for platform in ("cpu", "cuda", "tpu"):',
            tests_of("sharding", "test_platforms_that_partition_plain_xla_themselves[auto-False-tpu]"),
        ),
        (
            "explicit axes left out of plain XLA's results",
            "function = compiler_partitioned(plain, [x.sharding for x in ctx.avals_out])",
            "function = plain",
            tests_of("sharding", "test_platforms_that_partition_plain_xla_themselves[explicit-False-tpu]"),
        ),
        (
            "an export over devices holds the partitioner's call",
            "exported=context.lowering_parameters.for_export\n",
            "exported=False\n",
            tests_of("export", "test_over_devices_outside_shard_map_is_refused"),
        ),
        (
            "results vary over every axis that any operand varies over",
            "*(y.manual_axis_type.varying for y in read if y is not None)",
            "*(y.manual_axis_type.varying for y in jax.tree.leaves(operands))",
            tests_of("sharding", "test_shard_map"),
        ),
    ),
    *_in(
        "pallas_qk/_gate.py",
        (
            "apply_gate: attended of any dtype",
            "if attended.dtype != array.dtype:",
            "if False:",
            tests_of("gate", "test_errors"),
        ),
        (
            "apply_gate: an array that was cut is taken",
            "if not width or width != 2 * (num_heads + of_kv) * head_dim:",
            "if not width:",
            tests_of("gate", "test_a_gate_whose_array_was_changed_is_refused"),
        ),
        (
            "apply_gate: the heads of a packed array by its width",
            "num_heads, of_kv = options.packed or (width // (2 * head_dim), 0)",
            "num_heads, of_kv = width // (2 * head_dim), 0",
            tests_of("gate", "test_values_and_gradients_equal_their_float64_definition[packed-False-bfloat16]"),
        ),
    ),
    *_in(
        "pallas_qk/_product.py",
        (
            "apply_gate: a cotangent that is flat where attended isn't",
            "found._replace(attended=found.attended.reshape(dout.shape))",
            "found",
            tests_of("gate", "test_values_and_gradients_equal_their_float64_definition[q_gate and k-True-bfloat16]"),
        ),
        (
            "apply_gate: the product on explicit axes left to no compiler",
            "= compiler_partitioned(gated, jax.typeof(attended).sharding)(given, attended)",
            "= gated(given, attended)",
            tests_of("gate", "test_attended_sharded_otherwise[explicit, set_mesh]"),
        ),
        (
            "the array of a gate that is handed on is kept twice",
            "given, _, attended = primals",
            "_, given, attended = primals",
            tests_of("gate", "test_the_array_of_the_gate_is_kept_once[scan]"),
        ),
        (
            "apply_gate: the gate as the op returned it is not read",
            "given = jnp.where(False, returned, given)",
            "del returned",
            tests_of("gate", "test_derivatives_of_vmap[k]"),
        ),
        (
            "the gate's cotangent, and what lies beside it, on another way than through the op",
            "    _, of_returned, of_attended = moving",
            "    of_returned, _, of_attended = moving",
            tests_of("gate", "test_every_mode_and_order[grad of grad-False]"),
        ),
    ),
    *_in(
        "pallas_qk/_derivatives.py",
        (
            "derivative: no psum over the axes that an input does not vary along",
            "return (lax.psum(gradient, tuple(summed)) if summed else gradient).astype(aval.dtype)",
            "return gradient.astype(aval.dtype)",
            tests_of("sharding", "test_gradients_inside_shard_map"),
        ),
        (
            "the weights' gradients rounded before their sum over manual axes",
            "rounded = not jax.sharding.get_abstract_mesh().manual_axes",
            "rounded = True",
            tests_of("sharding", "test_gradients_inside_shard_map"),
        ),
        (
            "tangents computed in the activations' dtype",
            "(_in_float32(inputs),), (_in_float32(tangents),))",
            "(inputs,), (tangents,))",
            tests_of("gradients", "test_forward_mode_in_16_bits"),
        ),
    ),
    *_in(
        "pallas_qk/_partition.py",
        (
            "sharding: no psum of the weights' gradients",
            "(lax.psum(x, over) if over else x)",
            "x",
            SHARDED,
        ),
        (
            "sharding: the weights' gradients rounded before their sum",
            "exact = call._replace(options=dataclasses.replace(call.options, round_dweights=False))",
            "exact = call",
            SHARDED,
        ),
        (
            "sharding: psum over tokens alone",
            'sums = {"q_weight": tokens + heads["q"], "k_weight": tokens + heads["k"]}',
            'sums = {"q_weight": tokens, "k_weight": tokens}',
            SHARDED,
        ),
        (
            "sharding: the factor of q_gate the other way round",
            'CompoundFactor(heads, f"{heads}_rows")',
            'CompoundFactor(f"{heads}_rows", heads)',
            SHARDED,
        ),
        (
            "sharding: each device writes its own tokens alone",
            "lead = [() for _ in lead]",
            "lead = list(lead)",
            tests_of("cache_sharding", "test_rows_go_where_the_cache_is"),
        ),
        (
            "sharding: heads divided by the scales of others",
            'over["scale_h"] = over["k"]',
            "pass",
            tests_of("cache_sharding", "test_heads[8 bits-auto]"),
        ),
        (
            "sharding: k laid out as q is",
            "heads.get(split_axis(name)[0], ())",
            'heads.get(split_axis(name)[0].replace("k", "q"), ())',
            tests_of("sharding", "test_tokens_and_heads[(4,2), k replicated-auto]"),
        ),
        (
            "sharding: padded tokens count in the weights' gradients",
            "mesh_axes if size % _num_parts(mesh, mesh_axes) == 0 else ()",
            "mesh_axes",
            tests_of("sharding", "test_tokens_that_do_not_divide"),
        ),
        (
            "a sharded weight shards the other one",
            'return [f"whole{next(numbers)}"]',
            "return [axis]",
            tests_of("sharding", "test_a_sharded_weight_is_gathered_alone"),
        ),
        (
            "sharding: heads over an axis that shards tokens",
            "for axis in _mesh_axes(mesh, x)[-1] if axis not in tokens)",
            "for axis in _mesh_axes(mesh, x)[-1])",
            tests_of("sharding", "test_q_and_k_that_share_an_axis_otherwise"),
        ),
        (
            "sharding: a part of a mesh axis has no name",
            "primes = [prime for size in sizes for prime in _prime_factors(size)]",
            "primes = list(sizes)",
            tests_of("sharding", "test_two_kv_heads_shared_by_eight_devices"),
        ),
    ),
    *_in(
        "pallas_qk/_primitive.py",
        (
            "one device's code forgets the GPU that the mesh names",
            "AbstractMesh((), (), abstract_device=device))",
            "AbstractMesh((), ()))",
            tests_of("choice", "test_an_old_gpu_gets_xla"),
        ),
        (
            "explicit axes left out of plain XLA",
            "if not any(sharding.mesh.explicit_axes for sharding in jax.tree.leaves(shardings)):",
            "if shardings:",
            tests_of("sharding", "test_further_derivatives[explicit, set_mesh]"),
        ),
        (
            "a call without jit goes round in circles",
            "with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):",
            "with jax.debug_nans(False), jax.debug_infs(False):",
            tests_of("choice", "test_disable_jit_runs_the_same_op"),
        ),
    ),
    *_in(
        "pallas_qk/_batching.py",
        (
            "vmap: results mapped where no argument is",
            "if any(dim is not None for dim in dims):",
            "if True:",
            tests_of("gradients", "test_every_mode_and_order[xla-T5-H3.2-D16-R8-float32-max_position=32-jacfwd]"),
        ),
        (
            "vmap: the batch in front of mRoPE's rows",
            'front = names.split().index("...")',
            "front = 0",
            tests_of("vmap", "test_vmap_of_vmap"),
        ),
        (
            "vmap: unbatched arrays not broadcast",
            "batching.broadcast(x, axis.size, front, axis.explicit_mesh_axis)",
            "batching.broadcast(x, 1, front, axis.explicit_mesh_axis)",
            tests_of("vmap", "test_every_combination"),
        ),
        (
            "vmap: batched weights added to the leading axes",
            'return all(dim is None or "..." in x.split() for x, dim in zip(names, dims, strict=True))',
            'return any(dim is not None and "..." in x.split() for x, dim in zip(names, dims, strict=True))',
            tests_of("vmap", "test_every_combination"),
        ),
    ),
    *_in(
        "pallas_qk/_dispatch.py",
        (
            "choice: a name falls back in silence",
            "elsewhere_xla=implementation is None",
            "elsewhere_xla=True",
            tests_of("choice", "test_a_gpu_name_on_another_platform_says_so"),
        ),
        (
            "one device's rows are not counted",
            "_implementations.refuse(implementation, reason)",
            "_implementations.refuse(implementation, None)",
            tests_of("sharding", "test_rows_are_those_of_one_device[mosaic_gpu]"),
        ),
    ),
    *_in(
        "pallas_qk/_implementations.py",
        (
            "choice: the other GPU kernel first",
            '_PREFERENCE = ("mosaic_gpu", "triton", "xla") if',
            '_PREFERENCE = ("mosaic_gpu", "triton", "xla") if not',
            tests_of("choice", "test_none_takes_the_gpu_kernel_on_cuda_and_xla_elsewhere"),
        ),
        (
            "choice: the machine's GPU whatever the default device",
            'getattr(device, "platform", device) or jax.default_backend()',
            "jax.default_backend()",
            tests_of("choice", "test_the_default_device_is_asked_first"),
        ),
        (
            "choice: a missing backend is not missed",
            "if (missing := _missing_module(name)) is not None:",
            "if (missing := _missing_module(name)) == name:",
            tests_of("choice", "test_a_jax_without_one_of_the_backends"),
        ),
        (
            "a name is refused for the rows of all devices together",
            "spec = dataclasses.replace(spec, num_tokens=min(1, spec.num_tokens))",
            "pass",
            tests_of("sharding", "test_rows_are_those_of_one_device[mosaic_gpu]"),
        ),
    ),
    *_in(
        "pallas_qk/_target.py",
        (
            "code is made for the newest of several GPUs",
            "min(map(_capability, gpus), default=",
            "max(map(_capability, gpus), default=",
            tests_of("choice", "test_of_several_local_gpus_the_least_counts"),
        ),
        (
            "code is made for the most multiprocessors of several GPUs",
            "num_sms = min((gpu.core_count",
            "num_sms = max((gpu.core_count",
            tests_of("choice", "test_of_several_local_gpus_the_least_counts"),
        ),
        (
            "code is made for the highest bandwidth of several GPUs",
            "min(bandwidths) if len(bandwidths) == len(known_of_each) else None",
            "max(bandwidths) if len(bandwidths) == len(known_of_each) else None",
            tests_of("choice", "test_of_several_local_gpus_the_least_counts"),
        ),
        (
            "a GPU of unknown bandwidth counts as one of the others",
            "min(bandwidths) if len(bandwidths) == len(known_of_each) else None",
            "min(bandwidths) if bandwidths else None",
            tests_of("choice", "test_of_several_local_gpus_the_least_counts"),
        ),
        (
            "a kind is known by any word of its name",
            "if words.issuperset(name.upper().split())",
            "if words.intersection(name.upper().split())",
            tests_of("choice", "test_bandwidth_of_a_kind"),
        ),
        (
            "a GPU that no table knows counts as a Hopper",
            "_UNKNOWN = _Kind((8, 0))",
            "_UNKNOWN = _Kind((9, 0))",
            tests_of("choice", "test_compute_capability_of_an_abstract_device"),
        ),
        (
            "a local GPU is looked up in the table",
            "if gpu.device_kind == device.device_kind)",
            "if gpu is device)",
            tests_of("choice", "test_a_local_gpu_that_the_mesh_names_is_asked_itself"),
        ),
    ),
    # Plain XLA, whose rules the kernels share.
    *_in(
        "pallas_qk/_indices.py",
        (
            "guard: compared after narrowing",
            "if x.dtype.itemsize < 4:",
            "if x.dtype.itemsize != 4:",
            tests_of("positions", "test_positions_outside[xla-int64]"),
        ),
        (
            "guard: narrow types not widened",
            "if x.dtype.itemsize < 4:",
            "if x.dtype.itemsize < 1:",
            tests_of("positions", "test_a_table_whose_size_is_the_types_limit_plus_one"),
        ),
    ),
    *_in(
        "pallas_qk/_reference.py",
        (
            "apply_gate: the sigmoid is not rounded",
            "return Product(product=attended * opened)",
            "return Product(product=(attended * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(attended.dtype))",
            tests_of("gate", "test_the_sigmoid_is_rounded_before_the_product"),
        ),
        (
            "xla codes: v divided by the scale of k",
            "scale = None if place.scale is None else getattr(inputs, place.scale.array)",
            "scale = None if place.scale is None else inputs.k_scale",
            CODES_OF_HEADS["xla"],
        ),
        (
            "xla: the bits of a lane in ascending order",
            "for bit in tree_order(num_lanes):",
            "for bit in range(len(bits_left)):",
            TREE,
        ),
        (
            "xla: a plain sum",
            "mean_square = tree_sum(x32 * x32) / head_dim",
            "mean_square = jnp.sum(x32 * x32, axis=-1) / head_dim",
            tests_of("rounding", "test_the_norm_of_plain_xla_sums_by_the_tree"),
        ),
        (
            "xla: no bfloat16 round trip",
            "return lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)",
            "return y",
            tests_of("rounding"),
        ),
        (
            "xla: a float16 round trip that flushes subnormals",
            "return rounded.astype(jnp.float32)",
            "return lax.reduce_precision(y, exponent_bits=5, mantissa_bits=10)",
            tests_of("rounding"),
        ),
        (
            "xla: no float16 round trip",
            "return rounded.astype(jnp.float32)",
            "return y",
            tests_of("rounding"),
        ),
        (
            "xla: rotation of values that were not rounded",
            "y = round_trip(y, x.dtype)",
            "pass",
            tests_of("rounding"),
        ),
        (
            "xla: norms rounded whatever is said",
            "if options.round_norm:",
            "if True:",
            OF_UNROUNDED["xla"],
        ),
        (
            "xla: the lanes of a pair exchanged",
            "y1, y2 = pairs[..., 0], pairs[..., 1]",
            "y1, y2 = pairs[..., 1], pairs[..., 0]",
            OF_PAIRS["xla"],
        ),
        (
            "xla: pairs rotated into halves",
            "jnp.stack(rotated, axis=-1)",
            "jnp.stack(rotated, axis=-2)",
            OF_PAIRS["xla"],
        ),
        (
            "xla: rotation the other way round",
            "rotated = [y1 * cos - y2 * sin, y1 * sin + y2 * cos]",
            "rotated = [y1 * cos + y2 * sin, y2 * cos - y1 * sin]",
            FORMS_OF_XLA,
        ),
        (
            "xla: width reads by the limit of height",
            "== axis) & (frequency < 3 * mrope_section[axis])",
            "== axis) & (frequency < 3 * mrope_section[1])",
            tests_of("forward", "test_equals_the_definition[xla-T7-H3.1-D256-R64-bfloat16-mrope_section=(18,5,9)]"),
        ),
        (
            "xla: sections that start one too late",
            "start = sum(mrope_section[:axis])",
            "start = sum(mrope_section[: axis + 1])",
            tests_of("properties", "test_forward_keeps_to_its_definition"),
        ),
        (
            "guard: one row too many",
            "is_past = positions >= limit",
            "is_past = positions > limit",
            POSITIONS_OF_XLA,
        ),
        (
            "guard: negative positions read the table's end",
            "jnp.where((positions < 0) | is_past, 0, positions)",
            "jnp.where(is_past, 0, positions)",
            POSITIONS_OF_XLA,
        ),
        (
            "derivatives read NaN past the table",
            "cos, sin = _cos_and_sin(inputs, options, past=None)\n    gradients,",
            "cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)\n    gradients,",
            tests_of("gradients", "test_a_masked_token_outside_the_table_adds_nothing[xla-grad-False]"),
        ),
        (
            "tangents read NaN past the table",
            "cos, sin = _cos_and_sin(inputs, options, past=None)\n    for",
            "cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)\n    for",
            tests_of("gradients", "test_derivatives_read_row_0_outside_the_table[xla-just past]"),
        ),
        (
            "the table's gradient sees positions past it",
            "lax.stop_gradient(table) if past is None else past",
            "table if past is None else past",
            tests_of("gradients", "test_derivatives_read_row_0_outside_the_table[xla-just past]"),
        ),
        (
            "xla: zeros instead of NaN",
            "_cos_and_sin(inputs, options, past=jnp.nan)",
            "_cos_and_sin(inputs, options, past=0.0)",
            POSITIONS_OF_XLA,
        ),
        (
            "xla: gate and q exchanged",
            "kind.source.first % kind.source.head\n        rows[name]",
            "(kind.source.first + head_dim) % kind.source.head\n        rows[name]",
            FORMS_OF_XLA,
        ),
        (
            "xla: k with q's weight",
            "rows[name] = norm_and_rope(rows[name], weight_of(inputs, kind), kind.rotation, cos, sin, options)",
            "rows[name] = norm_and_rope(rows[name], inputs.q_weight, kind.rotation, cos, sin, options)",
            FORMS_OF_XLA,
        ),
        (
            "xla: no eps",
            "y = x32 * lax.rsqrt(mean_square + options.eps)[..., None]",
            "y = x32 * lax.rsqrt(mean_square)[..., None]",
            tests_of("forward", "test_zero_rows_give_zeros[xla]"),
        ),
        (
            "xla: no beta",
            "return weight + norm_beta if norm_beta else jnp.where(weight == 0, 0.0, weight)",
            "return jnp.where(weight == 0, 0.0, weight)",
            FORMS_OF_XLA,
        ),
        (
            "xla: a weight of -0.0 keeps its sign",
            "return weight + norm_beta if norm_beta else jnp.where(weight == 0, 0.0, weight)",
            "return weight + norm_beta",
            tests_of("forward", "test_a_weight_of_negative_zero_counts_as_zero[xla]"),
        ),
        (
            "xla backward: rotated forwards",
            "_rotate(dy[..., :rotary_dim], rotation, cos, -sin)",
            "_rotate(dy[..., :rotary_dim], rotation, cos, sin)",
            GRADIENTS_OF_XLA,
        ),
        (
            "xla backward: the gate's cotangent before q's gradient",
            "jnp.concatenate(xs, axis=-1) for xs in sections.values()",
            "jnp.concatenate(xs[::-1], axis=-1) for xs in sections.values()",
            GRADIENTS_OF_XLA,
        ),
        (
            "xla backward: what is left of 1 - sigmoid",
            "below * above * above",
            "above * (1 - above)",
            tests_of("gate", "test_values_and_gradients_equal_their_float64_definition[q_gate and k-False-float32]"),
        ),
        (
            "xla backward: the tangent of a gate takes q along",
            "rows[name] = _alone(name, rows[name], options)",
            "rows[name] = inputs.q",
            tests_of("gate", "test_what_lies_beside_moves_nothing"),
        ),
        (
            "xla backward: 1/rms once too few",
            "dx = inv_rms * (g - x32 * (inv_rms * inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))",
            "dx = inv_rms * (g - x32 * (inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))",
            GRADIENTS_OF_XLA,
        ),
        (
            "xla backward: no beta",
            "dy * _over_rows(weight.astype(jnp.float32) + options.norm_beta, x)",
            "dy * _over_rows(weight.astype(jnp.float32), x)",
            tests_of("gradients", f"test_every_mode_and_order[{MROPE_AND_BETA}-grad of grad]"),
        ),
    ),
    # The Mosaic GPU kernels, by the interpreter of what they emit.
    *_in(
        "pallas_qk/_mosaic_gpu/__init__.py",
        (
            "choice: Mosaic GPU on an Ampere",
            "if target.compute_capability < (9, 0):",
            "if target.compute_capability < (8, 0):",
            tests_of("choice", "test_an_old_gpu_gets_xla") + tests_of("mosaic_gpu", "test_unsupported_says_why"),
        ),
        (
            "choice: Mosaic GPU for pairs of odd heads",
            'if spec.rotation == "pairs" and spec.head_dim % 2:',
            "if False:",
            tests_of("choice", "test_pairs_of_odd_heads_are_refused_by_mosaic_gpu_alone"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/emit.py",
        (
            "mosaic guard: a signed position without its sign",
            "extend = arith.extsi if is_signed(self.dtype) else arith.extui",
            "extend = arith.extui",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int8]"),
        ),
        (
            "mosaic: offsets of the table in 32 bits",
            "return self + index.resized(64) * lanes",
            "return self + (index * lanes).resized(64)",
            tests_of("large", "test_table"),
            "a table of 2^32 elements, for which only a GPU has a test",
        ),
        (
            "mosaic: NaN in the first lane of a word alone",
            "word.width else lane * 0x10001, word.width)",
            "word.width else lane, word.width)",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int32]"),
        ),
        (
            "mosaic: the first lane's bits stay in the second",
            "*([word & -(1 << 16)] if is_pair else [])",
            "*([word] if is_pair else [])",
            RECIPE,
        ),
        (
            "mosaic codes: two of a word swapped",
            "{convert} low, $2, $1; {convert} high, $4, $3;",
            "{convert} low, $1, $2; {convert} high, $4, $3;",
            CODES["mosaic_gpu"],
        ),
        (
            "mosaic codes: the halves of a word swapped",
            "mov.b32 $0, {{low, high}}; }}",
            "mov.b32 $0, {{high, low}}; }}",
            CODES["mosaic_gpu"],
        ),
        (
            "mosaic: lanes of a word swapped on the way out",
            'x2.f32 $0, $2, $1;", "=r,f,f"',
            'x2.f32 $0, $1, $2;", "=r,f,f"',
            RECIPE,
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/launch.py",
        (
            "mosaic: the last program left out",
            "grid=(num_programs,),",
            "grid=(num_programs - 1,),",
            RECIPE,
        ),
        (
            "mosaic: a name for a single warpgroup, which costs a barrier",
            "None if num_warpgroups == 1 else num_warpgroups,\n        thread_name=None if num_warpgroups == 1 else",
            "num_warpgroups,\n        thread_name=",
            tests_of("mosaic_gpu", "test_what_is_emitted"),
        ),
        (
            "mosaic: a kernel without its name",
            'grid["kernel_name"] = name',
            'grid["kernel_name"] = None',
            tests_of("mosaic_gpu", "test_what_is_emitted"),
        ),
        (
            "mosaic: a slice in front of what is updated in place",
            "jax.new_ref(lax.optimization_barrier(x))",
            "jax.new_ref(x)",
            tests_of("slices", "test_kernels_lie_between_barriers"),
        ),
        (
            "mosaic: a slice in front of what is read",
            "arrays = [lax.optimization_barrier(x) for x in arrays]",
            "arrays = [x for x in arrays]",
            tests_of("slices", "test_kernels_lie_between_barriers"),
        ),
        (
            "mosaic: an update behind a result",
            "[lax.optimization_barrier(x) for x in results]",
            "[x for x in results]",
            tests_of("slices", "test_kernels_lie_between_barriers"),
        ),
        (
            "mosaic: an update behind what is updated in place",
            "lax.optimization_barrier(jax.freeze(ref))",
            "jax.freeze(ref)",
            tests_of("slices", "test_kernels_lie_between_barriers"),
        ),
    ),
    *_in(
        "pallas_qk/_projection_api.py",
        (
            "projection: norm_beta left out",
            "        norm_beta,\n        mrope_layout,",
            "        0.0,\n        mrope_layout,",
            tests_of("projection", "test_it_is_the_product_and_the_op"),
        ),
        (
            "projection with a cache: mrope_section left out",
            "values = eps, sizes, mrope_section, norm_beta",
            "values = eps, sizes, None, norm_beta",
            tests_of("projection_cache", "test_options_reach_the_op"),
        ),
    ),
    *_in(
        "pallas_qk/_projection.py",
        (
            "projection: what the kernel can't do isn't refused",
            "    if implementation == KERNEL:\n",
            "    if False:\n",
            tests_of("projection", "test_what_the_kernel_can_not_do"),
        ),
        (
            "projection: by kernel whatever is asked for",
            "if call.implementation == KERNEL else",
            "if call.implementation != 'xla' else",
            tests_of("projection", "test_none_never_takes_it"),
        ),
    ),
    *_in(
        "pallas_qk/_projection_op.py",
        (
            "projection: the product kept for the backward",
            "    @jax.checkpoint\n",
            "",
            tests_of("projection", "test_the_forward_keeps_its_arguments_alone"),
        ),
        (
            "projection: on several devices without shard_map",
            "context.num_devices > 1",
            "context.num_devices > 99",
            tests_of("projection", "test_several_devices_need_shard_map"),
        ),
        (
            "projection: a cache mapped by vmap",
            "    _op.refuse_mapped_cache(call.options, mapped)\n",
            "",
            tests_of("projection_cache", "test_it_is_not_mapped"),
        ),
        (
            "projection: gradients of what doesn't move",
            "if not isinstance(tangent, SymbolicZero)",
            "if tangent.dtype != jax.dtypes.float0",
            tests_of("projection", "test_the_products_of_a_gradient"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/epilogue.py",
        (
            "projection: tokens past the last written into the cache",
            "exists=slot.exists & is_token",
            "exists=slot.exists",
            tests_of("projection_cache", "test_rows_go_where_their_slots_say"),
        ),
        (
            "projection: a slot past the last token's read",
            "token < num_tokens, token.minimum(num_tokens - 1)",
            "token < num_tokens, token",
            tests_of("projection_cache", "test_rows_go_where_their_slots_say"),
        ),
        (
            "projection: every head into the place of the first",
            "token * num_heads + head",
            "token * num_heads",
            tests_of("projection_cache", "test_rows_go_where_their_slots_say"),
        ),
        (
            "projection: blocks of a quad exchanged",
            "return select(is_upper, [received, kept], [kept, received])",
            "return select(is_upper, [kept, received], [received, kept])",
            tests_of("projection_cache", "test_rows_go_where_their_slots_say"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/projection.py",
        (
            "projection: k and v never into the cache",
            "if place.slots is not None:\n                            write",
            "if False:\n                            write",
            tests_of("projection_cache", "test_bits_of_the_kernel_are_those_of_the_cached_op"),
            "no interpreter multiplies by wgmma",
        ),
        (
            "projection: rows of the padding returned",
            "return on_rows(lambda x: x[:num_tokens], results) if padding else results",
            "return results",
            tests_of("projection_cache", "test_a_program_for_cuda_is_one_kernel_that_updates_the_cache"),
        ),
        (
            "projection: heads of q and gates not by turns",
            "lax.bitwise_xor(head, lax.bitwise_and(turn, 1))",
            "head",
            tests_of("projection", "test_programs_take_each_tile_once_and_heads_by_turns"),
        ),
        (
            "projection: rows of a last tile of TMA that are no eight",
            "padding = -num_tokens % 8",
            "padding = 0",
            tests_of("projection", "test_a_program_for_cuda_is_one_kernel[8/1 heads]"),
        ),
        (
            "projection: indices of 64 bits under x64",
            "with jax.enable_x64(False):",
            'with jax.enable_x64(jax.config.read("jax_enable_x64")):',
            tests_of("projection", "test_positions_of_64_bits"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/thread.py",
        (
            "mosaic: the fused form without mRoPE",
            "mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else",
            "mlir_math.fma(b, c, arith.mulf(a, s)) if True else",
            RECIPE,
        ),
        (
            "mosaic: the fused form with mRoPE",
            "mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else",
            "mlir_math.fma(b, c, arith.mulf(a, s)) if False else",
            RECIPE,
        ),
        (
            "mosaic: the frequencies of pairs a vector off",
            "[lane >> 1]",
            "[(lane >> 1) + layout.lanes // 2]",
            OF_PAIRS["mosaic_gpu"],
        ),
        (
            "mosaic: pairs past the rotated lanes are rotated",
            "where = None if base + layout.reach <= rotary_dim else lane < rotary_dim",
            "where = None",
            OF_PAIRS["mosaic_gpu"],
        ),
        (
            "mosaic cache: a slot without room writes slot 0",
            "with contextlib.nullcontext() if self.exists is None else when(self.exists):",
            "with contextlib.nullcontext():",
            cache_by("mosaic_gpu"),
        ),
        (
            "mosaic cache: a slot is compared after narrowing",
            "exists, of_layer = slot < _limit(slot, places.capacity), None",
            "exists, of_layer = slot.resized(32) < _limit(slot, places.capacity), None",
            cache_by("mosaic_gpu", "-slots_dtype=int64"),
        ),
        (
            "mosaic cache: blocks as far apart as their places reach",
            "gap = places.block - places.block_size * places.place",
            "gap = 0 * places.block",
            cache_by("mosaic_gpu", "-cache_axes=bhsd"),
        ),
        (
            "mosaic cache: layer 0 alone",
            "offset + self.layer.resized(64) * places.layer",
            "offset",
            cache_by("mosaic_gpu", "-cache_axes=lbshd"),
        ),
        (
            "mosaic cache: v at k's place",
            "return cls(start + place.first if place.first else start, slot.exists, divisor)",
            "return cls(start, slot.exists, divisor)",
            cache_by("mosaic_gpu", "-cache_axes=bhs(cd)"),
        ),
        (
            "mosaic cache: rows of another dtype keep their bits",
            "if dtype == self.start.dtype:",
            "if True:",
            cache_by("mosaic_gpu", "-kv_dtype=float32", "float16"),
        ),
        (
            "mosaic codes: rows undivided",
            "lanes = [quotient(lane, self.divisor) for lane in lanes]",
            "pass",
            CODES["mosaic_gpu"],
        ),
        (
            "mosaic codes: the first head's scale for all",
            "if place.scale.per_head:",
            "if False:",
            CODES_OF_HEADS["mosaic_gpu"],
        ),
        (
            "mosaic codes: v divided by the scale of k",
            "getattr(inputs, place.scale.array)",
            "inputs.k_scale",
            CODES_OF_HEADS["mosaic_gpu"],
        ),
        (
            "mosaic: the bits of a lane in ascending order",
            "for bit in order:",
            "for bit in sorted(order):",
            RECIPE,
        ),
        (
            "mosaic: the other square of a pair fused",
            "mlir_math.fma(first, first, arith.mulf(second, second))",
            "mlir_math.fma(second, second, arith.mulf(first, first))",
            RECIPE,
        ),
        (
            "mosaic: two threads that share a pair fuse one square each",
            "(first,), (second,) = select(is_second, [other], [x]), select(is_second, [x], [other])",
            "first, second = x, other",
            RECIPE,
        ),
        (
            "mosaic: mean and eps in two roundings",
            "rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $3; rsqrt",
            "rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $1; rsqrt",
            RECIPE,
        ),
        (
            "mosaic: width reads by the limit of height",
            "remainder, limit = frequency % 3, 3 * section[axis]",
            "remainder, limit = frequency % 3, 3 * section[1]",
            tests_of("mosaic_gpu", "test_equals_the_definition[T7-H3.1-D256-R64-bfloat16-mrope_section=(18,5,9)]"),
        ),
        (
            "mosaic: sections that start at 0",
            "first, size = sum(section[:axis]), section[axis]",
            "first, size = 0, section[axis]",
            FORMS_OF_MOSAIC,
        ),
        (
            "mosaic guard: compared after narrowing",
            "inside = position < _limit(position, self.max_position)",
            "inside = position.resized(32) < min(_limit(position, self.max_position), 2**31 - 1)",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int64]"),
        ),
        (
            "mosaic guard: an unsigned position with a sign",
            "signed=is_signed(self.positions.dtype))",
            "signed=True)",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-uint32]"),
        ),
        (
            "mosaic guard: a negative position is past the table",
            "signed=is_signed(self.positions.dtype))",
            "signed=False)",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int32]"),
        ),
        (
            "mosaic: row 0 instead of NaN",
            "return select(is_past, [nan_like(word, self.cache.dtype) for word in words], words)",
            "return select(is_past, words, words)",
            tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int32]"),
        ),
        (
            "mosaic: tokens of a packed array too close",
            "gap = self.place.token - self.num_heads * self.place.head",
            "gap = (self.place.token - self.num_heads * self.place.head) // 2",
            FORMS_OF_MOSAIC,
        ),
        (
            "mosaic: offsets of rows in 32 bits",
            "offset = row.resized(64) * self.place.head",
            "offset = (row * self.place.head).resized(64)",
            tests_of("large", "test_outputs_of_the_mosaic_kernel_by_its_interpreter"),
        ),
        (
            "mosaic: offsets of tokens in 32 bits",
            "return offset + (row // self.num_heads).resized(64) * gap",
            "return offset + (row // self.num_heads * gap).resized(64)",
            tests_of("mosaic_gpu", "test_offsets_past_2_32_elements"),
        ),
        (
            "mosaic: no eps",
            "sum_of_squares.type, sum_of_squares, f32(head_dim), f32(eps))",
            "sum_of_squares.type, sum_of_squares, f32(head_dim), f32(0.0))",
            RECIPE,
        ),
        (
            "mosaic: no beta",
            "return [arith.addf(lane, f32(norm_beta)) for lane in widen(words, dtype)]",
            "return [arith.addf(lane, f32(0.0)) for lane in widen(words, dtype)]",
            RECIPE,
        ),
        (
            "mosaic: a weight of -0.0 keeps its sign",
            "return widen([Int(ptx(code,",
            "return widen(words, dtype) or widen([Int(ptx(code,",
            tests_of("mosaic_gpu", "test_weights_of_minus_zero_give_zero"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/config.py",
        (
            "mosaic: vectors that cut a pair",
            'rotary_dim if rotation == "pairs" else rotary_dim // 2',
            "rotary_dim // 2",
            tests_of("mosaic_gpu", "test_equals_the_definition[T6-H5.2-D96-R6-bfloat16-norm_beta=1.0-rotation=pairs]"),
        ),
        (
            "mosaic: chunks of pairs",
            "chunks = partners_apart and d //",
            "chunks = d //",
            tests_of("choice", "test_layouts_of_pairs"),
        ),
        (
            "mosaic: more rows than threads in a warp",
            "twice = min(32, 2 * rows_per_warp)",
            "twice = 2 * rows_per_warp",
            tests_of("mosaic_gpu", "test_equals_the_definition[T65-H12.1-D8-R4-bfloat16]"),
        ),
        (
            "mosaic: the weights after the sum where every lane is rotated",
            "after_sum = num_rows >= 65536 and r < d",
            "after_sum = num_rows >= 65536",
            tests_of("choice", "test_rule_of_the_mosaic_gpu_kernel"),
        ),
        (
            "mosaic: codes cast first wherever a cache is written",
            "cast_first = not by_slot or num_rows < 16384",
            "cast_first = True",
            tests_of("choice", "test_rows_for_another_dtype_are_cast_first_but_where_memory_binds"),
        ),
        (
            "mosaic: several heads a thread with gates",
            "if r == d and 128 <= d <= 512 and not q_copied and even",
            "if r == d and 128 <= d <= 512 and even",
            tests_of("choice", "test_rule_of_the_mosaic_gpu_kernel"),
        ),
        (
            "mosaic: several heads a thread where some lanes are not rotated",
            "if r == d and 128 <= d <= 512 and",
            "if 128 <= d <= 512 and",
            tests_of("choice", "test_rule_of_the_mosaic_gpu_kernel"),
        ),
        (
            "mosaic: a pair's lanes in chunks lie in two threads",
            "width >= 2 * (32 // rows_per_warp)",
            "width >= 32 // rows_per_warp",
            tests_of("choice", "test_layouts_of_pairs"),
        ),
        (
            "mosaic: several heads a thread with the gate in place of few tokens",
            "if chunks and not q_copied and num_rows >= 262144:",
            "if chunks and not q_copied:",
            tests_of("choice", "test_a_gate_in_place_has_several_heads_a_thread_where_memory_binds"),
        ),
        (
            "mosaic: as many heads a thread with three rows of positions",
            "    if num_axes > 1:",
            "    if False:",
            tests_of("choice", "test_several_heads_a_thread"),
        ),
        (
            "mosaic: k rows first where v is copied in many turns",
            "else k_copied and num_rows >= 32768",
            "else False",
            tests_of("choice", "test_where_k_rows_come_first"),
        ),
        (
            "mosaic: eight heads a thread in any number of programs",
            "for count in groups) <= _ONE_WAVE:",
            "for count in groups) > 0:",
            tests_of("choice", "test_several_heads_a_thread"),
        ),
        (
            "mosaic: one head a thread apart",
            "apart = heads > 1 and num_rows * d >= 2**24",
            "apart = num_rows * d >= 2**24",
            tests_of("choice", "test_float32_has_one_head_a_thread"),
        ),
        (
            "mosaic: heads apart in few turns",
            "apart = heads > 1 and num_rows * d >= 2**24",
            "apart = heads > 1",
            tests_of("choice", "test_rule_of_the_mosaic_gpu_kernel"),
        ),
        (
            "mosaic: several heads a thread with float32",
            '    if spec.dtype == "float32":\n        return 1',
            '    if spec.dtype == "float32":\n        pass',
            tests_of("choice", "test_several_heads_a_thread"),
        ),
        (
            "mosaic: groups of heads of two tokens",
            "return math.gcd(self.heads_per_thread, num_heads)",
            "return self.heads_per_thread",
            tests_of("heads_per_thread", f"{EVERY_FORM}[T5-H6.1-D64-R64-bfloat16-max_position=40-gate=None]"),
        ),
        (
            "mosaic backward: two rows' worth of lanes a thread with three rows of positions",
            "wide_threads = itemsize == 2 and num_axes == 1 and",
            "wide_threads = itemsize == 2 and",
            tests_of("mosaic_gpu_vjp", "test_a_thread_has_more_lanes"),
        ),
        (
            "mosaic backward: one row a warp where nothing is copied",
            "in_l2 or (spec.head_dim == 256 and not q_copied)",
            "in_l2",
            tests_of("mosaic_gpu_vjp", "test_more_lanes_where_nothing_is_copied"),
        ),
        (
            "mosaic backward: more programs than the GPU holds at once",
            "shares(spec, 4 * num_warpgroups * num_sms, rows_per_tile)",
            "shares(spec, 8 * num_warpgroups * num_sms, rows_per_tile)",
            tests_of("mosaic_gpu_vjp", "test_the_rule_is_one_resident_wave"),
        ),
        (
            "mosaic backward: fewer warps than memory asks for",
            "return -(-_MOST_WARPGROUPS * target.bandwidth * 132 // (4800 * target.num_sms))",
            "return max(1, _MOST_WARPGROUPS * target.bandwidth * 132 // (4800 * target.num_sms))",
            tests_of("mosaic_gpu_vjp", "test_warps_follow_the_bandwidth_of_a_multiprocessor"),
        ),
        (
            "mosaic backward: fewer warps where L2 holds the arrays",
            "if num_bytes > _L2_BYTES:",
            "if True:",
            tests_of("mosaic_gpu_vjp", "test_warps_follow_the_bandwidth_of_a_multiprocessor"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/forward.py",
        (
            "mosaic: rotation of values that were not rounded",
            "ys.append(widen(words[-1], dtype) if options.round_norm else y)",
            "ys.append(y)",
            RECIPE,
        ),
        (
            "mosaic: norms rounded whatever is said",
            "ys.append(widen(words[-1], dtype) if options.round_norm else y)",
            "ys.append(widen(words[-1], dtype))",
            OF_UNROUNDED["mosaic_gpu"],
        ),
        (
            "mosaic: the lanes of a pair exchanged",
            "rotate(own[::2], own[1::2], cos, sin, fuses_y2)",
            "rotate(own[1::2], own[::2], cos, sin, fuses_y2)",
            OF_PAIRS["mosaic_gpu"],
        ),
        (
            "mosaic: pairs rotated into halves of a vector",
            "[lane for pair in pairs for lane in pair]",
            "[lane for half in zip(*pairs, strict=True) for lane in half]",
            OF_PAIRS["mosaic_gpu"],
        ),
        (
            "mosaic: the wrong partner",
            "partner_index = layout.bases.index(base + half)",
            "partner_index = layout.bases.index(half)",
            tests_of("mosaic_gpu", "test_every_configuration_gives_the_same_bits"),
        ),
        (
            "mosaic: rows past the last",
            "group = group.minimum(num_groups - 1)",
            "group = group.minimum(num_groups)",
            tests_of("mosaic_gpu", "test_a_token_alone_gives_the_bits_it_gives_in_a_batch"),
        ),
        (
            "mosaic: the gate read at q's place",
            "if kind.source != lead else lead_row",
            'if kind.heads != "q" else lead_row',
            tests_of("mosaic_gpu", "test_gates_keep_nan_payloads_and_rows_their_nans"),
        ),
        (
            "mosaic: k with q's weight",
            "weight = weight_of(inputs, work.normed)",
            "weight = inputs.q_weight",
            FORMS_OF_MOSAIC,
        ),
        (
            "mosaic: groups of heads that lie one row apart",
            "else group * size",
            "else group",
            tests_of("heads_per_thread", f"{EVERY_FORM}[{TWO_HEADS}]"),
        ),
        (
            "mosaic: heads that lie apart, from the token's first group on",
            "group + token * (num_heads - groups_of_token)",
            "token * num_heads",
            tests_of("heads_per_thread", f"{EVERY_FORM}[{TWO_HEADS}]"),
        ),
        (
            "mosaic: heads apart lie side by side",
            "apart = groups_of_token if config.heads_apart else 1",
            "apart = 1",
            tests_of("heads_per_thread", "test_how_far_apart_the_heads_of_a_thread_lie"),
        ),
        (
            "mosaic: as many programs as for one head",
            "spec.num_tokens * num_heads // config.heads_of(num_heads), groups_per_program",
            "spec.num_tokens * num_heads, groups_per_program",
            tests_of("heads_per_thread", "test_programs_are_as_many_as_groups_need"),
        ),
        (
            "mosaic: groups counted as rows",
            "num_groups = num_tokens * groups_of_token",
            "num_groups = num_tokens * num_heads",
            tests_of("heads_per_thread", f"{EVERY_FORM}[{TWO_HEADS}]"),
        ),
        (
            "mosaic: programs of a normalised v left out",
            "len(works[heads]) * programs_each[heads] for heads in works)",
            "programs_each[heads] for heads in works)",
            tests_of("norms", "test_no_weight_is_a_weight_of_ones"),
        ),
        (
            "mosaic: nothing is copied next to k and a normalised v",
            "[] if number else [*copied.values()])",
            "[])",
            tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[mosaic_gpu-copied-packed-table]"),
        ),
        (
            "mosaic: the rule sees no cache",
            "    config = config or configuration(inputs, options)\n    inputs, written = with_caches(inputs, types)\n",
            "    inputs, written = with_caches(inputs, types)\n    config = config or configuration(inputs, options)\n",
            tests_of("choice", "test_the_rule_of_a_call_knows_its_cache"),
        ),
        (
            "mosaic: weights loaded for each head",
            "            if not weights:",
            "            if True:",
            tests_of("heads_per_thread", "test_what_heads_share_is_loaded_once"),
        ),
        (
            "mosaic: all heads loaded before the first is computed",
            "ahead = min(size, config.heads_ahead)",
            "ahead = size",
            tests_of("heads_per_thread", "test_each_head_is_loaded_before_the_arithmetic_of_one_before_it"),
        ),
        (
            "mosaic: angles computed for each head",
            "        @functools.cache\n        def angles_of(",
            "        def angles_of(",
            tests_of("heads_per_thread", "test_what_heads_share_is_computed_once"),
        ),
        (
            "mosaic: weights computed for each head",
            "        @functools.cache\n        def weights_of(",
            "        def weights_of(",
            tests_of("heads_per_thread", "test_what_heads_share_is_computed_once"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/backward.py",
        (
            "mosaic backward: the projection's sign",
            "arith.mulf(r, f32(-1 / head_dim))",
            "arith.mulf(r, f32(1 / head_dim))",
            GRADIENTS_OF_MOSAIC,
        ),
        (
            "mosaic backward: a partner with its own sign",
            "return [word ^ signs for word in words]",
            "return words",
            GRADIENTS_OF_MOSAIC,
        ),
        (
            "mosaic backward: the lanes of a pair with their own signs",
            "[((word << 16) | (word >> 16)) ^ (1 << 31) for word in words]",
            "[(word << 16) | (word >> 16) for word in words]",
            GRADIENTS_OF_PAIRS["bfloat16"],
        ),
        (
            "mosaic backward: the other lane of a float32 pair negated",
            "for word in (second, first ^ (1 << 31))]",
            "for word in (second ^ (1 << 31), first)]",
            GRADIENTS_OF_PAIRS["float32"],
        ),
        (
            "mosaic backward: the angles of halves for pairs",
            'return [c for c in cos for _ in "12"], [s for s in sin for _ in "12"]',
            "return [*cos, *cos], [*sin, *sin]",
            GRADIENTS_OF_PAIRS["bfloat16"],
        ),
        (
            "mosaic backward: rows past the last count in the weights' gradients",
            "return [*select(exists, added, sums),",
            "return [*added,",
            GRADIENTS_OF_MOSAIC,
        ),
        (
            "mosaic backward: partial rows of warps that are not there",
            "counts = takes_k.equals(of_k) & (other < q_warps + k_warps)",
            "counts = takes_k.equals(of_k)",
            GRADIENTS_OF_MOSAIC,
        ),
        (
            "mosaic backward: the gate's gradient at q's place",
            "beside = place.first - lead.first",
            "beside = 0",
            tests_of("kernel_gradients", "test_cotangents_of_gates_keep_their_bits_and_rows_their_nans[mosaic_gpu]"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/gate.py",
        (
            "the gate's kernel: sigmoid of -gate",
            "select(bits < 1 << 31, [above], [product])",
            "select(bits < 1 << 31, [product], [above])",
            tests_of("gate", "test_the_kernel_equals_its_float64_definition[T37-H5.2-D256-R64-bfloat16-packed=True]"),
        ),
        (
            "the gate's kernel: threads past the end",
            "index = index.minimum(total - 1)",
            "index = index.minimum(total)",
            tests_of("gate", "test_the_kernel_equals_its_float64_definition[T7-H3.1-D80-R40-float16]"),
        ),
        (
            "the gate's kernel: the gate's cotangent at q's place",
            "targets.row(row) + column",
            "targets.array + targets.offset(row) + column",
            tests_of("gate", "test_the_kernel_equals_its_float64_definition[T7-H3.1-D80-R40-float16]"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/weight_sum.py",
        (
            "mosaic backward: the sum repeats the last partial row",
            "term = select(row < num_rows, widen(words, source.dtype), [f32(0.0)] * lanes)",
            "term = widen(words, source.dtype)",
            tests_of("mosaic_gpu_vjp", "test_a_second_kernel_sums_what_several_programs_have"),
        ),
        (
            "mosaic backward: the sum of the first partial rows alone",
            "for first in range(0, num_rows, _ROWS):",
            "for first in range(0, min(num_rows, _ROWS), _ROWS):",
            tests_of("mosaic_gpu_vjp", "test_a_second_kernel_sums_what_several_programs_have"),
        ),
        (
            "mosaic backward: the sums of k's weight by no warp",
            "num_programs = pl.cdiv(warps * len(partials), warps_per_program)",
            "num_programs = pl.cdiv(warps, warps_per_program)",
            tests_of("mosaic_gpu_vjp", "test_a_second_kernel_sums_what_several_programs_have"),
        ),
    ),
    # The Triton kernels, by Pallas's interpret mode.
    *_in(
        "pallas_qk/_triton/__init__.py",
        (
            "choice: Triton on a GPU that is too old",
            "if target.compute_capability < (8, 0):",
            "if target.compute_capability < (7, 0):",
            tests_of("choice", "test_an_old_gpu_gets_xla"),
        ),
        (
            "choice: Triton for codes that a GPU does not convert to",
            "target.compute_capability < (8, 9)",
            "target.compute_capability < (8, 0)",
            tests_of("choice", "test_a_cache_of_8_bits_needs_a_gpu_that_converts_to_them"),
        ),
        (
            "choice: Triton for codes on a Hopper at first",
            "target.compute_capability < (8, 9)",
            "target.compute_capability < (9, 0)",
            tests_of("choice", "test_a_cache_of_8_bits_needs_a_gpu_that_converts_to_them"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/tiles.py",
        (
            "triton: a layout that claims the wrong bits",
            "bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != half]",
            "bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != rotary_dim]",
            TREE_OF_TRITON,
        ),
        (
            "triton: the wrong partner chunk",
            "rotated = [arithmetic.rotate(ys[j], ys[j + pairs], cos, sin)",
            "rotated = [arithmetic.rotate(ys[j], ys[2 * pairs - 1 - j], cos, sin)",
            tests_of("forward", "test_chunks_of_few_lanes"),
        ),
        (
            "triton: lanes past the end of a row count in the sum",
            "return Layout([lane, partner], [lane < head_dim, rotated], [0], bits, [frequency], rotated, rotate)",
            "return Layout([lane, partner], [None, rotated], [0], bits, [frequency], rotated, rotate)",
            TREE_OF_TRITON + tests_of("forward", "test_equals_the_definition[triton-T7-H3.1-D80-R40-float16]"),
        ),
        (
            "triton: the places of a pair swapped",
            "== place, words, 0) for place in (0, 1))",
            "== place, words, 0) for place in (1, 0))",
            OF_PAIRS["triton"],
        ),
        (
            "triton: a pair loses one of its places",
            "== place, words, 0) for place in (0, 1))",
            "== place, words, 0) for place in (0, 0))",
            TREE_OF_TRITON,
        ),
        (
            "triton: words summed in 64 bits under x64",
            "jnp.sum(words, axis=-1, dtype=jnp.int32)",
            "jnp.sum(words, axis=-1)",
            tests_of("positions", "test_positions_outside[triton-int64]"),
        ),
        (
            "triton: a rotated pair put back exchanged",
            "jnp.where(iota(shape, 2) == 0, first, second)",
            "jnp.where(iota(shape, 2) == 1, first, second)",
            OF_PAIRS["triton"],
        ),
        (
            "triton: lanes that are not rotated lost to pairs",
            "return [jnp.where(lane < rotary_dim, rotated, y)]",
            "return [rotated]",
            OF_PAIRS["triton"],
        ),
        (
            "triton: no mask on the rows",
            "mask = None if num_tokens * num_heads % num_rows_per_program == 0 else",
            "mask = None if True else",
            tests_of("masks", "test_rows_that_fill_no_program_are_masked"),
        ),
        (
            "triton: the gate read at q's place",
            "part=(first,) if len(source.kinds) > 1 else ())",
            "part=(0,) if len(source.kinds) > 1 else ())",
            tests_of("forward", "test_gate_bits_are_kept[triton]"),
        ),
        (
            "triton: a packed gate read at q's place",
            "return RowIndex(ref, first, step)",
            "return RowIndex(ref, first - first % step, step)",
            PACKED_IN_TRITON,
        ),
    ),
    *_in(
        "pallas_qk/_triton/arithmetic.py",
        (
            "triton: the bits of a lane in ascending order",
            "for bit in order:",
            "for bit in sorted(order):",
            TREE_OF_TRITON,
        ),
        (
            "triton codes: scales that are 0 or infinite as others",
            "jnp.where(is_special, minus_reciprocal, minus_power)",
            "minus_power",
            CODES["triton"],
            PTX,
        ),
        (
            "triton codes: divided by what multiplies",
            'f"${9 + i}", f"${13 + i}"',
            'f"${13 + i}", f"${9 + i}"',
            CODES["triton"],
            PTX,
        ),
        (
            "triton codes: two of a word swapped",
            "x{2 * i + 1}, x{2 * i};",
            "x{2 * i}, x{2 * i + 1};",
            CODES["triton"],
            PTX,
        ),
        (
            "triton: rotation of values that were not rounded",
            "y1, y2 = _reference.round_trip(y1, dtype), _reference.round_trip(y2, dtype)",
            "y1, y2 = y1 * 1.0, y2 * 1.0",
            tests_of("rounding"),
        ),
        (
            "triton: norms rounded whatever is said",
            "if round_norm:\n            y1, y2 = _reference",
            "if True:\n            y1, y2 = _reference",
            OF_UNROUNDED["triton"],
        ),
        (
            "triton: norms rounded in PTX whatever is said",
            "if round_norm:\n            y1, y2 = round_trip",
            "if True:\n            y1, y2 = round_trip",
            tests_of("parity", "test_agrees_on_a_gpu[triton-T4-H2.1-D80-R80-float16-round_norm=False]"),
            PTX,
        ),
        (
            "triton: no round trip in PTX",
            "y1, y2 = round_trip(y1), round_trip(y2)",
            "y1, y2 = y1 * 1.0, y2 * 1.0",
            BITS_OF_TRITON,
            PTX,
        ),
        (
            "triton: the other product fused",
            "mul.rn.f32 t, $3, $4; {sign}fma.rn.f32 $0, $1, $2, t;",
            "mul.rn.f32 t, $1, $2; {sign}fma.rn.f32 $0, $3, $4, t;",
            BITS_OF_TRITON,
            PTX,
        ),
        (
            "triton: the fused form with mRoPE",
            "o2 = dot2(y2, cos, y1, sin) if fuses_y2 else dot2(y1, sin, y2, cos)",
            "o2 = dot2(y1, sin, y2, cos)",
            BITS_OF_TRITON,
            PTX,
        ),
        (
            "triton: mean and eps in two roundings",
            "rcp.approx.ftz.f32 r, $2; fma.rn.f32 $0, $1, r, $3; }",
            "div.rn.f32 r, $1, $2; add.rn.f32 $0, r, $3; }",
            BITS_OF_TRITON,
            PTX,
        ),
        (
            "triton: packed lanes swapped",
            'return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $2, $1;", "=r,r,r", dtype, y, pack=2)',
            'return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $1, $2;", "=r,r,r", dtype, y, pack=2)',
            BITS_OF_TRITON,
            PTX,
        ),
        (
            "triton: no eps",
            "mean_plus_eps=lambda s, head_dim, eps: s / head_dim + eps,",
            "mean_plus_eps=lambda s, head_dim, eps: s / head_dim,",
            tests_of("forward", "test_zero_rows_give_zeros[triton]"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/config.py",
        (
            "triton: pairs in the layouts of halves",
            'return TritonForward(spec.rotation or "whole")',
            'return TritonForward("row" if spec.rotation else "whole")',
            tests_of("choice", "test_layouts_of_pairs"),
        ),
        (
            "triton backward: pairs in a row of halves",
            'if spec.rotation == "halves" else spec.rotation or "whole"',
            'if spec.rotation else "whole"',
            tests_of("choice", "test_layouts_of_pairs"),
        ),
        (
            "triton: halves where the gate is not copied",
            "(num_rows >= 32768 and q_copied)",
            "num_rows >= 32768",
            tests_of("choice", "test_the_triton_kernel_takes_chunks_where_no_gate_is_copied"),
        ),
        (
            "triton: chunks of few lanes in any number",
            "chunks = d // chunk_lanes(d, r) <= 12",
            "chunks = True",
            tests_of("choice", "test_layout_rule_of_the_triton_kernel"),
        ),
        (
            "triton backward: more programs than the GPU holds at once",
            "resident = programs_per_sm * num_sms",
            "resident = 2 * programs_per_sm * num_sms",
            tests_of("triton_vjp", "test_programs_are_resident_at_once_and_have_work"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/forward.py",
        (
            "triton cache: a slot without room writes slot 0",
            "cast, both(mask, over_tile[0]))",
            "cast, mask)",
            cache_by("triton"),
        ),
        (
            "triton cache: v at k's place",
            '"c": jnp.int32(place.first > 0)',
            '"c": jnp.int32(0)',
            cache_by("triton", "-cache_axes=bhs(cd)"),
        ),
        (
            "triton codes: the first head's scale for all",
            "if not scale.per_head:",
            "if True:",
            CODES_OF_HEADS["triton"],
        ),
        (
            "triton codes: v divided by the scale of k",
            "scales = getattr(inputs, scale.array)",
            "scales = inputs.k_scale",
            CODES_OF_HEADS["triton"],
        ),
        (
            "triton: row 0 instead of NaN",
            "return cos if is_past is None else jnp.where(is_past, jnp.nan, cos), sin",
            "return cos, sin",
            tests_of("positions", "test_positions_outside[triton-int32]"),
        ),
        (
            "triton: packed v read at k's place",
            "rows, kind.source, spec)",
            'rows, (rows["k"] if kind is rows.get("v") else kind).source, spec)',
            PACKED_IN_TRITON,
        ),
        (
            "triton: k with q's weight",
            "if (weight := weight_of(inputs, kind)) is not None",
            "if (weight := inputs.q_weight) is not None",
            tests_of("forward", "test_equals_the_definition[triton-T2-H16.2-D256-R64-float16]"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/backward.py",
        (
            "triton backward: k's cotangent for v's",
            "copies[name] = load(getattr(cotangents, name), wide_place, in_copied)",
            'copies[name] = load(getattr(cotangents, name.replace("v", "k")), wide_place, in_copied)',
            PACKED_IN_TRITON,
        ),
        (
            "triton backward: the projection's sign",
            "(inv_rms * (-1.0 / head_dim))",
            "(inv_rms * (1.0 / head_dim))",
            GRADIENTS_OF_TRITON,
        ),
        (
            "triton backward: the last step left out",
            "own_steps = div(num_steps - program + (programs - 1), programs)",
            "own_steps = div(num_steps - program + (programs - 1), programs) - 1",
            GRADIENTS_OF_TRITON,
        ),
        (
            "triton backward: rows past the last divide by zero",
            "one, zero = jnp.ones((), inputs.q.dtype), jnp.zeros((), inputs.q.dtype)",
            "one, zero = jnp.zeros((), inputs.q.dtype), jnp.zeros((), inputs.q.dtype)",
            tests_of("triton_vjp", "test_rows_past_the_last_add_nothing_even_without_eps"),
        ),
        (
            "triton backward: partial sums past the first tile left out",
            "total = total + jnp.sum(partials, axis=0, keepdims=True)",
            "total = jnp.sum(partials, axis=0, keepdims=True)",
            tests_of("triton_vjp", "test_the_sum_of_many_partials"),
        ),
        (
            "triton backward: several warps, which sum through shared memory",
            "compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),",
            "compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),",
            tests_of(
                "triton_vjp",
                "test_every_case_is_lowered_for_cuda_to_two_kernels_without_a_gpu[T1-H16.2-D256-R64-bfloat16]",
            ),
        ),
    ),
    # Tables, positions, slots and the exchange with torch.
    *_in(
        "pallas_qk/rope.py",
        (
            "rope: the sign of sin in one quarter",
            "sin = jnp.where(quarter >= 2, -sin, sin)",
            "sin = jnp.where(quarter > 2, -sin, sin)",
            tests_of("rope", "test_rows_are_exact_at_every_position"),
        ),
        (
            "rope: what follows a grid continues at its height",
            "at += max(segment[1:])",
            "at += segment[1]",
            tests_of("rope", "test_mrope_positions_of_images"),
        ),
        (
            "rope: a table element rounded twice",
            "if dtype != jnp.bfloat16:\n        return values.astype(dtype)",
            "if dtype:\n        return values.astype(dtype)",
            tests_of("rope", "test_an_element_is_rounded_once"),
        ),
        (
            "rope: padding is no position 0",
            "positions = xp.maximum(positions, 0)",
            "positions = positions * 1",
            tests_of("rope", "test_negative_positions_mark_padding"),
        ),
        (
            "rope: one of the four products is lost",
            "return x_high * y_high + (middle >> 16) + (rest >> 16)",
            "return x_high * y_high + (rest >> 16)",
            tests_of("rope", "test_angles_are_off_by_less_than_6e_9"),
        ),
    ),
    *_in(
        "pallas_qk/_rope_kinds.py",
        (
            "rope: an older spelling is forgotten",
            'ALIASES = {"mrope": "default", "su": "longrope"}',
            'ALIASES = {"mrope": "default"}',
            tests_of("rope", "test_longrope_chooses_by_the_length"),
        ),
        (
            "rope: yarn's ramp starts at a negative frequency",
            "first, last = max(first, 0), min(last, rotary_dim - 1)",
            "first, last = first, min(last, rotary_dim - 1)",
            tests_of("rope", "test_yarn_s_ramp_starts_and_ends_within_the_lanes"),
        ),
        (
            "rope: yarn's ramp ends at the last frequency",
            "first, last = max(first, 0), min(last, rotary_dim - 1)",
            "first, last = max(first, 0), min(last, rotary_dim // 2 - 1)",
            tests_of("rope", "test_yarn_s_ramp_starts_and_ends_within_the_lanes"),
        ),
        (
            "rope: dynamic below the trained length",
            'length = max(_needed_length("dynamic", sequence_length), trained)',
            'length = _needed_length("dynamic", sequence_length)',
            tests_of("rope", "test_dynamic_stretches_theta_beyond_the_trained_length"),
        ),
        (
            "rope: longrope's long factors at the trained length",
            'sequence_length) > trained else "short"',
            'sequence_length) >= trained else "short"',
            tests_of("rope", "test_longrope_chooses_by_the_length"),
        ),
    ),
    *_in(
        "pallas_qk/kv_cache.py",
        (
            "slots: a place before the first page is on the last",
            "jnp.where(places < 0, block_tables.shape[-1], places // size)",
            "places // size",
            SLOTS_OUTSIDE,
        ),
        (
            "slots: a sequence before the first is the last",
            "jnp.where(sequences < 0, block_tables.shape[0], sequences)",
            "sequences",
            SLOTS_OUTSIDE,
        ),
        (
            "slots: a place past the table's row is on its last page",
            'get(mode="fill", fill_value=-1)',
            'get(mode="clip")',
            SLOTS_OUTSIDE,
        ),
        (
            "slots: a place past a row of the cache is in the next one",
            "exists = (places >= 0) & (places < size)",
            "exists = places >= 0",
            SLOTS_OUTSIDE,
        ),
        (
            "slots: NumPy's 64 bits are narrowed unseen",
            "return narrowed",
            "return array.astype(dtype)",
            SLOTS_OUTSIDE,
        ),
        (
            "slots: the last block is there in full",
            "last_block = (jnp.iinfo(place.dtype).max - place) // size",
            "last_block = jnp.iinfo(place.dtype).max // size",
            tests_of("kv_cache", "test_a_slot_that_the_dtype_does_not_hold_is_none"),
        ),
        (
            "slots: 64 bits of one argument are not enough",
            "wide = any(array",
            "wide = all(array",
            tests_of("kv_cache", "test_one_argument_of_64_bits_gives_64_bits"),
        ),
        (
            "read: v by the scale of k",
            "_multiplied(v, v_scale)",
            "_multiplied(v, k_scale)",
            tests_of("fp8_cache", "test_a_cache_that_is_read"),
        ),
        (
            "read: scales where they lie",
            "if sharding.mesh.explicit_axes:  # where the two must agree",
            "if False:",
            tests_of("fp8_cache", "test_a_cache_that_is_read_stays_sharded"),
        ),
        (
            "read: axes in the order of memory",
            'order = [names.index(name) for name in "lbshd" if name in names]',
            "order = list(range(len(names)))",
            tests_of("fp8_cache", "test_a_cache_that_is_read"),
        ),
        (
            "read: codes without their scale",
            "return x.astype(jnp.float32) * scale",
            "return x.astype(jnp.float32)",
            tests_of("fp8_cache", "test_a_cache_that_is_read"),
        ),
        (
            "read: half of an odd axis of k and v",
            "_cache_checks.check_caches(k_cache, v_cache, cache_axes, num_kv_heads, head_dim)",
            "pass",
            tests_of("fp8_cache", "test_what_can_not_be_read"),
        ),
        (
            "slots: explicit axes by the places alone",
            "mesh = next((sharding.mesh for sharding in (first, *rest) if not sharding.mesh.empty), first.mesh)",
            "mesh = first.mesh",
            tests_of("kv_cache", "test_numpy_arrays_beside_sharded_ones"),
        ),
    ),
    *_in(
        "pallas_qk/dlpack.py",
        (
            "dlpack: strides are ignored",
            "if not tensor.is_contiguous():",
            "if tensor.is_contiguous() is None:",
            tests_of("dlpack", "test_from_torch_refuses_what_would_be_a_copy"),
        ),
        (
            "dlpack: 64 bits narrowed unseen",
            "if str(narrowed) != dtype:",
            "if not narrowed:",
            tests_of("dlpack", "test_from_torch_refuses_what_no_copy_would_help"),
        ),
        (
            "dlpack: a storage that was cut",
            "if held >= needed:",
            "if held:",
            tests_of("dlpack", "test_from_torch_refuses_what_no_copy_would_help"),
        ),
        (
            "dlpack: a copy shares the tensor's memory",
            "array.device, may_alias=False)",
            "array.device)",
            tests_of("dlpack", "test_a_copy_is_jaxs_own"),
        ),
        (
            "dlpack: memory goes back before the device has passed",
            "        torch.cuda.synchronize(device)",
            "        del torch, device",
            tests_of("dlpack", "test_torch_memory_goes_back_after_the_device_has_passed"),
        ),
        (
            "dlpack: several devices' array",
            "if len(devices) > 1 or not array.is_fully_addressable:",
            "if not array.is_fully_addressable:",
            tests_of("dlpack", "test_to_torch_refuses_sharded_arrays_and_takes_what_it_proposes"),
        ),
    ),
    # The oracle.
    *_in(
        "torch_ref/_checks.py",
        (
            "torch: three counts of any sum",
            "or min(section) < 0 or sum(section) != rotary_dim // 2:",
            "or min(section) < 0:",
            tests_of("torch_ref", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: tensors of several devices",
            "if tensor.device != device:",
            "if tensor.device == name:",
            tests_of("torch_ref", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: weights in float64 beside float32 activations",
            "tuple(dtype for dtype in activation_dtypes if dtype.itemsize <= max(4, q_gate.itemsize))",
            "activation_dtypes",
            tests_of("torch_ref", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: positions without a table",
            "if (cos_sin_cache is None) != (positions is None):",
            "if cos_sin_cache is not None and positions is None:",
            tests_of("torch_ref", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: a rotary_dim without a table",
            "if rotary_dim != 0:",
            "if rotary_dim < 0:",
            tests_of("torch_ref", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: the two caches in two dtypes",
            '("v_cache", v_cache, (*blocks, *row), (k_cache.dtype,)),',
            '("v_cache", v_cache, (*blocks, *row), CACHE_DTYPES),',
            tests_of("torch_kv_cache", "test_a_bad_call_names_rule_value_and_remedy"),
        ),
        (
            "torch: a scale beside a cache of 16 bits",
            "if scale is not None:",
            "if False:",
            tests_of("torch_kv_cache", "test_bad_scales"),
        ),
    ),
    *_in(
        "torch_ref/reference.py",
        (
            "torch: no round trip",
            "return y.to(x.dtype).to(compute_dtype)",
            "return y",
            tests_of("torch_ref", "test_oracle_equals_the_reference"),
        ),
        (
            "torch: a round trip that round_norm leaves out",
            "return y.to(x.dtype).to(compute_dtype) if round_norm else y",
            "return y.to(x.dtype).to(compute_dtype)",
            tests_of("torch_ref", "test_reference_of_every_option_is_the_statement"),
        ),
        (
            "torch: pairs written as halves",
            "y2 * cos + y1 * sin], dim=axis)",
            "y2 * cos + y1 * sin], dim=-2)",
            tests_of("torch_ref", "test_reference_of_every_option_is_the_statement"),
        ),
        (
            "torch: pairs read as halves",
            '((half, 2), -1) if rotation == "pairs"',
            '((2, half), -2) if rotation == "pairs"',
            tests_of("torch_ref", "test_reference_of_every_option_is_the_statement"),
        ),
        (
            "torch: a negative position reads the table's end",
            "table[rows.clamp(min=0).where(~past, 0)]",
            "table[rows.where(~past, 0)]",
            OUTSIDE_OF_TORCH,
        ),
        (
            "torch: 2^63 is a negative position",
            "past |= rows < 0",
            "past |= rows < -(2**63)",
            OUTSIDE_OF_TORCH,
        ),
        (
            "torch: a slot at the capacity is written",
            "slots < num_blocks * block_size",
            "slots <= num_blocks * block_size",
            tests_of("torch_kv_cache", "test_the_reference_writes_the_rows_and_no_other_bit"),
        ),
        (
            "torch: a negative slot counts from the end",
            "(slots >= 0) & (slots <",
            "(slots >= -num_blocks) & (slots <",
            tests_of("torch_kv_cache", "test_the_reference_writes_the_rows_and_no_other_bit"),
        ),
        (
            "torch: the gate in the input's memory",
            "gate.flatten(1).clone(memory_format=torch.contiguous_format),",
            "gate.flatten(1),",
            tests_of("torch_ref", "test_gate_keeps_every_bit_in_memory_of_its_own"),
        ),
    ),
    *_in(
        "torch_ref/triton_oracle.py",
        (
            "oracle: squares that a sum of two threads may fuse",
            "squares = z * z if row_block > 32 else tl.fma(z, z, 0.0)",
            "squares = z * z",
            tests_of("torch_ref", "test_one_lane_a_thread_has_rounded_squares_where_the_rotation_comes_first"),
        ),
        (
            "oracle: a negative slot is written",
            "if (slot >= 0) & (slot < num_slots):",
            "if (slot >= -1) & (slot < num_slots):",
            ORACLE_S_CACHE,
        ),
        (
            "oracle: a slot at the capacity is written",
            "if (slot >= 0) & (slot < num_slots):",
            "if (slot >= 0) & (slot <= num_slots):",
            ORACLE_S_CACHE,
        ),
        (
            "oracle: slots in 32 bits",
            "slot = tl.load(slots_ref + token * slot_stride).to(tl.int64)",
            "slot = tl.load(slots_ref + token * slot_stride).to(tl.int32)",
            tests_of("torch_kv_cache", "test_oracle_equals_the_reference[cpu-b s h d-torch.float16-far]"),
        ),
        (
            "oracle: lanes of v written by the stride of heads",
            "tl.store(v_row_ref + lane * v_cache_lane_stride, v, mask=in_row)",
            "tl.store(v_row_ref + lane * v_cache_head_stride, v, mask=in_row)",
            ORACLE_S_CACHE,
        ),
        (
            "oracle: lanes past a row",
            "tl.store(k_row_ref + lane * k_cache_lane_stride, k, mask=in_row)",
            "tl.store(k_row_ref + lane * k_cache_lane_stride, k)",
            ORACLE_S_CACHE,
        ),
        (
            "oracle: v divided by the scale of k",
            "_quantized(v, tl.load(v_scale_ref + head * v_scale_stride)",
            "_quantized(v, tl.load(k_scale_ref + head * k_scale_stride)",
            ORACLE_S_CODES,
        ),
        (
            "oracle: one scale for every head",
            "_quantized(k, tl.load(k_scale_ref + head * k_scale_stride)",
            "_quantized(k, tl.load(k_scale_ref)",
            ORACLE_S_CODES,
        ),
        (
            "oracle: 8 bits that don't saturate",
            "quotient.clamp(-largest, largest)",
            "quotient",
            tests_of("torch_kv_cache", "test_codes_of_float32[cpu-torch.float8_e5m2]"),
        ),
        (
            "oracle: a NaN with a sign",
            "codes = torch.where(quotient.isnan(), 0x7F, codes)",
            "pass",
            tests_of("torch_kv_cache", "test_codes_of_float32[cpu-torch.float8_e4m3fn]"),
        ),
        (
            "oracle: width reads by the limit of height",
            "            reads_width = (frequency % 3 == 2) & (frequency < 3 * mrope_section[2])",
            "            reads_width = (frequency % 3 == 2) & (frequency < 3 * mrope_section[1])",
            tests_of("torch_ref", "test_oracle_equals_the_reference"),
        ),
        (
            "oracle: the token's stride of q for k",
            "row_ref = k_ref + token * k_stride + (head - num_q_heads) * head_dim"
            "\n        out_ref = k_out_ref + token * (num_kv_heads * head_dim) + (head - num_q_heads) * head_dim"
            "\n        weight_ref = k_weight_ref\n\n    lane = tl.arange(0, row_block)"
            "\n    in_row = lane < head_dim\n    x =",
            "row_ref = k_ref + token * (num_kv_heads * head_dim) + (head - num_q_heads) * head_dim"
            "\n        out_ref = k_out_ref + token * (num_kv_heads * head_dim) + (head - num_q_heads) * head_dim"
            "\n        weight_ref = k_weight_ref\n\n    lane = tl.arange(0, row_block)"
            "\n    in_row = lane < head_dim\n    x =",
            tests_of("torch_ref", "test_strided_tokens_give_the_bits_of_dense_ones"),
        ),
        (
            "oracle: no round trip",
            "* (weight.to(tl.float32) + norm_beta)).to(dtype).to(tl.float32)",
            "* (weight.to(tl.float32) + norm_beta))",
            tests_of("torch_ref", "test_oracle_equals_the_reference"),
        ),
        (
            "oracle: a round trip that round_norm leaves out",
            "if round_norm else tl.float32,",
            "if True else tl.float32,",
            tests_of("torch_ref", "test_oracle_of_every_option_equals_the_reference"),
        ),
        (
            "oracle: pairs of neighbours that overlap",
            "lane1 = 2 * frequency if pairs else frequency",
            "lane1 = frequency",
            tests_of("torch_ref", "test_oracle_of_every_option_equals_the_reference"),
        ),
        (
            "oracle: the partner of a pair read from the other half",
            "x2 = tl.load(row_ref + partner + lane1,",
            "x2 = tl.load(row_ref + half_rotary + lane1,",
            tests_of("torch_ref", "test_oracle_of_every_option_equals_the_reference"),
        ),
        (
            "oracle: the weight of the wrong partner",
            "tl.load(weight_ref + partner + lane1,",
            "tl.load(weight_ref + half_rotary + lane1,",
            tests_of("torch_ref", "test_oracle_of_every_option_equals_the_reference"),
        ),
        (
            "oracle: the other product is rounded, first lane",
            "tl.fma(y1, cos, y2 * sin * -1.0)",
            "tl.fma(y2 * -1.0, sin, y1 * cos)",
            tests_of("torch_ref", "test_the_source_says_which_product_is_rounded"),
        ),
        (
            "oracle: the other product is rounded, second lane",
            "tl.fma(y1, sin, y2 * cos)",
            "tl.fma(y2, cos, y1 * sin)",
            tests_of("torch_ref", "test_the_source_says_which_product_is_rounded"),
        ),
        (
            "oracle: a zero without its sign",
            "y2 * sin * -1.0)",
            "0.0 - y2 * sin)",
            tests_of("torch_ref", "test_the_source_says_which_product_is_rounded"),
        ),
        (
            "oracle: pairs by the compiler's products",
            'explicit_fma=rotation == "pairs" or not round_norm,',
            "explicit_fma=not round_norm,",
            tests_of("torch_ref", "test_the_source_says_which_product_is_rounded"),
        ),
        (
            "oracle: float32 without a round trip by other products",
            "round_norm = round_norm or q_gate.dtype == torch.float32",
            "round_norm = bool(round_norm)",
            tests_of("torch_ref", "test_round_norm_changes_no_bit_of_float32"),
        ),
    ),
    *_in(
        "pallas_qk/_rows.py",
        (
            "v is not normalised",
            "if options.return_kv else (), options.v_norm)",
            "if options.return_kv else ())",
            tests_of("norms", "test_no_weight_is_a_weight_of_ones"),
        ),
        (
            "a head further on lies where the first does",
            "first=self.first + heads * self.head, scale=scale",
            "scale=scale",
            tests_of("heads_per_thread", f"{EVERY_FORM}[{TWO_HEADS}]"),
        ),
        (
            "a head further on has the first's scale",
            "self.scale._replace(first=self.scale.first + heads)",
            "self.scale",
            tests_of("heads_per_thread", "test_rows_of_a_cache_have_the_bits_of_one_head"),
        ),
    ),
    *_in(
        "pallas_qk/_reference.py",
        (
            "xla: the norm is of the row before its rotation",
            "mean_square = tree_sum(x32 * x32) / head_dim",
            "mean_square = tree_sum(x.astype(jnp.float32) ** 2) / head_dim",
            tests_of("norm_order", "test_the_norm_is_of_what_is_rotated"),
        ),
        (
            "xla backward: what was rotated first stays rotated",
            "dx = rotated_back(dx) if is_rotated_first else dx",
            "dx = dx",
            tests_of("norm_order", "test_gradients"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/forward.py",
        (
            "mosaic: rows that are rotated first are not rounded",
            "lanes = widen(narrow(lanes, dtype), dtype) if options.round_norm else lanes",
            "lanes = lanes",
            tests_of("norm_order", "test_a_row_that_is_rotated_first_is_rounded[mosaic_gpu]"),
        ),
        (
            "mosaic: rows that are rotated first are rotated again",
            "if is_rotated and not is_rotated_first:",
            "if is_rotated:",
            tests_of("norm_order", "test_the_norm_is_of_what_is_rotated"),
        ),
    ),
    *_in(
        "pallas_qk/_mosaic_gpu/backward.py",
        (
            "mosaic backward: rows that are rotated first by the opposite angle",
            "partner = [arith.negf(p) for p in widen(rotation.partner(xs_of[name]), dtype)]",
            "partner = widen(rotation.partner(xs_of[name]), dtype)",
            tests_of("norm_order", "test_gradients"),
        ),
        (
            "mosaic backward: wide partners with their own signs",
            "signs = select(self.is_first, [constant(0)], [constant(1 << 31)])[0] if wide else self.signs",
            "signs = constant(0) if wide else self.signs",
            tests_of("norm_order", "test_gradients"),
        ),
        (
            "mosaic backward: v's gradient as k's",
            "_at(targets[name], row, v).store",
            "_at(target, row, v).store",
            tests_of("norms", "test_gradients"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/forward.py",
        (
            "triton: rows that are rotated first are not rounded",
            "                if options.round_norm:\n                    x32 = [arithmetic.narrow",
            "                if False:\n                    x32 = [arithmetic.narrow",
            tests_of("norm_order", "test_a_row_that_is_rotated_first_is_rounded[triton]"),
        ),
    ),
    *_in(
        "pallas_qk/_triton/backward.py",
        (
            "triton backward: what was rotated first stays rotated",
            "                if is_rotated_first:\n                    dxs = layout.rotate(dxs, angles, arithmetic)",
            "                if False:\n                    dxs = layout.rotate(dxs, angles, arithmetic)",
            tests_of("norm_order", "test_gradients"),
        ),
        (
            "triton backward: v's gradient as k's",
            "target = targets[name]",
            "target = next(iter(targets.values()))",
            tests_of("norms", "test_gradients"),
        ),
    ),
]
