"""Runs the loss on tensors without memory and writes down what it asks of a GPU, on a machine that has none.

What: `Recorder` is a context in which `device_empty` makes tensors that say they lie on CUDA and hold nothing. Every
  operator of torch and every launch of a Triton kernel on them becomes a `Step`: shapes, bytes, operations, and whether
  the host waits. Nothing is computed; shapes, strides, branches and flags are those of the real code.
Assumptions: where the host asks for data, the recorder answers. All rows are live. A mask of the vocabulary's length
  has `live_columns` entries, and a whole number that the host reads is that count; a truth value is True. Of a tile
  that a kernel may skip, TILES_READ are read.
Bytes: an operator reads its inputs and writes its outputs once; gathers and scatters move what they pick. A Triton
  kernel reads each of its tensors once and writes those that KERNELS names, except for what KERNELS says is partly
  read.
Limits: contiguous operators only as torch's meta functions know them; one device; not thread-safe.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sgpo_kernels import custom_op, head
from sgpo_kernels.inputs import ClipRange, DistillInputs, KlLimit, LossOptions, PolicyInputs
from sgpo_kernels.sizes import Impl

CUDA = torch.device("cuda", 0)
# What one scattered element costs of the memory.
SECTOR = 32
# Share of the tiles that a kernel with SKIP has to read on a confident model (assumed).
TILES_READ = 0.2
# Of the calls with live columns.
TOLERANCE = 2.0**-12
GATHERS = {"index", "index_select", "gather"}
SCATTERS = {"index_add_": 2, "index_copy_": 1, "index_fill_": 1, "index_put_": 1, "_index_put_impl_": 1}
FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
OVERWRITES = {"fill_", "zero_", "copy_"}
EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "empty_permuted", "new_empty_strided"}


class Kernel(NamedTuple):
    """What a Triton kernel is for, the pointers that it writes, of pointers that it does not read or write in full the
    bytes that move, and the operations of its product; from its arguments and `live`, the number of live columns."""

    stage: str
    writes: tuple[str, ...]
    partly: dict[str, Callable[[dict[str, Any]], float]] = {}  # noqa: RUF012
    flops: Callable[[dict[str, Any]], int] = lambda given: 0


def _tiles(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda given: _bytes(given[name]) * (TILES_READ if given["SKIP"] else 1.0)


def _labels(given: dict[str, Any]) -> float:
    return SECTOR * given["C"]


def _columns(given: dict[str, Any]) -> float:
    return SECTOR * given["C"] * given["live"]


def _live(name: str) -> Callable[[dict[str, Any]], float]:
    """What belongs to the live columns of [C, V], [V] or [V, H]."""
    return lambda given: _bytes(given[name]) * given["live"] / given["V"]


def _held(given: dict[str, Any]) -> float:
    """The rows of dW that hold something: those of every chunk where columns live, at most (assumed: five times those
    of one), all where none is left out."""
    return _bytes(given["grad_ptr"]) * (min(1.0, 5 * given["live"] / given["V"]) if given["partly"] else 1.0)


def _live_product(given: dict[str, Any]) -> int:
    return 2 * given["C"] * given["live"] * given["H"]


KERNELS = {
    "scan_tiles": Kernel("scan", ("tiles_ptr",)),
    "combine_tiles": Kernel("row values", ("stats_ptr",), {"products_ptr": _labels}),
    "label_row_values": Kernel("row values", ("values_ptr", "table_ptr")),
    "pair_row_values": Kernel("row values", ("values_ptr", "table_ptr")),
    "divergence_row_values": Kernel("row values", ("values_ptr", "table_ptr")),
    "divergence_tiles": Kernel("divergence", ("sums_ptr",)),
    "peak_tiles": Kernel("peaks", ("peaks_ptr",), {name: _tiles(name) for name in ("products_ptr", "teacher_ptr")}),
    "column_threshold": Kernel("peaks", ("threshold_ptr",)),
    "live_columns": Kernel("peaks", ("alive_ptr", "dropped_ptr", "counts_ptr")),
    "place_columns": Kernel("peaks", ("live_ptr", "count_ptr")),
    "gradient_tiles": Kernel("gradient", ("out_ptr",)),
    "gradient_column_tiles": Kernel(
        "columns",
        ("out_ptr", "sums_ptr"),
        {"products_ptr": _columns, "teacher_ptr": _columns, "live_ptr": _live("live_ptr"), "out_ptr": _live("out_ptr")},
    ),
    "finish_columns": Kernel("columns", ("values_ptr",)),
    "live_hidden": Kernel(
        "dH", ("out_ptr",), {name: _live(name) for name in ("dz_ptr", "live_ptr", "head_ptr")}, _live_product
    ),
    "live_head": Kernel(
        "dW", ("sums_ptr",), {name: _live(name) for name in ("dz_ptr", "live_ptr", "sums_ptr")}, _live_product
    ),
    "label_guess": Kernel("row values", ("guess_ptr",), {"head_ptr": lambda given: 2 * given["C"] * given["H"]}),
    "sweep": Kernel(
        "products",
        ("tiles_ptr", "taken_ptr", "peaks_ptr"),
        flops=lambda given: 2 * given["C"] * given["V"] * given["H"],
    ),
    "sweep_reach": Kernel("peaks", ("reach_ptr", "forced_ptr")),
    "gathered_gradient": Kernel(
        "columns",
        ("out_ptr", "sums_ptr"),
        {name: _live(name) for name in ("live_ptr", "out_ptr", "head_ptr")},
        _live_product,
    ),
    "rescale_rows": Kernel("dW zeroed, rounded, scaled", ("out_ptr",), {"grad_ptr": _held}),
    "rescale": Kernel("dW zeroed, rounded, scaled", ("out_ptr",)),
}


class Launch(NamedTuple):
    """A launch of a Triton kernel: its arguments by name, and what else it was given (num_warps, ...)."""

    kernel: Any
    grid: tuple[int, ...]
    given: dict[str, Any]
    options: dict[str, Any]


class Step(NamedTuple):
    """What the device does at once: an operator of torch or a Triton kernel. `shapes`: of the tensors it was given;
    bytes; `flops` of products; `sync`: the host waits for the result."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    read: int
    written: int
    flops: int = 0
    sync: bool = False
    launch: Launch | None = None


