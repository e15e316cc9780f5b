"""Exchange of arrays with PyTorch without copies: parity tests compare bits this way, and mixed stacks share memory.

PyTorch is imported when a function is called, never by importing `pallas_qk`.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    import torch

# What both frameworks read from a DLPack capsule; JAX and torch spell the names alike.
_INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
#: The names of the dtypes that can be exchanged.
DTYPES = (*_INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64", "complex128")

# Where an array must start, in bytes: XLA's CPU client refuses other views, and Mosaic GPU other arguments of a kernel.
# GPU executables without such a kernel need multiples of 16.
_ALIGNMENT = {"cpu": 64, "cuda": 256}

# Order of work on a GPU (jax 0.10.2 to 0.12.0.1, torch 2.11 to 2.13), without blocking the host:
# - from_torch: JAX hands one of its streams to Tensor.__dlpack__. torch records an event on its current stream and has
#   that stream wait for it, and XLA orders every reader after that stream. torch looks at the current device's
#   current stream and refuses tensors of other devices, so the tensor's device is made current.
# - to_torch: torch hands the current stream of the array's device to Array.__dlpack__, and XLA has it wait until the
#   array is computed. Nothing is missing.
#
# Lifetime: a capsule keeps the memory while the other side refers to it, and its deleter gives the memory back the
# moment the last reference goes. On a GPU that can be too early: XLA keeps no argument beyond the launch of a kernel
# (its own allocator is ordered by the compute stream), so torch could hand the memory to its next tensor while the
# kernel is still queued; and XLA could do the same to a kernel of torch's. Tensor.record_stream can't express it, for
# JAX doesn't tell its compute stream. So the owner is held until the device has passed the work queued by then.


def from_torch(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """A JAX array in the memory of a torch tensor.

    Args:
      tensor: on a CPU, or on a GPU that JAX uses too; any shape, contiguous, with a dtype of `DTYPES`.
      copy: True makes a copy in JAX's own memory. It takes what the exchange has to refuse otherwise (strides,
        misaligned and pinned memory, requires_grad, pending conjugation or negation), may be donated, and waits until
        the copy is made.

    Returns:
      An array of the tensor's shape, dtype and device, whatever mesh, default device or trace the caller is in. It
      waits for what is queued on torch's current stream of that device. JAX takes arrays for immutable: as long as an
      uncopied one lives, the tensor must not be written, and the array must not be donated
      (`jax.jit(..., donate_argnums=...)`).

    The memory lives until both sides are done with it: the tensor may be dropped right away. On a GPU, dropping the
    array then waits for the device if nothing else of JAX's refers to the memory.

    Raises:
      ValueError: strides, alignment, pinned or sparse memory, requires_grad, or a pending conjugation or negation.
        With either `copy` a nested tensor, or one whose elements aren't all in memory of its own: a DTensor, another
        wrapper, a fake tensor, a tensor inside `torch.vmap` or `torch.func`, or one whose storage was freed.
      TypeError: not a tensor, a dtype outside `DTYPES`, or one that JAX would narrow while jax_enable_x64 is off.
      NotImplementedError: the tensor's device isn't one of JAX's.
      ModuleNotFoundError: torch is not installed. `to_torch` raises it too.
    """
    _check_torch_is_there("from_torch")
    import jax
    import torch

    if torch.compiler.is_dynamo_compiling():  # torch.compile can't trace JAX: its graph is broken here
        untraced: jax.Array = torch.compiler.disable(from_torch)(tensor, copy=copy)
        return untraced
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {_describe(tensor)}. Use jax.numpy.asarray for NumPy's.")
    _check_torch_layout(tensor)
    _check_torch_dtype(tensor)
    _check_torch_device(tensor)
    memory = _own_memory(tensor)
    with _current_device(memory.device):
        if copy:
            memory = memory.resolve_conj().resolve_neg().contiguous()
            if memory.is_pinned() or _misalignment(memory):
                memory = memory.clone()
        else:
            _check_torch_values(tensor)
        # A tensor of our own over the same memory. Nothing but JAX refers to it, so it dies with JAX's last reference.
        exported = memory.detach()
        array = jax.dlpack.from_dlpack(exported, copy=False)
    if _runs_behind_the_host(memory.device):
        _hold_until_passed(exported, owner=memory, device=memory.device)
    return _copy(array) if copy else array


def to_torch(array: jax.Array) -> torch.Tensor:
    """A torch tensor in the memory of a JAX array.

    Args:
      array: concrete, on one device of this process, a CPU or a GPU that torch uses too; a dtype of `DTYPES`.

    Returns:
      A tensor of the array's shape, dtype and device. torch's current stream of that device waits until the array is
      computed. JAX takes arrays for immutable, which torch doesn't know: the tensor must not be written. `clone()`
      makes one that may be.

    The memory lives until both sides are done with it: the array may be dropped right away. On a GPU, dropping the
    last tensor over the memory then waits for the device.

    Raises:
      ValueError: the array is deleted, lies on several devices, on another process or in a GPU's host memory.
      TypeError: not a JAX array, a traced one, or a dtype outside `DTYPES`.
      NotImplementedError: neither CPU nor GPU, or a GPU that torch doesn't use.
    """
    _check_torch_is_there("to_torch")
    import jax
    import torch

    if not isinstance(array, jax.Array):
        raise TypeError(f"array must be a jax.Array, got {_describe(array)}. Use torch.as_tensor for NumPy's.")
    if isinstance(array, jax.core.Tracer):
        traced = f"a traced {array.aval.str_short()}"
        raise TypeError(f"array must be concrete, got {traced}. Call to_torch outside jax.jit, jax.grad and jax.vmap.")
    if str(array.dtype) not in DTYPES:
        is_key = jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)
        remedy = "Pass jax.random.key_data(array)." if is_key else "Cast it with astype."
        raise TypeError(f"array must be one of {', '.join(DTYPES)}, got {array.dtype}. {remedy}")
    if array.is_deleted():
        raise ValueError("array must hold its memory, got one that was deleted or donated. Export it before that.")
    devices = array.sharding.device_set
    if len(devices) > 1 or not array.is_fully_addressable:
        where = f"{len(devices)} devices" if len(devices) > 1 else "another process's device"
        raise ValueError(
            f"array must lie on one device of this process, got {where}. "
            "Pass one of its shards, array.addressable_shards[i].data, or gather it with jax.device_put."
        )
    (device,) = devices
    _check_jax_device(array, device)
    tensor = torch.utils.dlpack.from_dlpack(array)
    if _runs_behind_the_host(tensor.device):
        # torch keeps one Python object a storage while views, detached tensors or graphs refer to it.
        _hold_until_passed(tensor.untyped_storage(), owner=array, device=tensor.device)
    return tensor


def _check_torch_is_there(function: str) -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch itself is there and broken
            raise
        raise ModuleNotFoundError(
            f"dlpack.{function} must find PyTorch, got a Python environment without it. "
            "Install torch, or the extra pallas-qk[torch].",
            name="torch",
        ) from None


def _check_torch_layout(tensor: torch.Tensor) -> None:
    import torch

    if tensor.is_nested:
        raise ValueError(
            "tensor must be dense, got a nested tensor. Pass torch.nested.to_padded_tensor(tensor, padding=0.0)."
        )
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"tensor must be dense, got layout {layout}. Pass tensor.to_dense().")


def _check_torch_dtype(tensor: torch.Tensor) -> None:
    import jax

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        remedy = "Pass tensor.dequantize()." if tensor.is_quantized else "Cast it with tensor.to()."
        raise TypeError(f"tensor must be one of {', '.join(DTYPES)}, got {dtype}. {remedy}")
    # jax.dlpack.from_dlpack narrows without a word, which is a copy, and cuts integers to their low 32 bits.
    narrowed = jax.dtypes.canonicalize_dtype(dtype)
    if str(narrowed) != dtype:
        raise TypeError(
            f"tensor must keep its dtype in JAX, got {dtype}, which is {narrowed} there while jax_enable_x64 is off. "
            f"Pass tensor.to(torch.{narrowed}), or call jax.config.update('jax_enable_x64', True) at the start."
        )


def _check_torch_device(tensor: torch.Tensor) -> None:
    import jax
    import torch

    if tensor.device.type not in _ALIGNMENT:
        remedy = "Load its values first: it has none to move." if tensor.is_meta else "Move it with tensor.cpu()."
        raise NotImplementedError(f"tensor must lie on a CPU or GPU, got {tensor.device}. {remedy}")
    backend = "rocm" if tensor.device.type == "cuda" and torch.version.hip else tensor.device.type
    try:
        shared = [device.local_hardware_id for device in jax.local_devices(backend=backend)]
    except RuntimeError:  # JAX has no such backend
        shared = []
    if (tensor.device.index or 0) not in shared:
        raise NotImplementedError(
            f"tensor must lie on a device that JAX uses, got {tensor.device} where JAX has {backend} devices {shared}. "
            "Move it with tensor.to(), or start JAX with that device."
        )


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the tensor without its history, whose storage holds every element."""
    # Wrappers, fake tensors and those of torch.func show a shape without the memory for it, and a storage can be freed
    # or cut under its views. torch has no public predicate for all of them. What each of them lacks is a storage with
    # an address and enough bytes. The view is asked for it, since a mode of the caller's may make a fake of the tensor.
    try:
        view = tensor.detach()
        storage = view.untyped_storage()
        is_fake = storage.device.type == "meta"  # its address can't be asked for without a warning
        held = storage.nbytes() if not is_fake and storage.data_ptr() else 0
        last = view.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True)
        )
        needed = (last + 1) * view.element_size() if view.numel() else 0
        if held >= needed:
            return view
        shown, cause = f"{held} of {needed} bytes", None
    except Exception as error:  # there is no storage, or the class or a mode refuses to show it, each in its own way
        shown, cause = "none", error
    remedy = "Pass a plain tensor whose storage is allocated, outside torch.vmap, torch.func and FakeTensorMode."
    if hasattr(tensor, "full_tensor"):
        remedy = "Pass tensor.full_tensor()."
    raise ValueError(
        f"tensor must hold its elements in memory of its own, got {_describe(tensor)} that shows {shown}. {remedy}"
    ) from cause


