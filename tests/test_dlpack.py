"""Exchange with torch: the same memory both ways, every refusal named, nothing freed or read too early."""

import dataclasses
import gc
import re
import subprocess
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples import gated_attention
from pallas_qk import dlpack
from pallas_qk.dlpack import from_torch, to_torch
from tests.devices import mesh

pytest.importorskip("torch")

import torch

SHAPES = [(), (5,), (2, 3, 4), (0, 3), (1, 8), (1, 8, 4), (8, 1), (1, 1)]


def random_bits(dtype, shape):
    """A tensor of any bits, NaN payloads among them."""
    size = int(np.prod(shape))
    generator = torch.Generator().manual_seed(0)
    if dtype == "bool":
        return torch.randint(0, 2, shape, dtype=torch.bool, generator=generator)
    itemsize = getattr(torch, dtype).itemsize
    return (
        torch.randint(0, 256, (size * itemsize,), dtype=torch.uint8, generator=generator)
        .view(getattr(torch, dtype))
        .view(shape)
    )


def bits_of_tensor(tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bits_of_array(array):
    return np.asarray(array).tobytes()


def shares_memory(array, tensor):
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


@pytest.fixture
def device():
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


@pytest.mark.parametrize("dtype", dlpack.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_bits_and_memory(dtype, shape, device):
    with jax.enable_x64(True):
        tensor = random_bits(dtype, shape).to(device)
        array = from_torch(tensor)
        assert array.shape == shape and str(array.dtype) == dtype and bits_of_array(array) == bits_of_tensor(tensor)
        back = to_torch(array)
        assert (
            tuple(back.shape) == shape and back.dtype == tensor.dtype and bits_of_tensor(back) == bits_of_tensor(tensor)
        )
        assert not tensor.numel() or (shares_memory(array, tensor) and shares_memory(array, back))
        assert back.is_contiguous() and back.device.type == device


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "bool"])
def test_an_array_that_jax_made_shares_its_memory(dtype):
    array = jnp.arange(24).reshape(4, 6).astype(dtype)
    tensor = to_torch(array)
    assert shares_memory(array, tensor) and bits_of_array(array) == bits_of_tensor(tensor)


@pytest.mark.parametrize("tokens", [1, 3])
def test_strides_of_axes_of_size_one_mean_nothing(tokens, device):
    """One row of a wide tensor: torch reports the wide stride."""
    wide = torch.arange(4 * 64, dtype=torch.float32, device=device).view(4, 64)
    rows = wide[:tokens] if tokens > 1 else wide[:1, :32]
    assert tokens > 1 or rows.stride(0) == 64
    array = from_torch(rows)
    assert shares_memory(array, rows) and bits_of_array(array) == bits_of_tensor(rows)


def test_jax_computes_on_torch_memory_and_torch_on_jax_memory(device):
    tensor = torch.arange(12, dtype=torch.float32, device=device).view(3, 4)
    assert jnp.array_equal(
        jax.jit(lambda x: x.T @ x)(from_torch(tensor)), jnp.asarray((tensor.T @ tensor).cpu().numpy())
    )
    array = jnp.arange(12.0).reshape(3, 4)
    assert torch.equal(to_torch(array) + 1, to_torch(array + 1))


# --- What has to be refused ---


def misaligned(num_bytes=1):
    base = torch.zeros(256, dtype=torch.uint8)
    start = -base.data_ptr() % 64 + num_bytes
    return base[start : start + 64]


def complex_view():
    return torch.view_as_complex(torch.arange(16, dtype=torch.float32).view(8, 2))


DTYPE_NAMES = ", ".join(dlpack.DTYPES)
NARROWED = (
    "tensor must keep its dtype in JAX, got {}, which is {} there while jax_enable_x64 is off. "
    "Pass tensor.to(torch.{}), or call jax.config.update('jax_enable_x64', True) at the start."
)
STRIDES = (
    "tensor must be contiguous in row-major order, got shape {} with strides {}. "
    "Pass tensor.contiguous(), or copy=True."
)