class OnDevice(Tensor):
    """A tensor without memory that says it lies on CUDA."""

    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


def device_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape that holds nothing."""
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnDevice)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    return value.as_subclass(OnDevice) if type(value) is Tensor and value.is_meta else value


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Without those that only play an absent one: the same memory again."""
    found: dict[tuple[int, ...], Tensor] = {}
    for t in tensors:
        found.setdefault((t.untyped_storage()._cdata, int(t.storage_offset()), t.numel()), t)
    return list(found.values())


def _distinct_items(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    kept = {id(tensor) for tensor in _distinct(list(tensors.values()))}
    return [(name, tensor) for name, tensor in tensors.items() if id(tensor) in kept]


def _flops(name: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of a product; the last two tensors are its factors."""
    if name not in ("mm", "bmm", "addmm", "addmm_"):
        return 0
    left, right = shapes[-2:]
    return 2 * math.prod(left) * right[-1]


def _implementation(name: str) -> Callable[..., Any]:
    """The function behind one of our operators: to a mode an operator is one call."""
    return OPDEFS[f"sgpo_kernels::{name}"]._init_fn


class _Devices(TorchFunctionMode):
    """What is asked of CUDA is asked of the meta device, and comes back as OnDevice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(value: Any) -> Any:
            return torch.device("meta") if isinstance(value, torch.device) and value.type == "cuda" else value

        return tree_map(_on_device, func(*tree_map(moved, args), **tree_map(moved, kwargs or {})))


class Recorder(TorchDispatchMode):
    """See the module. `steps` are in the order of the host; `capability` is the compute capability it plays."""

    def __init__(
        self,
        vocab: int,
        live_columns: int,
        capability: tuple[int, int] = (9, 0),
        processors: int = 132,
        captured: bool = False,
    ):
        super().__init__()
        self.vocab, self.live_columns, self.captured = vocab, live_columns, captured
        self.capability, self.processors = capability, processors
        self.steps: list[Step] = []

    def __enter__(self) -> Recorder:
        recorder = self
        properties = SimpleNamespace(
            multi_processor_count=self.processors, major=self.capability[0], minor=self.capability[1]
        )

        def launched(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            recorder._launch(kernel, args, grid, kwargs)

        with contextlib.ExitStack() as stack:
            for kind in (JITFunction, InterpretedFunction):
                stack.enter_context(mock.patch.object(kind, "run", launched))
            stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=self.capability))
            stack.enter_context(mock.patch("torch.cuda.get_device_properties", return_value=properties))
            stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=self.captured))
            stack.enter_context(
                mock.patch("sgpo_kernels.chunk_loop.read_later", return_value=lambda: self.live_columns)
            )
            # It remembers the answer for a device; that of this one is the recorder's.
            stack.callback(head.adds_in_place.cache_clear)
            head.adds_in_place.cache_clear()
            stack.enter_context(_Devices())
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sgpo_kernels":
            args, kwargs = tree_map(_on_device, (args, kwargs or {}))
            with _Devices(), contextlib.ExitStack() as stack:
                TorchDispatchMode.__enter__(self)
                stack.push(super().__exit__)
                result = _implementation(func._schema.name.split("::")[1])(*args, **kwargs)
            return tree_map(_plain, result)
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        wanted = kwargs.get("device")
        if not any(value.is_meta for value in given) and (wanted is None or wanted.type != "meta"):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        fetched = (name in ("_to_copy", "to") and wanted is not None and wanted.type == "cpu") or (
            name == "copy_" and not args[0].is_meta
        )
        sync = fetched or name in ("nonzero", "_local_scalar_dense")
        result = self._answer(name, func, args, kwargs, sync)
        if not self._launches_nothing(name, func, result):
            self.steps.append(self._operator(name, func, args, kwargs, result, sync))
        return result

    def _answer(self, name: str, func: Any, args: Any, kwargs: Any, sync: bool) -> Any:
        """The result of an operator: torch's meta function, or what is assumed where that would need data."""
        if sync:
            source = args[1] if name == "copy_" else args[0]
            if name == "nonzero":
                count = self.live_columns if source.numel() == self.vocab else source.numel()
                return source.new_empty(count, source.dim(), dtype=torch.int64)
            value = True if source.dtype == torch.bool else 1.0 if source.is_floating_point() else self.live_columns
            if name == "_local_scalar_dense":
                return value
            if name == "copy_":
                return args[0].fill_(value)
            return torch.full(source.shape, value, dtype=kwargs.get("dtype") or source.dtype, device="cpu")
        if name == "addmm" and "out" in kwargs:
            return kwargs["out"]  # torch has no meta function for a wide output
        return func(*args, **kwargs)

    def _launches_nothing(self, name: str, func: Any, result: Any) -> bool:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        numbers = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        nothing = bool(numbers) and not any(value.numel() for value in numbers)
        return view or name in EMPTY or nothing or name in ("detach", "alias", "lift_fresh")

    def _operator(self, name: str, func: Any, args: Any, kwargs: Any, result: Any, sync: bool) -> Step:
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written_names = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        tensors = {key: [t for t in tree_leaves(value) if isinstance(t, Tensor)] for key, value in named.items()}
        inputs = [t for key, found in tensors.items() for t in found if key != "out"]
        shapes = tuple(tuple(t.shape) for t in inputs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        read, written = sum(map(_bytes, _distinct(inputs))), sum(map(_bytes, outputs))
        if name in GATHERS:
            read = written
        elif name in FILLS:
            read = 0
        elif name in SCATTERS:
            moved = sum(_bytes(t) for key, found in tensors.items() for t in found if key in ("source", "values"))
            read, written = moved * SCATTERS[name], moved
        elif name in OVERWRITES:
            read -= sum(_bytes(t) for key in written_names for t in tensors[key])
        return Step(name, shapes, read, written, _flops(name, shapes), sync)

    def _launch(self, kernel: Any, args: Any, grid: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
        blocks: Any = grid(given) if callable(grid) else grid
        name = kernel.fn.__name__
        known = KERNELS.get(name, Kernel("not described", ()))
        tensors = {key: getattr(value, "base", value) for key, value in given.items()}
        tensors = {key: value.as_subclass(Tensor) for key, value in tensors.items() if isinstance(value, Tensor)}
        written = {tensors[key].untyped_storage()._cdata: tensors[key] for key in known.writes}
        partly = any(step.name == "live_head" for step in self.steps)
        about = {"V": self.vocab, **given, "live": self.live_columns, "partly": partly}
        moved = {"read": 0.0, "written": 0.0}
        sources = {key: tensor for key, tensor in tensors.items() if key not in known.writes}
        targets = {key: tensors[key] for key in known.writes}
        for way, found in (("read", sources), ("written", targets)):
            for key, tensor in _distinct_items(found):
                if key in known.partly:
                    moved[way] += known.partly[key](about)
                elif way == "written" or tensor.untyped_storage()._cdata not in written:
                    moved[way] += _bytes(tensor)
        shapes = tuple(tuple(t.shape) for t in tensors.values())
        launch = Launch(kernel, tuple(blocks), given, options)
        self.steps.append(
            Step(name, shapes, int(moved["read"]), int(moved["written"]), known.flops(about), launch=launch)
        )


class Case(NamedTuple):
    """One forward and backward of the SGPO loss: rows of both groups (0: none), the head [vocab, hidden], and whether
    only live columns are multiplied."""

    policy_rows: int
    distill_rows: int
    hidden: int
    vocab: int
    live: bool
    live_share: float = 0.005
    dtype: torch.dtype = torch.bfloat16
    impl: Impl = "triton"
    captured: bool = False  # into a CUDA graph

    @property
    def live_columns(self) -> int:
        """How many columns of a chunk are taken to be alive."""
        return max(1, round(self.live_share * self.vocab))


def steps_of(case: Case) -> list[Step]:
    """What that call asks of the device, in order, as `custom_op` runs it: operator, then backward's products with the
    upstream gradient."""
    rows, taught, width = case.policy_rows, case.distill_rows, case.hidden

    def states(count: int) -> Tensor:
        return device_empty(count, width, dtype=case.dtype).requires_grad_()

    def numbers(count: int) -> Tensor:
        return device_empty(count, dtype=torch.float32)

    with Recorder(case.vocab, case.live_columns, captured=case.captured) as recorder:
        labels = device_empty(rows, dtype=torch.int64)
        bounds, limit = ClipRange(0.2, 0.28, None), KlLimit("forward_kl", None, "mask")
        policy = PolicyInputs(states(rows), labels, numbers(rows), numbers(rows), numbers(rows), bounds)
        teacher = device_empty(taught, width, dtype=case.dtype)
        distill = DistillInputs(states(taught), teacher, None, None, numbers(taught), limit)
        tolerance = TOLERANCE if case.live else 0.0
        options = LossOptions(1.0, None, tolerance, None, None, 0, case.impl, None)
        weight = device_empty(case.vocab, width, dtype=case.dtype).requires_grad_()
        groups = (policy if rows else None, distill if taught else None)
        arguments = custom_op.operator_arguments(weight, None, *groups, options)
        head.adds_in_place(case.dtype, weight.device)  # once per process
        recorder.steps.clear()
        with torch.no_grad(), mock.patch.object(custom_op, "scaled_op", _implementation("scaled")):
            inputs, wanted, _ = custom_op.split_arguments(arguments)
            result = custom_op.FusedResult(*custom_op.run_losses(*arguments))
            grads = (result.dhead, result.dhead_rows, result.dbias, result.dpolicy, result.ddistill)
            saved = custom_op.SavedGrads(result.scale, *grads, dtypes=custom_op.dtypes_of(inputs), impl=inputs.impl)
            custom_op.input_grads(saved, device_empty(dtype=torch.float32), wanted, None, len(arguments))
    return recorder.steps
