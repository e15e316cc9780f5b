"""The gated attention layer compiled for a GPU: one kernel of ours each way between projections and attention."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import pallas_qk
from examples import gated_attention
from tests import gpu_program

# A program as XLA compiles the example's layer, forward alone and shortened.
GOOD = """\
HloModule jit_forward, is_scheduled=true, entry_computation_layout={(bf16[8,64]{1,0})->bf16[8,64]{1,0}}

%gemm_fusion_dot_computation (parameter_0: bf16[8,64], parameter_1: bf16[64,48]) -> bf16[8,48] {
  %parameter_0 = bf16[8,64]{1,0} parameter(0)
  %parameter_1 = bf16[64,48]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,48]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_multiply (param_0: bf16[1,8,2,8], param_1: bf16[8,48]) -> bf16[8,16] {
  %param_0 = bf16[1,8,2,8]{3,2,1,0} parameter(0)
  %bitcast.1 = bf16[8,16]{1,0} bitcast(%param_0)
  %param_1 = bf16[8,48]{1,0} parameter(1)
  %slice.1 = bf16[8,32]{1,0} slice(%param_1), slice={[0:8], [0:32]}
  %bitcast.2 = bf16[8,2,16]{2,1,0} bitcast(%slice.1)
  %slice.2 = bf16[8,2,8]{2,1,0} slice(%bitcast.2), slice={[0:8], [0:2], [8:16]}
  %bitcast.3 = bf16[8,16]{1,0} bitcast(%slice.2)
  %logistic.1 = bf16[8,16]{1,0} logistic(%bitcast.3)
  ROOT %multiply.1 = bf16[8,16]{1,0} multiply(%bitcast.1, %logistic.1)
}

%fused_slice (param_0.1: bf16[8,48]) -> bf16[8,48] {
  %param_0.1 = bf16[8,48]{1,0} parameter(0)
  %slice.3 = bf16[8,48]{1,0} slice(%param_0.1), slice={[0:8], [0:48]}
  ROOT %convert.1 = bf16[8,48]{1,0} convert(%slice.3)
}

%fused_add (param_0.2: bf16[8,48]) -> bf16[8,48] {
  %param_0.2 = bf16[8,48]{1,0} parameter(0)
  %constant.1 = bf16[] constant(0)
  %pad.1 = bf16[8,48]{1,0} pad(%param_0.2, %constant.1), padding=0_0x0_0
  ROOT %add.1 = bf16[8,48]{1,0} add(%pad.1, %pad.1)
}