# What copy=True takes.
COPIED = {
    "strides": (lambda: torch.arange(24.0).view(4, 6)[:, ::2], STRIDES.format("(4, 3)", "(6, 2)")),
    "transposed": (lambda: torch.arange(24.0).view(4, 6).T, STRIDES.format("(6, 4)", "(1, 6)")),
    "broadcast": (lambda: torch.arange(6.0).expand(4, 6), STRIDES.format("(4, 6)", "(0, 1)")),
    "requires_grad": (
        lambda: torch.nn.Parameter(torch.arange(4.0)),
        "tensor must not require grad, got requires_grad=True: no gradient crosses to JAX. "
        "Pass tensor.detach(), or copy=True.",
    ),
    "conjugation": (
        lambda: complex_view().conj(),
        "tensor must hold its own values, got a pending conjugation. Pass tensor.resolve_conj(), or copy=True.",
    ),
    "negation": (
        lambda: torch._neg_view(torch.arange(4.0)),
        "tensor must hold its own values, got a pending negation. Pass tensor.resolve_neg(), or copy=True.",
    ),
    "alignment": (
        misaligned,
        "tensor must start at a multiple of 64 bytes, got an address 1 past one. Pass tensor.clone(), or copy=True.",
    ),
}
NO_MEMORY = "tensor must hold its elements in memory of its own, got a {} that shows {}. {}"
PLAIN = "Pass a plain tensor whose storage is allocated, outside torch.vmap, torch.func and FakeTensorMode."
NESTED = "tensor must be dense, got a nested tensor. Pass torch.nested.to_padded_tensor(tensor, padding=0.0)."


class Plain(torch.Tensor):
    """A subclass with memory of its own."""


class Wrapper(torch.Tensor):
    """A subclass that shows another tensor's shape, as quantization libraries have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [x.inner if isinstance(x, cls) else x for x in args]
        return cls(function(*args, **(kwargs or {})))


def cut(num_bytes, view=lambda x: x):
    tensor = torch.full((1024,), 3.0)
    shown = view(tensor)
    tensor.untyped_storage().resize_(num_bytes)
    return shown


def distributed(tensor=None):
    """A DTensor, as FSDP2 keeps parameters, on a mesh of this process alone."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    tensor = torch.full((64,), 3.0) if tensor is None else tensor
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


@pytest.fixture(scope="module", autouse=True)
def _end_the_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.ones(64, 3))


def fake_of_unknown_length():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mask = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(64, dtype=torch.bool))
    return torch.masked_select(mask, mask)


def functional():
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(torch.ones(4))


def waited_for():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(torch.ones(4))


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


def quantized():
    return torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)


# Tensors without the memory that they show, with the name of their type and what they show of it.
MEMORYLESS = {
    "freed storage": (lambda: cut(0), "torch.Tensor", "0 of 4096 bytes"),
    "cut storage": (lambda: cut(64), "torch.Tensor", "64 of 4096 bytes"),
    "view past a cut storage": (
        lambda: cut(4095, lambda x: x[512:].view(4, 128).T),
        "torch.Tensor",
        "4095 of 4096 bytes",
    ),
    "wrapper": (lambda: Wrapper(torch.ones(4)), f"{__name__}.Wrapper", "none"),
    "parameter of a wrapper": (lambda: torch.nn.Parameter(Wrapper(torch.ones(4))), f"{__name__}.Wrapper", "none"),
    "masked": (
        lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
        "torch.masked.maskedtensor.core.MaskedTensor",
        "none",
    ),
    "collective": (waited_for, "torch.distributed._functional_collectives.AsyncCollectiveTensor", "none"),
    "fake": (fake, "torch._subclasses.fake_tensor.FakeTensor", "0 of 768 bytes"),
    "fake of unknown length": (fake_of_unknown_length, "torch._subclasses.fake_tensor.FakeTensor", "none"),
    "functional": (functional, "torch._subclasses.functional_tensor.FunctionalTensor", "none"),
    "zeros": (lambda: torch._efficientzerotensor((4,)), "torch.Tensor", "none"),
    "lazy parameter": (lambda: torch.nn.LazyLinear(3).weight, "torch.nn.parameter.UninitializedParameter", "none"),
}
# What it doesn't.
REFUSED = {
    "list": (TypeError, lambda: [1.0], "tensor must be a torch.Tensor, got a list. Use jax.numpy.asarray for NumPy's."),
    "numpy": (
        TypeError,
        lambda: np.zeros(3),
        "tensor must be a torch.Tensor, got a numpy.ndarray. Use jax.numpy.asarray for NumPy's.",
    ),
    "sparse": (
        ValueError,
        lambda: torch.zeros(4, 4).to_sparse(),
        "tensor must be dense, got layout sparse_coo. Pass tensor.to_dense().",
    ),
    "meta": (
        NotImplementedError,
        lambda: torch.zeros(4, device="meta"),
        "tensor must lie on a CPU or GPU, got meta. Load its values first: it has none to move.",
    ),
    **{
        name: (ValueError, make, NO_MEMORY.format(kind, shown, PLAIN))
        for name, (make, kind, shown) in MEMORYLESS.items()
    },
    "distributed": (
        ValueError,
        distributed,
        NO_MEMORY.format("torch.distributed.tensor.DTensor", "none", "Pass tensor.full_tensor()."),
    ),
    "nested, strided": (ValueError, lambda: nested(torch.strided), NESTED),
    "nested, jagged": (ValueError, lambda: nested(torch.jagged), NESTED),
    "quantized": (TypeError, quantized, f"tensor must be one of {DTYPE_NAMES}, got qint8. Pass tensor.dequantize()."),
    "float8": (
        TypeError,
        lambda: torch.zeros(4, dtype=torch.int16).view(torch.float8_e4m3fn),
        f"tensor must be one of {DTYPE_NAMES}, got float8_e4m3fn. Cast it with tensor.to().",
    ),
    **{
        wide: (
            TypeError,
            lambda wide=wide: torch.zeros(4, dtype=getattr(torch, wide)),
            NARROWED.format(wide, narrow, narrow),
        )
        for wide, narrow in [
            ("int64", "int32"),
            ("uint64", "uint32"),
            ("float64", "float32"),
            ("complex128", "complex64"),
        ]
    },
}