def _check_torch_values(tensor: torch.Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            "tensor must not require grad, got requires_grad=True: no gradient crosses to JAX. "
            "Pass tensor.detach(), or copy=True."
        )
    if tensor.is_conj():
        raise ValueError(
            "tensor must hold its own values, got a pending conjugation. Pass tensor.resolve_conj(), or copy=True."
        )
    if tensor.is_neg():
        raise ValueError(
            "tensor must hold its own values, got a pending negation. Pass tensor.resolve_neg(), or copy=True."
        )
    if not tensor.is_contiguous():  # strides of axes of size 1 don't count
        shape, strides = tuple(tensor.shape), tensor.stride()
        raise ValueError(
            f"tensor must be contiguous in row-major order, got shape {shape} with strides {strides}. "
            "Pass tensor.contiguous(), or copy=True."
        )
    if tensor.is_pinned():
        raise ValueError(
            "tensor must lie in ordinary memory, got pinned host memory. Pass tensor.clone(), or copy=True."
        )
    if _misalignment(tensor):
        raise ValueError(
            f"tensor must start at a multiple of {_ALIGNMENT[tensor.device.type]} bytes, "
            f"got an address {_misalignment(tensor)} past one. Pass tensor.clone(), or copy=True."
        )


def _check_jax_device(array: jax.Array, device: jax.Device) -> None:
    import torch

    if device.platform not in ("cpu", "gpu"):
        raise NotImplementedError(
            f"array must lie on a CPU or GPU, got {device.platform}. "
            "Move it with jax.device_put(array, jax.devices('cpu')[0])."
        )
    if device.platform == "gpu":
        if array.sharding.memory_kind not in (None, "device"):
            kind = array.sharding.memory_kind
            raise ValueError(
                f"array must lie in the GPU's own memory, got memory kind {kind}. "
                "Move it with jax.device_put(array, jax.memory.Space.Device)."
            )
        if not device.local_hardware_id < torch.cuda.device_count():
            raise NotImplementedError(
                f"array must lie on a device that torch uses, got GPU {device.local_hardware_id} where torch has "
                f"{torch.cuda.device_count()} GPUs. "
                "Move it with jax.device_put(array, jax.devices('cpu')[0]), or install torch for this GPU."
            )


