"""A CUDA device that is not there: devices, dtypes, shapes and storages are real, data are not.

torch's `FakeTensorMode` makes "cuda" tensors on a build for the CPU. `FakeDevice` goes around it and notes

    memory   the bytes of the device's storages that are alive, and the most there were
    placed   every result by the place in the code that made it: device and dtype
    waits    where the host waits for the device: a value that is read, a copy that is not asynchronous

What depends on data gets its answer from a *shadow*: small tensors that are computed from known values alone,
such as token ids and masks, are computed on the CPU besides. A value that nobody knows is taken to be True:
it is that of a check for NaN.

Not counted: the memory that libraries take for themselves (cuBLAS, cuDNN), and what the allocator loses.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import qwenedit
from qwenedit.memory.reading import SafetensorsFile
from qwenedit.taps import Fingerprint
from qwenedit.weights.formats import Stored
from tests.fake_device.streams import Streams

ATEN = torch.ops.aten
LIST, TENSOR = torch.Tensor.tolist, torch.tensor
CUDA = torch.device("cuda:0")
PACKAGE = str(Path(qwenedit.__file__).parent)
SMALL = 1 << 16  # values of a tensor that has a shadow, at most


class FakeDevice(TorchDispatchMode):
    """Watches the operations of a `with` block; `fake_device` makes one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.streams = Streams(kind)
        self.now = self.peak = 0
        self.placed: Counter[tuple[str, str, torch.dtype]] = Counter()
        self.waits: list[str] = []
        self._alive: dict[int, int] = {}

    def fresh(self) -> None:
        """Forget what was noted, and measure the peak from now on."""
        self.peak = self.now
        self.placed.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is ATEN._local_scalar_dense.default:
            return self._value(args[0])
        if func is ATEN.nonzero.default:
            return self._nonzero(args[0])
        self._note_copy(func, args, kwargs)
        _require_one_device(func, given)
        out = func(*args, **kwargs)
        if func is ATEN.convolution.default and channels_last(args[0]):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # as cuDNN, which this build lacks
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made:
            place = where()
            self.streams.used(f"{place}: {func}", given, made)
            for x in made:
                self.placed[place, x.device.type, x.dtype] += 1
                self.see(x)
            self._shade(func, args, kwargs, given, made)
        if kwargs.get("pin_memory"):
            out.pinned = True
        return out

    # --- memory ---

    def see(self, x: Tensor) -> None:
        """Count the tensor's memory, which may have been there before."""
        if x.device.type != self.kind:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now + self.streams.returning())
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)
        self.streams.released(key)

    # --- waiting ---

    def _note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """A copy between devices waits, unless it is asynchronous and its host memory is pinned."""
        if func is ATEN._to_copy.default:
            source, target = args[0], kwargs.get("device") or args[0].device
            asynchronous = kwargs.get("non_blocking", False)
        elif func is ATEN.copy_.default:
            source, target = args[1], args[0].device
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return
        if source.device.type != torch.device(target).type:
            if not (asynchronous and getattr(source, "pinned", False)):
                self.wait(f"copy to {torch.device(target).type}")

    def wait(self, why: str) -> None:
        self.waits.append(f"{where()}: {why}")
        self.streams.wait_for_current()

    def _value(self, x: Tensor) -> Any:
        if x.device.type == self.kind:
            self.wait("value")
        known = shadow(x)
        if known is not None:
            with unset_fake_temporarily():
                return known.item()
        if x.dtype == torch.bool:
            return True
        raise RuntimeError(f"{where()}: reads a value that is not known, of {tuple(x.shape)} {x.dtype}")

    def _nonzero(self, x: Tensor) -> Tensor:
        if x.device.type == self.kind:
            self.wait("nonzero")
        known = shadow(x)
        if known is None:
            raise RuntimeError(f"{where()}: the size of a result depends on values that are not known")
        with unset_fake_temporarily():
            found = known.nonzero()
        made = torch.empty(found.shape, dtype=found.dtype, device=x.device)
        made.shadow = found  # type: ignore[attr-defined]
        self.see(made)
        return made

    # --- shadows ---

    def _shade(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Compute a small result of known values on the CPU as well."""
        known = all(shadow(x) is not None for x in given)
        small = all(x.numel() <= SMALL for x in made)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random or not (known and small):
            for x in made:
                if without_data(x) and getattr(x, "shadow", None) is not None and not known:
                    x.shadow = None  # type: ignore[attr-defined]  # written to in place
            return
        kwargs = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "non_blocking")}

        def on_cpu(x: Any) -> Any:
            return shadow(x) if isinstance(x, Tensor) else x

        with unset_fake_temporarily(), torch.no_grad():
            values = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        for x, value in zip(made, [y for y in tree_leaves(values) if isinstance(y, Tensor)], strict=True):
            if without_data(x):
                x.shadow = value  # type: ignore[attr-defined]


def shadow(x: Tensor) -> Tensor | None:
    """The tensor on the CPU, if its values are known."""
    return getattr(x, "shadow", None) if without_data(x) else x


def without_data(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.is_meta


def where() -> str:
    """The innermost function of the package that is running: "networks/mmdit_layers.py rotate"."""
    frame = sys._getframe(1)
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(PACKAGE):
            return f"{path[len(PACKAGE) + 1 :]} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


# --- what a build for the CPU cannot do for a CUDA tensor ---


def item(x: Tensor, index: Any) -> Tensor:
    """x[index], spelled in operations that need no device guard."""
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(torch.tensor(i, device=x.device) if isinstance(i, list) else i for i in index)
    taken = sum(i.dim() if of_bools(i) else 1 for i in index if i is not None and i is not Ellipsis)
    whole = [slice(None)] * (x.dim() - taken)
    dim, tensors = 0, {}
    for i in [one for given in index for one in (whole if given is Ellipsis else [given])]:
        if i is None:
            x, dim = ATEN.unsqueeze.default(x, dim), dim + 1
        elif isinstance(i, slice):
            x, dim = ATEN.slice.Tensor(x, dim, i.start, i.stop, i.step or 1), dim + 1
        elif isinstance(i, int):
            x = ATEN.select.int(x, dim, i)
        else:
            for places in i.nonzero().unbind(1) if of_bools(i) else [i.to(x.device)]:
                tensors[dim], dim = places, dim + 1
    return ATEN.index.Tensor(x, [tensors.get(d) for d in range(max(tensors) + 1)]) if tensors else x


def _require_one_device(func: Any, given: Sequence[Tensor]) -> None:
    """Tensors of two devices meet in copies alone; numbers of the host may go anywhere."""
    copies = (ATEN._to_copy.default, ATEN.copy_.default)
    kinds = {x.device.type for x in given if x.dim() or x.device.type != "cpu"}
    if len(kinds) > 1 and func not in copies:
        raise RuntimeError(f"{where()}: {func} has tensors on {' and '.join(sorted(kinds))}")


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def of_bools(i: Any) -> bool:
    return isinstance(i, Tensor) and i.dtype == torch.bool


def set_item(x: Tensor, index: Any, value: Any) -> None:
    target = item(x, index)  # a view: the package writes to slices alone
    if isinstance(value, Tensor):
        target.copy_(value)
    else:
        target.fill_(value)


class Indexing(TorchFunctionMode):
    """Sends indexing to `item` and `set_item`.

    Patched methods would stay visible: Python gives a class whose `__getitem__` was once set the slots of a
    sequence for good, and torch.tensor then fails for a list of tensors.
    """

    SPELLED: ClassVar = {torch.Tensor.__getitem__: item, torch.Tensor.__setitem__: set_item}

    def __torch_function__(
        self, function: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.SPELLED.get(function, function)(*args, **(kwargs or {}))


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    device = CUDA if device is not None and device.type == "cuda" else device or x.device
    dtype = dtype or x.dtype
    if (device, dtype) == (x.device, x.dtype) and not copy:
        return x
    return ATEN._to_copy.default(x, device=device, dtype=dtype, non_blocking=non_blocking)


PLAIN = {name: name for name in ("contiguous", "copy_", "nonzero")} | {"__invert__": "bitwise_not"}


def method(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: operation(x, *args, **kwargs)


def number(kind: type) -> Callable[[Tensor], Any]:
    return lambda x: kind(x.item())


def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """torch makes none on the host for the meta device, and loses the values."""
    made = TENSOR(data, dtype=dtype, device="cpu")
    return made if device is None else made.to(device)


def to_list(x: Tensor) -> Any:
    """One wait for the whole list, as on the device."""
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        if isinstance(mode, FakeDevice) and x.device.type == mode.kind:
            mode.wait("value")
    if (known := shadow(x)) is None:
        raise RuntimeError(f"{where()}: reads values that are not known, of {tuple(x.shape)} {x.dtype}")
    with unset_fake_temporarily(), _disable_current_modes():
        return LIST(known)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's choice on a GPU of today: the flash kernel, or for masks and wide heads the efficient one."""
    assert dropout_p == 0.0 and scale is None and not enable_gqa
    if attn_mask is None and query.dtype.itemsize == 2 and query.shape[-1] <= 256:
        return ATEN._scaled_dot_product_flash_attention.default(query, key, value, 0.0, is_causal)[0]
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = ATEN._scaled_dot_product_efficient_attention.default
    return efficient(query, key, value, bias, False, 0.0, is_causal)[0]


def fingerprint(modules: Sequence[nn.Module], tensors: Sequence[Tensor | None] = ()) -> Any:
    """`taps.fingerprint`, which takes fake tensors for somebody's own class; theirs have no addresses."""
    parts = [part for module in modules for part in module.modules()]
    held = [x for part in parts for x in (*part._parameters.values(), *part._buffers.values())]
    return Fingerprint(tuple((id(x), x._version) for x in (*held, *tensors) if x is not None), held)


class Inline:
    """In place of a pool of threads, which the modes of torch do not reach: work is done when submitted."""

    def __init__(self, *_options: Any) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_error: object) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