@pytest.mark.parametrize("name", COPIED)
def test_from_torch_refuses_what_would_be_a_copy(name):
    make, message = COPIED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_torch(make())


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of prototypes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_torch_refuses_what_no_copy_would_help(name, copy):
    exception, make, message = REFUSED[name]
    tensor = make()
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        from_torch(tensor, copy=copy)


@pytest.mark.parametrize(
    "make, plain",
    [
        (distributed, lambda x: x.full_tensor()),
        (quantized, lambda x: x.dequantize()),
        (lambda: nested(torch.strided), lambda x: torch.nested.to_padded_tensor(x, padding=0.0)),
        (lambda: nested(torch.jagged), lambda x: torch.nested.to_padded_tensor(x, padding=0.0)),
    ],
    ids=["distributed", "quantized", "nested, strided", "nested, jagged"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of prototypes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_torch_takes_what_it_proposes(make, plain):
    tensor = plain(make())
    np.testing.assert_array_equal(np.asarray(from_torch(tensor)), tensor.numpy(), strict=True)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "transform",
    [torch.vmap, torch.func.grad, torch.func.functionalize, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))],
    ids=["vmap", "grad", "functionalize", "jvp"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, when it imports what jvp takes
def test_from_torch_refuses_traced_tensors(transform, copy):
    def f(x):
        from_torch(x, copy=copy)
        return x.sum()

    with pytest.raises(ValueError, match=f"^{re.escape(NO_MEMORY.format('torch.Tensor', 'none', PLAIN))}$"):
        transform(f)(torch.ones(3, 4))


@pytest.fixture
def every_warning_of_torch():
    """Torch gives most of its warnings once in a process, to the test that comes first."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("is_lenient, shown", [(False, "none"), (True, "0 of 64 bytes")])
def test_from_torch_refuses_real_tensors_in_fake_tensor_mode(is_lenient, shown, copy, every_warning_of_torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensor = torch.arange(16.0)
    with (
        FakeTensorMode(allow_non_fake_inputs=is_lenient),
        pytest.raises(ValueError, match=f"^{re.escape(NO_MEMORY.format('torch.Tensor', shown, PLAIN))}$"),
    ):
        from_torch(tensor, copy=copy)


@pytest.mark.parametrize("copy", [False, True])
def test_from_torch_refuses_what_a_closure_of_grad_would_wrap(copy):
    tensor = torch.arange(16.0)

    def f(x):
        from_torch(tensor, copy=copy)
        return x.sum()

    with pytest.raises(ValueError, match=f"^{re.escape(NO_MEMORY.format('torch.Tensor', 'none', PLAIN))}$"):
        torch.func.grad(f)(torch.ones(3))


@pytest.mark.parametrize("copy", [False, True])
def test_a_compiled_function_of_torch_breaks_its_graph(copy):
    def f(x):
        return from_torch(2 * x, copy=copy), x + 1

    array, tensor = torch.compile(f, backend="eager")(torch.ones(4))
    assert array.tolist() == [2, 2, 2, 2] and tensor.tolist() == [2, 2, 2, 2]


def test_a_state_dict_of_distributed_tensors_is_refused():
    config = gated_attention.Config(1, 1, 8, 4, (1, 1, 0), 1e-6)
    state_dict = {"q_proj.weight": distributed(torch.ones(16, 8))}
    message = NO_MEMORY.format("torch.distributed.tensor.DTensor", "none", "Pass tensor.full_tensor().")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gated_attention.from_state_dict(state_dict, config)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: x.as_subclass(Plain),
        lambda x: torch._lazy_clone(x),
        lambda x: x.share_memory_(),
    ],
    ids=["parameter", "subclass", "copy on write", "shared memory"],
)
def test_from_torch_takes_whatever_holds_its_memory(make, copy):
    tensor = make(torch.arange(16.0))
    array = from_torch(tensor, copy=copy)
    np.testing.assert_array_equal(np.asarray(array), np.arange(16, dtype=np.float32), strict=True)
    assert shares_memory(array, tensor) != copy


def test_from_torch_refuses_a_device_that_jax_has_not(monkeypatch):
    def no_backend(**kwargs):
        raise RuntimeError("Unknown backend")

    monkeypatch.setattr(jax, "local_devices", no_backend)
    message = (
        "tensor must lie on a device that JAX uses, got cpu where JAX has cpu devices []. "
        "Move it with tensor.to(), or start JAX with that device."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        from_torch(torch.zeros(4))


def test_from_torch_refuses_pinned_memory(monkeypatch):
    pinned = torch.zeros(4)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor is pinned)
    message = "tensor must lie in ordinary memory, got pinned host memory. Pass tensor.clone(), or copy=True."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_torch(pinned)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() == pinned.data_ptr())
    assert from_torch(pinned, copy=True).shape == (4,)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(0, 6)[:, ::2],
        lambda: torch.zeros(8, dtype=torch.uint8)[3:3],
        lambda: torch.zeros(3, 0),
        lambda: cut(0, lambda x: x[512:512]),
    ],
    ids=["strides", "address", "no storage", "freed storage"],
)
def test_a_tensor_without_elements_has_neither_strides_nor_an_address(make, copy):
    assert from_torch(make(), copy=copy).size == 0


def deleted():
    array = jnp.zeros(4)
    array.delete()
    return array


@pytest.mark.parametrize(
    "exception, make, message",
    [
        (TypeError, lambda: 1.0, "array must be a jax.Array, got a float. Use torch.as_tensor for NumPy's."),
        (
            TypeError,
            lambda: jnp.zeros(4, jnp.int4),
            f"array must be one of {DTYPE_NAMES}, got int4. Cast it with astype.",
        ),
        (
            TypeError,
            lambda: jax.random.key(0),
            f"array must be one of {DTYPE_NAMES}, got key<fry>. Pass jax.random.key_data(array).",
        ),
        (
            ValueError,
            deleted,
            "array must hold its memory, got one that was deleted or donated. Export it before that.",
        ),
    ],
    ids=["float", "int4", "key", "deleted"],
)
def test_to_torch_refuses(exception, make, message):
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        to_torch(make())


@pytest.mark.parametrize("transform, shape", [(jax.jit, "4"), (jax.vmap, "")])
def test_to_torch_refuses_traced_arrays(transform, shape):
    message = (
        f"array must be concrete, got a traced float32[{shape}]. Call to_torch outside jax.jit, jax.grad and jax.vmap."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):  # JAX adds a note of its own
        transform(to_torch)(jnp.zeros(4))


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    local_hardware_id: int = 0


class Elsewhere(jax.Array):
    """As much of an array as the checks read, on a device that isn't here."""

    dtype = np.dtype("float32")
    sharding = is_fully_addressable = None

    def __init__(self, device, *, memory_kind="device", addressable=True):
        self.sharding = types.SimpleNamespace(device_set={device}, memory_kind=memory_kind)
        self.is_fully_addressable = addressable

    def is_deleted(self):
        return False


@pytest.mark.parametrize(
    "exception, array, message",
    [
        (
            ValueError,
            Elsewhere(Device("cpu"), addressable=False),
            "array must lie on one device of this process, got another process's device. "
            "Pass one of its shards, array.addressable_shards[i].data, or gather it with jax.device_put.",
        ),
        (
            NotImplementedError,
            Elsewhere(Device("tpu")),
            "array must lie on a CPU or GPU, got tpu. Move it with jax.device_put(array, jax.devices('cpu')[0]).",
        ),
        (
            ValueError,
            Elsewhere(Device("gpu"), memory_kind="pinned_host"),
            "array must lie in the GPU's own memory, got memory kind pinned_host. "
            "Move it with jax.device_put(array, jax.memory.Space.Device).",
        ),
        (
            NotImplementedError,
            Elsewhere(Device("gpu", 99)),
            f"array must lie on a device that torch uses, got GPU 99 where torch has {torch.cuda.device_count()} GPUs. "
            "Move it with jax.device_put(array, jax.devices('cpu')[0]), or install torch for this GPU.",
        ),
    ],
    ids=["process", "tpu", "memory kind", "gpu"],
)
def test_to_torch_refuses_where_an_array_lies(exception, array, message):
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        to_torch(array)


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from pallas_qk.dlpack import to_torch
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("x",))
array = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
assert to_torch(array.addressable_shards[1].data).tolist() == [4, 5, 6, 7]
assert to_torch(jax.device_put(array, jax.devices()[1])).tolist() == list(range(8))
try:
    to_torch(array)