ENTRY %main (qkv: bf16[64,48], q_norm: bf16[8], out: bf16[16,64], hidden: bf16[8,64], table: bf16[9,8]) -> bf16[8,64] {
  %qkv = bf16[64,48]{1,0} parameter(0), metadata={op_name="parameters.qkv"}
  %q_norm = bf16[8]{0} parameter(1)
  %out = bf16[16,64]{1,0} parameter(2)
  %hidden = bf16[8,64]{1,0} parameter(3)
  %table = bf16[9,8]{1,0} parameter(4)
  %copied_table = bf16[9,8]{1,0} copy(%table)
  %product = bf16[8,48]{1,0} fusion(%hidden, %qkv), kind=kCustom, calls=%gemm_fusion_dot_computation
  %bitcast.4 = bf16[8,6,8]{2,1,0} bitcast(%product)
  %ours = (bf16[8,2,8]{2,1,0}, bf16[8,1,8]{2,1,0}, bf16[8,1,8]{2,1,0}) custom-call(%bitcast.4, %q_norm, %q_norm, \
%copied_table, /*index=4*/%copied_table), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={ir = "ML\\EFR{(\\00", name = "pallas_qk_triton_forward", num_warps = 2 : i32}
  %v = bf16[8,1,8]{2,1,0} get-tuple-element(%ours), index=2
  %k = bf16[8,1,8]{2,1,0} get-tuple-element(%ours), index=1
  %q = bf16[8,2,8]{2,1,0} get-tuple-element(%ours), index=0
  %bitcast.5 = bf16[1,8,2,8]{3,2,1,0} bitcast(%q)
  %attended = (bf16[1,8,2,8]{3,2,1,0}, u8[0]{0}) custom-call(%bitcast.5, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax"
  %gte.1 = bf16[1,8,2,8]{3,2,1,0} get-tuple-element(%attended), index=0
  %gated = bf16[8,16]{1,0} fusion(%gte.1, %product), kind=kLoop, calls=%fused_multiply
  %cublas-gemm.1 = (bf16[8,64]{1,0}, s8[4194304]{0}) custom-call(%gated, %out), custom_call_target="__cublas$gemm"
  ROOT %gte.2 = bf16[8,64]{1,0} get-tuple-element(%cublas-gemm.1), index=0
}
"""
CUDNN = "__cudnn.fmha"

_Q = "%bitcast.5 = bf16[1,8,2,8]{3,2,1,0} bitcast(%q)"
_PRODUCT = "%bitcast.4 = bf16[8,6,8]{2,1,0} bitcast(%product)"
BAD = {
    "copy.1: copy outside a fusion": (
        _Q,
        "%copy.1 = bf16[8,2,8]{1,2,0} copy(%q)\n  %bitcast.5 = bf16[1,8,2,8]{3,2,1,0} bitcast(%copy.1)",
    ),
    "slice.9: slice outside a fusion": (
        _PRODUCT,
        "%slice.9 = bf16[8,48]{1,0} slice(%product)\n  %bitcast.4 = bf16[8,6,8]{2,1,0} bitcast(%slice.9)",
    ),
    "taken: a fusion that computes nothing, of convert, slice": (
        _PRODUCT,
        "%taken = bf16[8,48]{1,0} fusion(%product), kind=kLoop, calls=%fused_slice\n"
        "  %bitcast.4 = bf16[8,6,8]{2,1,0} bitcast(%taken)",
    ),
    "padded: a fusion with pad": (
        _PRODUCT,
        "%padded = bf16[8,48]{1,0} fusion(%product), kind=kLoop, calls=%fused_add\n"
        "  %bitcast.4 = bf16[8,6,8]{2,1,0} bitcast(%padded)",
    ),
    "gated: a fusion with transpose": (
        "ROOT %multiply.1 = bf16[8,16]{1,0} multiply(%bitcast.1, %logistic.1)",
        "%multiply.1 = bf16[8,16]{1,0} multiply(%bitcast.1, %logistic.1)\n"
        "  ROOT %transpose.1 = bf16[16,8]{1,0} transpose(%multiply.1), dimensions={1,0}",
    ),
}


def test_a_program_without_a_copy():
    """Copies of the table, before everything, are none between projections and attention."""
    program = gpu_program.parse(GOOD)
    assert gpu_program.faults(program, CUDNN) == []
    assert gpu_program.kernels(program, CUDNN) == ["pallas_qk_triton_forward", "attention"]
    assert gpu_program.sources(program, "pallas_qk_triton_forward", CUDNN)[:2] == ["product", "parameter"]
    assert gpu_program.sources(program, "attention", CUDNN) == ["pallas_qk_triton_forward"] * 3


@pytest.mark.parametrize("fault", BAD)
def test_a_program_with_a_copy(fault):
    here, instead = BAD[fault]
    assert GOOD.count(here) == 1
    assert gpu_program.faults(gpu_program.parse(GOOD.replace(here, instead)), CUDNN) == [fault]


def test_a_copy_inside_a_called_computation():
    """Some versions of XLA move what a CUDA graph holds into a computation of its own."""
    called = """\
%graph (p: bf16[8,2,8]) -> bf16[1,8,2,8] {
  %p = bf16[8,2,8]{2,1,0} parameter(0)
  %copy.2 = bf16[8,2,8]{2,1,0} copy(%p)
  ROOT %bitcast.9 = bf16[1,8,2,8]{3,2,1,0} bitcast(%copy.2)
}

ENTRY"""
    call = "%bitcast.5 = bf16[1,8,2,8]{3,2,1,0} call(%q), to_apply=%graph"
    text = GOOD.replace("ENTRY", called).replace(_Q, call)
    assert gpu_program.faults(gpu_program.parse(text), CUDNN) == ["bitcast.5/copy.2: copy outside a fusion"]
    clean = text.replace("copy(%p)", "bitcast(%p)")
    assert gpu_program.faults(gpu_program.parse(clean), CUDNN) == []
    assert gpu_program.sources(gpu_program.parse(clean), "attention", CUDNN) == ["pallas_qk_triton_forward"] * 3


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="must be an HLO module with an ENTRY, got 'nothing'"):
        gpu_program.parse("nothing")


# On a GPU


def _opaque_kernel(name: str, results, *args: jax.Array):
    """A custom call that XLA must hand its operands in the layout that they have in JAX; it computes nothing useful."""

    def kernel(*refs):
        first = (0, 0, 0, 0)
        total = sum(ref[first].astype(jnp.float32) for ref in refs[: len(args)])
        for ref in refs[len(args) :]:
            ref[first] = total.astype(ref.dtype)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
    return pl.pallas_call(
        kernel, grid=(1,), out_shape=shapes, compiler_params=plt.CompilerParams(num_warps=1), name=name
    )(*args)


@jax.custom_vjp
def opaque_attention(q, k, v):
    """Of query (B, S, N, H), key and value as attention's kernels take them."""
    return _opaque_kernel("attention_stand_in", [q], q, k, v)[0]


def _opaque_attention_forward(q, k, v):
    return opaque_attention(q, k, v), (q, k, v)


def _opaque_attention_backward(residuals, cotangent):
    return tuple(_opaque_kernel("attention_stand_in_backward", residuals, *residuals, cotangent))


opaque_attention.defvjp(_opaque_attention_forward, _opaque_attention_backward)


def cudnn_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


ATTENTION = {"cudnn": (cudnn_attention, CUDNN), "opaque": (opaque_attention, "attention_stand_in")}
BATCH, LENGTH, HIDDEN_SIZE, CONFIG = 2, 256, 512, gated_attention.Config(8, 2, 256, 64, (11, 11, 10), 1e-6)


def packed_layer(attention):
    """The example's, with its parameters."""
    columns = 2 * (CONFIG.num_q_heads + CONFIG.num_kv_heads) * CONFIG.head_dim
    rows = CONFIG.num_q_heads * CONFIG.head_dim
    shapes = [(HIDDEN_SIZE, columns), (CONFIG.head_dim,), (CONFIG.head_dim,), (rows, HIDDEN_SIZE)]
    parameters = gated_attention.Parameters(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))

    def attend(q, k, v, lengths):
        assert lengths is None
        return attention(q, k, v)

    return functools.partial(gated_attention.forward, config=CONFIG, attention=attend), parameters