def _copy(array: jax.Array) -> jax.Array:
    """A copy on the array's device, made when this returns."""
    import jax

    # A compiled copy would run on the devices of the caller's mesh, and a traced one would run later. device_put is
    # neither. A guard against transfers is about those between devices, which this is not.
    with jax.core.eval_context(), jax.transfer_guard_device_to_device("allow"):
        copied: jax.Array = jax.block_until_ready(jax.device_put(array, array.device, may_alias=False))
        return copied


def _misalignment(tensor: torch.Tensor) -> int:
    """Bytes past the last address where XLA lets an array start; torch puts a tensor without elements at 0."""
    return tensor.data_ptr() % _ALIGNMENT[tensor.device.type]


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _runs_behind_the_host(device: torch.device) -> bool:
    # On a CPU, XLA keeps what its queued work reads, and torch queues nothing.
    return device.type == "cuda"


def _hold_until_passed(watched: object, *, owner: object, device: torch.device) -> None:
    """Keeps the memory of `owner` until `watched` is gone and `device` has passed the work queued by then."""
    weakref.finalize(watched, _wait, owner, device).atexit = False


def _wait(owner: object, device: torch.device) -> None:
    # weakref.finalize holds `owner` until this returns. The thread may be one of XLA's: nothing of JAX's is called.
    import torch

    if not sys.is_finalizing():
        torch.cuda.synchronize(device)


def _describe(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace(" builtins.", " ")