except ValueError as error:
    print(error)
"""


def test_to_torch_refuses_sharded_arrays_and_takes_what_it_proposes():
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == (
        "array must lie on one device of this process, got 2 devices. "
        "Pass one of its shards, array.addressable_shards[i].data, or gather it with jax.device_put.\n"
    )


# --- Copies that are asked for ---


@pytest.mark.parametrize("name", COPIED)
def test_copy_takes_what_the_exchange_refuses(name):
    tensor = COPIED[name][0]()
    array = from_torch(tensor, copy=True)
    want = tensor.detach().resolve_conj().resolve_neg().numpy()
    np.testing.assert_array_equal(np.asarray(array), want, strict=True)


@pytest.mark.parametrize("dtype", dlpack.DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (), (0, 3)], ids=str)
def test_a_copy_keeps_bits(dtype, shape, device):
    with jax.enable_x64(True):
        tensor = random_bits(dtype, shape).to(device)
        array = from_torch(tensor, copy=True)
        assert array.shape == shape and str(array.dtype) == dtype and bits_of_array(array) == bits_of_tensor(tensor)


def test_a_copy_is_jaxs_own(device):
    tensor = torch.arange(64.0, device=device)
    array = from_torch(tensor, copy=True)
    assert not shares_memory(array, tensor)
    tensor.zero_()
    assert jax.jit(lambda x: x + 1, donate_argnums=0)(array).sum() == 64 * 63 / 2 + 64
    assert tensor.sum() == 0


@pytest.mark.parametrize("copy", [False, True])
def test_the_exchange_happens_at_once_while_a_function_is_traced(copy):
    tensor, seen = torch.ones(8), []

    def f(x):
        seen.append(from_torch(tensor, copy=copy))
        return x + seen[0]

    assert jax.jit(f)(1.0).sum() == 16
    assert not isinstance(seen[0], jax.core.Tracer)


# --- Wherever it is called ---


def call_in(transform):
    """Runs a function while a function of JAX's runs or is traced."""

    def within(function):
        results = []

        def f(x):
            results.append(function())
            return x

        transform(f)
        return results[0]

    return within