def layer_of_three_projections(attention, *, barriers: bool = False):
    """As MaxText writes it: heads are axes of the weights and of the activations.

    With `barriers` the products have three different inputs, as docs/porting.md advises.
    """
    q_heads, kv_heads, head_dim = CONFIG.num_q_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    shapes = {
        "q_gate": (HIDDEN_SIZE, q_heads, 2 * head_dim),
        "k": (HIDDEN_SIZE, kv_heads, head_dim),
        "v": (HIDDEN_SIZE, kv_heads, head_dim),
        "out": (q_heads, head_dim, HIDDEN_SIZE),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }

    def layer(parameters, hidden, positions, cos_sin_cache):
        once = jax.lax.optimization_barrier(hidden) if barriers else hidden
        twice = jax.lax.optimization_barrier(once) if barriers else hidden
        inputs = {"q_gate": hidden, "k": once, "v": twice}
        q_gate, k, v = (jnp.einsum("bse,ehd->bshd", x, parameters[name]) for name, x in inputs.items())
        q, k, gate = pallas_qk.fused_qk_rmsnorm_rope_gate(
            q_gate,
            k,
            parameters["q_norm"],
            parameters["k_norm"],
            cos_sin_cache,
            positions,
            CONFIG.eps,
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=CONFIG.rotary_dim,
            mrope_section=CONFIG.mrope_section if positions.ndim == 3 else None,
            norm_beta=1.0,
            copy_gate=False,
        )
        return jnp.einsum("bshd,hde->bse", attention(q, k, v) * jax.nn.sigmoid(gate), parameters["out"])

    return layer, {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}