def unread(weight: Stored | SafetensorsFile, source: Any, part: tuple[slice, ...] | None = None) -> Tensor:
    """A tensor of a file, or a part of one, of which the header alone is real."""
    stored = weight if isinstance(weight, Stored) else weight._stored[source]
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="cpu")
    return whole if part is None else whole[part]


@contextmanager
def fake_device(kind: str = "cuda") -> Iterator[FakeDevice]:
    """In the `with` block "cuda" is a device. Files of weights are not read.

    A build for the CPU keeps no graph of CUDA tensors, for gradients. "meta" stands for the device then.
    """
    device = FakeDevice(kind)
    streams = device.streams
    patches = {
        "torch.Tensor.to": to,
        **{f"torch.Tensor.{name}": method(getattr(ATEN, op).default) for name, op in PLAIN.items()},
        **{f"torch.Tensor.__{kind.__name__}__": number(kind) for kind in (bool, int, float)},
        "torch.Tensor.record_stream": lambda x, stream: streams.record(x, stream),
        "torch._subclasses.fake_tensor.FakeTensor.tolist": to_list,
        "torch.Tensor.tolist": to_list,
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.cuda.Stream": streams.new,
        "torch.cuda.stream": streams.on,
        "torch.cuda.current_stream": lambda *_device: streams.current,
        "qwenedit.memory.streaming._side": functools.cache(streams.new),
        "qwenedit.memory.streaming.ThreadPoolExecutor": Inline,
        "qwenedit.memory.reading.SafetensorsFile.get_tensor": unread,
        "qwenedit.weights.formats.Stored.read": unread,
        "qwenedit.networks.mmdit.fingerprint": fingerprint,
        "qwenedit.sampling.precomputed.fingerprint": fingerprint,
    }
    with ExitStack() as stack:
        if kind == "cuda":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        else:
            patches["torch.tensor"] = tensor
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(Indexing())
        yield stack.enter_context(device)