def call_under(context):
    def within(function):
        with context():
            return function()

    return within


def shard_map(axis_type, wrap):
    def transform(f):
        on, spec = mesh(axis_type, data=8), PartitionSpec("data")
        x = jax.device_put(np.ones(8, np.float32), NamedSharding(on, spec))
        wrap(jax.shard_map(f, mesh=on, in_specs=spec, out_specs=spec))(x)

    return transform


def jit_under_a_mesh(f):
    with jax.set_mesh(mesh(AxisType.Explicit, data=8)):
        jax.jit(f)(np.ones(8, np.float32))


SURROUNDINGS = {
    "default device": call_under(lambda: jax.default_device(jax.devices("cpu")[3])),
    "transfer guard": call_under(lambda: jax.transfer_guard("disallow_explicit")),
    "with mesh": call_under(lambda: mesh(data=8)),
    "jit": call_in(lambda f: jax.jit(f)(1.0)),
    "grad": call_in(lambda f: jax.grad(f)(1.0)),
    "vmap": call_in(lambda f: jax.vmap(f)(np.ones(3))),
    "jit, set_mesh": call_in(jit_under_a_mesh),
    **{
        f"{name}, {axis_type.name}": within
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for name, within in {
            "set_mesh": call_under(lambda t=axis_type: jax.set_mesh(mesh(t, data=8))),
            "abstract": call_under(lambda t=axis_type: jax.sharding.use_abstract_mesh(mesh(t, data=8).abstract_mesh)),
            "shard_map": call_in(shard_map(axis_type, lambda f: f)),
            "jit of shard_map": call_in(shard_map(axis_type, jax.jit)),
        }.items()
    },
}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")
def test_from_torch_keeps_to_the_tensors_device(name, copy, device):
    tensor = torch.arange(64.0, device=device)
    outside = from_torch(tensor, copy=copy)
    array = SURROUNDINGS[name](lambda: from_torch(tensor, copy=copy))
    assert not isinstance(array, jax.core.Tracer)
    assert array.sharding == outside.sharding and jax.typeof(array) == jax.typeof(outside)
    assert shares_memory(array, tensor) != copy
    if copy:  # that was made by then, and may be donated
        tensor.zero_()
        assert jax.jit(lambda x: x + 1, donate_argnums=0)(array).sum() == 64 * 63 / 2 + 64
        assert array.is_deleted() and tensor.sum() == 0


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")
def test_to_torch_keeps_to_the_arrays_device(name, device):
    array = jnp.arange(64.0)
    tensor = SURROUNDINGS[name](lambda: to_torch(array))
    assert tensor.device.type == device and shares_memory(array, tensor) and tensor.sum() == 64 * 63 / 2