def compiled(layer, parameters, *, backward: bool, mrope: bool, merge_products: bool = True) -> gpu_program.Program:
    hidden = jax.ShapeDtypeStruct((BATCH, LENGTH, HIDDEN_SIZE), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((3,) * mrope + (BATCH, LENGTH), jnp.int32)
    cos_sin_cache = jax.ShapeDtypeStruct((1024, CONFIG.rotary_dim), jnp.bfloat16)

    def gradients(parameters, hidden, positions, cos_sin_cache, cotangent):
        def of_both(parameters, hidden):
            return layer(parameters, hidden, positions, cos_sin_cache)

        output, transpose = jax.vjp(of_both, parameters, hidden)
        return output, transpose(cotangent)

    arguments = [parameters, hidden, positions, cos_sin_cache]
    function, arguments = (gradients, [*arguments, hidden]) if backward else (layer, arguments)
    options = {} if merge_products else {"xla_gpu_dot_merger_threshold_mb": 0}
    return gpu_program.parse(jax.jit(function, compiler_options=options).lower(*arguments).compile().as_text())


def check_layer(
    program: gpu_program.Program, attention: str, *, packed: bool, backward: bool, gate_backward: bool = False
):
    """With `gate_backward` the gate's cotangent has a kernel of its own."""
    assert gpu_program.faults(program, attention) == []
    names = gpu_program.kernels(program, attention)
    ours = [name for name in names if name != "attention" and not name.endswith("_sum")]
    assert sorted((name.rsplit("_", 1)[1] for name in ours), reverse=True) == [
        "forward",
        *["backward"] * (backward + gate_backward),
    ]
    assert names.count("attention") == 1 + backward
    forward = next(name for name in ours if name.endswith("_forward"))
    assert gpu_program.sources(program, forward, attention)[: 1 if packed else 2] == ["product"] * (1 if packed else 2)


@pytest.fixture(params=["mosaic_gpu", "triton"])
def by_name(request, gpu, monkeypatch):
    """Each GPU kernel in the place of the automatic choice."""
    sizes = (BATCH * LENGTH, CONFIG.num_q_heads, CONFIG.num_kv_heads, CONFIG.head_dim, CONFIG.rotary_dim)
    reason = pallas_qk.default_implementation(*sizes, jnp.bfloat16).not_taken.get(request.param, "comes first")
    if not reason.endswith("comes first"):
        pytest.skip(reason)
    for name in ("fused_qkv_rmsnorm_rope_gate", "fused_qk_rmsnorm_rope_gate"):
        monkeypatch.setattr(pallas_qk, name, functools.partial(getattr(pallas_qk, name), implementation=request.param))
    return request.param


@pytest.fixture(params=ATTENTION)
def attention(request, gpu):
    """Attention, and the pattern of its calls."""
    if request.param == "cudnn" and float(jax.devices()[0].compute_capability) < 9:
        pytest.skip("cuDNN's attention takes head_dim 256 from compute capability 9.0 on")
    return ATTENTION[request.param]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """JAX's own attention needs the standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("mrope, backward", [(False, False), (True, True)])
def test_the_examples_layer(by_name, attention, mrope, backward):
    function, pattern = attention
    gate_backward = backward and by_name == "mosaic_gpu"
    if gate_backward and jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 loses the name of a kernel that updates an array in place")
    program = compiled(*packed_layer(function), backward=backward, mrope=mrope)
    check_layer(program, pattern, packed=True, backward=backward, gate_backward=gate_backward)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_of_three_projections(by_name, attention, backward):
    """Without a copy where XLA is told not to merge products.

    It merges them otherwise, and the check sees the slices: once it doesn't, docs/porting.md has advice to drop.
    """
    function, pattern = attention
    layer, parameters = layer_of_three_projections(function)
    program = compiled(layer, parameters, backward=backward, mrope=False, merge_products=False)
    check_layer(program, pattern, packed=False, backward=backward)
    merged = compiled(layer, parameters, backward=backward, mrope=False)
    assert any("computes nothing, of slice" in fault for fault in gpu_program.faults(merged, pattern))


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_barriers_keep_three_projections_apart(by_name, attention, backward):
    """Without a copy, and without a flag of XLA."""
    function, pattern = attention
    layer, parameters = layer_of_three_projections(function, barriers=True)
    program = compiled(layer, parameters, backward=backward, mrope=False)
    check_layer(program, pattern, packed=False, backward=backward)