# --- Lifetime ---


def allocate_garbage(device):
    """Fills memory that was freed, if it was."""
    tensors = [torch.full((1024,), 7.0, device=device) for _ in range(64)]
    arrays = [jnp.full((1024,), 7.0) for _ in range(64)]
    return tensors, jax.block_until_ready(arrays)


def test_the_tensor_may_be_dropped(device):
    tensor = torch.arange(1024.0, device=device)
    storage = weakref.ref(tensor.untyped_storage())
    array = from_torch(tensor)
    del tensor
    gc.collect()
    garbage = allocate_garbage(device)
    np.testing.assert_array_equal(np.asarray(array), np.arange(1024.0))
    assert storage() is not None
    del array, garbage
    gc.collect()
    assert storage() is None  # and the memory goes back


def test_the_array_may_be_dropped(device):
    array = jnp.arange(1021.0)
    tensor = to_torch(array)
    del array
    view = tensor.detach()[1:]
    del tensor
    gc.collect()
    garbage = allocate_garbage(device)
    assert view.cpu().tolist() == list(range(1, 1021))
    assert any(x.shape == (1021,) for x in jax.live_arrays())
    del view, garbage
    gc.collect()
    to_torch(jnp.zeros(1))  # an export makes JAX collect what came back
    assert not any(x.shape == (1021,) for x in jax.live_arrays())


def test_an_exported_array_may_be_deleted(device):
    array = jnp.arange(1024.0)
    tensor = to_torch(array)
    array.delete()
    garbage = allocate_garbage(device)
    assert tensor.cpu().tolist() == list(range(1024))
    del garbage


@pytest.fixture
def waits(monkeypatch):
    """Treats the CPU as a device that runs behind the host, and lists the devices waited for."""
    devices = []
    monkeypatch.setattr(dlpack, "_runs_behind_the_host", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", devices.append)
    return devices


def test_torch_memory_goes_back_after_the_device_has_passed(waits):
    tensor = torch.ones(64)
    storage = weakref.ref(tensor.untyped_storage())
    alive = []
    array = from_torch(tensor)
    alias = array.addressable_data(0)  # another array over the same memory
    del tensor, array
    gc.collect()
    assert not waits and storage() is not None
    weakref.finalize(storage(), lambda: alive.append(len(waits)))
    del alias
    gc.collect()
    assert waits == [torch.device("cpu")]
    assert alive == [1]  # freed, and after the wait


def test_jax_memory_goes_back_after_the_device_has_passed(waits):
    array = jnp.ones(64, device=jax.devices("cpu")[0])
    tensor = to_torch(array)
    held = weakref.ref(array)
    del array
    view = tensor.detach()[3:]  # another tensor over the same memory
    del tensor
    gc.collect()
    assert not waits and held() is not None
    del view
    gc.collect()
    assert waits == [torch.device("cpu")] and held() is None


def test_a_tensor_that_outlives_the_array_goes_back_at_once_to_nobody(waits):
    tensor = torch.ones(64)
    array = from_torch(tensor)
    del array
    gc.collect()
    assert len(waits) == 1 and tensor.sum() == 64


def test_torch_is_imported_by_the_functions_alone():
    code = "import sys, pallas_qk.dlpack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    code = "import sys, pallas_qk.dlpack, torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 1


# --- On a GPU ---

SIZE = 1 << 22


@jax.jit
def _slow(x):
    """Some tens of milliseconds of work whose result is x."""
    y = jax.lax.fori_loop(0, 200, lambda _, y: (y @ y) * 1e-6, jnp.ones((2048, 2048)))
    return x + 0 * y[0, 0]


@jax.jit
def _double(x):
    return 2 * x


def keep_torch_busy():
    torch.cuda._sleep(100_000_000)  # cycles: some 50 ms


@pytest.mark.gpu
def test_jax_waits_for_torchs_current_stream(gpu):
    _double(from_torch(torch.zeros(SIZE, device="cuda"))).block_until_ready()
    tensor = torch.zeros(SIZE, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        keep_torch_busy()
        tensor.fill_(3.0)
        got = _double(from_torch(tensor))
    assert (got == 6.0).all()


@pytest.mark.gpu
def test_torchs_current_stream_waits_for_jax(gpu):
    x = jnp.full(SIZE, 3.0)
    jax.block_until_ready(_double(_slow(x)))
    stream = torch.cuda.Stream()
    slow = _double(_slow(x))
    with torch.cuda.stream(stream):
        got = to_torch(slow).clone()
    stream.synchronize()
    assert (got == 6.0).all()


@pytest.mark.gpu
def test_torch_does_not_reuse_memory_that_queued_kernels_of_jax_read(gpu):
    scalar = jnp.float32(1.0)
    warm = _slow(scalar) * _double(from_torch(torch.ones(SIZE, device="cuda")))
    warm.block_until_ready()
    tensor = torch.ones(SIZE, device="cuda")
    array = from_torch(tensor)
    busy = _slow(scalar)  # the compute stream is behind by this
    got = _double(array)
    del tensor, array
    garbage = [torch.full((SIZE,), 7.0, device="cuda") for _ in range(4)]
    assert (got == 2.0).all() and busy == 1.0
    del garbage


@pytest.mark.gpu
def test_jax_does_not_reuse_memory_that_queued_kernels_of_torch_read(gpu):
    array = jax.block_until_ready(jnp.full(SIZE, 3.0))
    jax.block_until_ready(jnp.full(SIZE, 7.0))
    tensor = to_torch(array)
    keep_torch_busy()
    got = 2 * tensor
    del tensor, array
    garbage = [jnp.full(SIZE, 7.0) for _ in range(4)]
    jax.block_until_ready(garbage)
    assert (got == 6.0).all()


@pytest.mark.gpu
def test_pinned_and_misaligned_memory_of_a_gpu(gpu):
    pinned = torch.arange(64.0).pin_memory()
    with pytest.raises(ValueError, match=r"got pinned host memory"):
        from_torch(pinned)
    array = from_torch(pinned, copy=True)
    assert array.sum() == 64 * 63 / 2 and array.devices().pop().platform == "cpu"
    for first in (1, 4, 32):
        shifted = torch.arange(128.0, device="cuda")[first:]
        message = f"must start at a multiple of 256 bytes, got an address {4 * first} past one"
        with pytest.raises(ValueError, match=message):
            from_torch(shifted)
        assert from_torch(shifted, copy=True).sum() == shifted.sum().item()
    assert shares_memory(from_torch(shifted[32:]), shifted[32:])


@pytest.mark.gpu
def test_a_cpu_tensor_stays_on_the_cpu(gpu):
    tensor = torch.arange(64.0)
    array = from_torch(tensor)
    assert array.devices().pop().platform == "cpu" and shares_memory(array, tensor)
    assert to_torch(array).device.type == "cpu"
