"""Record what a network does with one example as a graph.

Recorded values know what they are for the example, so that ordinary code may branch and loop over sizes. Only what
depends on the data itself has no answer.
"""

import contextlib
import copy
import dataclasses
import inspect
import operator
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from repairlib.inputs import Inputs, arguments, map_inputs

# What these say of a tensor depends on its shape and kind only.
_SIZES = frozenset(
    "shape size ndim dim ndimension numel nelement dtype device layout is_cuda is_floating_point is_complex is_sparse "
    "is_quantized is_nested is_contiguous is_meta is_mps stride element_size requires_grad grad_fn itemsize __len__ "
    "get_device is_tensor type is_leaf names".split()
)
# Of these, what says where a tensor is or how it lies in memory: a tensor without values lies elsewhere.
_PLACES = frozenset(
    "device is_cuda is_cpu is_meta is_mps get_device type is_contiguous stride storage_offset data_ptr".split()
)
# What makes tensors whose very shape depends on the data.
_RAGGED = frozenset("nonzero argwhere unique unique_consecutive masked_select".split())
# Functions that do not notice by themselves that something is recorded: factories are given sizes only, and where a
# number may be given for a tensor, what is recorded is taken for a tensor of C++, which ends Python.
_WRAPPED = (
    torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.eye, torch.linspace, torch.tensor,
    torch.as_tensor, torch.tril_indices, torch.triu_indices, torch.finfo, torch.iinfo, torch.where,
)  # fmt: skip
_COMPOSED = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
             nn.TransformerDecoderLayer)  # fmt: skip


class UntraceableModel(ValueError):
    """The model's forward cannot be written as a graph; the message names the line and what it asks for."""


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, and give every submodule its own training flag back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    if any(training or heeds_mode(module) for module, training in flags):
        for model in models:
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            if module.training is not training:
                module.training = training


def heeds_mode(module: nn.Module) -> bool:
    """Whether a module does more than to note it when it is put into training or evaluation mode."""
    kind, own = type(module), vars(module)
    return (kind.train, kind.eval) != (nn.Module.train, nn.Module.eval) or "train" in own or "eval" in own


def check_model(model: Any) -> None:
    """Refuse what is no ordinary network.

    Raises:
        TypeError: a state dict, a TorchScript or an exported program.
        ValueError: a `Repaired`; or weights that are not there: on the meta device, or of a lazy layer that never ran.
    """
    if isinstance(model, Mapping):
        raise TypeError("this is a state dict: build the network and pass it after model.load_state_dict(state)")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError("this is a TorchScript program, whose layers are gone: pass the module that it was made from")
    if hasattr(model, "corrections") and not isinstance(model, nn.Module):
        raise ValueError(
            "this is what repair or merge returns: pass its .model. To add a third network, align all of them with "
            "match_several and average with Repair(..., others=[...])"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"a network is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, fx.GraphModule) and "eval" in vars(model):  # which torch.export puts there
        raise TypeError("this is an exported program, whose layers are gone: pass the module that it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name!r} belongs to a lazy layer that never ran: run the network once")
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without values: load the weights first")


def copy_model(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """What `copy.deepcopy` makes of a model, in less than half of the time.

    Deepcopy takes most of its time for weights and for empty tables of hooks, one by one. They are copied here and put
    into its memo. Tensors that may share memory are left to deepcopy, so that their copies share it, too.
    """
    memo, originals, plain = dict(memo or {}), [], True
    by_memory: dict[int, list[Tensor]] = {}
    for module in model.modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if type(value) in (OrderedDict, dict, set) and not value:
                memo.setdefault(id(value), type(value)())
                originals.append(value)  # else another object might come to have its id
            elif type(value) is Tensor and value.layout is torch.strided and not value.is_meta:
                by_memory.setdefault(value.untyped_storage().data_ptr(), []).append(value)
            elif key not in ("_parameters", "_buffers", "_modules"):
                plain = plain and _is_plain(value)  # else there may be views in it
        for weight in module._parameters.values():
            if type(weight) is nn.Parameter and id(weight) not in memo:
                memo[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                originals.append(weight)
    for x, *others in by_memory.values() if plain else ():
        whole = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
        ordinary = not x.requires_grad and x.grad is None and not vars(x)
        if whole and ordinary and not others and id(x) not in memo:
            memo[id(x)] = x.clone()
            originals.append(x)
    return copy.deepcopy(model, memo)


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts and the like alone."""
    if type(value) in (tuple, list, set, dict, OrderedDict, torch.Size):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str, type, torch.dtype, torch.device))


def inside(model: nn.Module) -> nn.Module:
    """The network that a wrapper runs: of torch.compile, DataParallel or DistributedDataParallel."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return inside(model.module)
    compiled = model._modules.get("_orig_mod")
    return inside(compiled) if compiled is not None else model


class ChannelAffine(nn.Module):
    """Visible correction of a node: ``y_c = weight_c x_c + bias_c`` for the units c along one axis."""

    def __init__(self, weight: Tensor, bias: Tensor, axis: int = 1):
        super().__init__()
        self.weight, self.bias, self.axis = nn.Parameter(weight), nn.Parameter(bias), axis

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias, self.axis)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, axis={self.axis}"


def along(values: Tensor, ndim: int, axis: int | tuple[int, ...] = 1) -> Tensor:
    """View of values, one a unit, that broadcasts along an axis of a tensor of `ndim` axes, or along several."""
    axes = [i % ndim for i in ((axis,) if isinstance(axis, int) else axis)]
    places = dict(zip(axes, values.shape, strict=True))
    return values.view([places.get(i, 1) for i in range(ndim)])


def affine(x: Tensor, gain: Tensor, shift: Tensor, axis: int = 1) -> Tensor:
    """Affine map of the units (units,) along an axis of x: ``y_c = gain_c x_c + shift_c``."""
    return x * along(gain, x.ndim, axis) + along(shift, x.ndim, axis)


class _Recorded(fx.Proxy):
    """A node of the graph that knows its value for the example; it passes for that value in `isinstance`."""

    def __init__(self, node: fx.Node, tracer: "Tracer", value: Any, of_data: bool, ragged: bool = False):
        super().__init__(node, tracer)
        self.recorder = tracer
        self.value = value
        self.of_data = of_data  # whether it depends on what is in the example, not on its shape alone
        self.ragged = ragged  # whether its very shape does

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.value, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def ask(self, sizes: bool = False) -> Any:
        """The value, or a size of it, if that does not depend on the data."""
        if self.ragged or (self.of_data and not sizes):
            raise ValueError(f"it asks for the value of {self.node.name!r}, which depends on the data, and not on its "
                             "shape alone")  # fmt: skip
        self.recorder.asked = True
        return self.value

    def __len__(self) -> int:
        return len(self.value if isinstance(self.value, (tuple, list, Mapping)) else self.ask(sizes=True))

    def __iter__(self) -> Iterator:
        if isinstance(self.value, Mapping):
            return iter(self.value)
        return iter([operator.getitem(self, i) for i in range(len(self))])  # type: ignore[call-overload]

    def __contains__(self, item: Any) -> bool:
        return item in self.ask()

    def __bool__(self) -> bool:
        return bool(self.ask())

    def __int__(self) -> int:
        return int(self.ask())

    def __index__(self) -> int:
        return operator.index(self.ask())

    def __float__(self) -> float:
        return float(self.ask())

    def __round__(self, *digits: int) -> Any:
        return round(self.ask(), *digits)

    def __array__(self, *args: Any, **options: Any) -> Any:
        return np.asarray(self.ask(), *args)

    def __format__(self, form: str) -> str:
        return format(self.value, form)


class _Shapes(TorchDispatchMode):
    """Computes shapes alone of what depends on tensors of the meta device, and all else as ever."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # by `id`, with the tensor, so that no other takes its place

    def empty(self, x: Tensor) -> Tensor:
        if id(x) not in self.known:
            self.known[id(x)] = x, x.to("meta")
        return self.known[id(x)][1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, form = tree_flatten((args, kwargs or {}))
        if any(isinstance(a, Tensor) and a.is_meta for a in flat):
            before, flat = args, [self.empty(a) if isinstance(a, Tensor) and not a.is_meta else a for a in flat]
            args, kwargs = tree_unflatten(flat, form)
            if any(a.alias_info and a.alias_info.is_write and isinstance(value, Tensor) and not value.is_meta
                   for a, value in zip(func._schema.arguments, before, strict=False)):  # fmt: skip
                raise _ValuesNeeded(f"{func} writes what depends on the example into a tensor of the model")
            if func is torch.ops.aten.native_batch_norm.default and not args[5]:  # in evaluation, PyTorch's own is slow
                return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **kwargs or {})


class Tracer(fx.Tracer):
    """Records a network's forward for one example, computing every value on the way.

    A correction stays whole, so that a repaired network has the node names of the network that it came from.
    """

    proxy_buffer_attributes = True  # what is computed from buffers is part of the graph, not a constant

    def __init__(self, example: Inputs, shapes_only: bool = False):
        super().__init__(autowrap_functions=_WRAPPED)
        self._autowrap_search.append(torch)
        self.example = map_inputs(lambda x: x.to("meta"), example) if shapes_only else example
        self.shapes_only = shapes_only
        self.places = {x.device.type for x in tensors_in(example)}
        self.shapes: dict[str, Any] = {}  # of every node whose value is a tensor
        self.plain: dict[str, Any] = {}  # values that hold no tensor: sizes and what is computed from them
        self.running = False  # while a node is computed, modules are called, not recorded
        self.asked = False  # whether code asked for a size, so that the graph may be of this one only
        self.rows = 0  # number of examples to try in that case, at least
        self.failed: Exception | None = None  # of an operation that cannot be computed
        self.constants: dict[str, Any] = {}  # tensors that forward makes, by name

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        self.modules = dict(self.root.named_modules())
        network = inside(self.root)
        args, named = arguments(self.example)
        signature = inspect.signature(network.forward)
        try:
            signature.bind(*args, **named)
        except TypeError as error:
            raise UntraceableModel(
                f"forward{signature} was given {len(args) + len(named)} inputs: {error}. Batches ((x, z), y) or "
                "({'x': x, 'z': z}, y) give a network several inputs"
            ) from None
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in signature.parameters.values() if p.kind in kinds]
        names += [f"input_{i}" for i in range(len(names), len(args))]
        positional = [self._placeholder(*each) for each in zip(names, args, strict=False)]
        order = [*(name for name in names if name in named), *named]  # that of forward, as a repaired network has it
        by_name = {name: self._placeholder(name, named[name]) for name in dict.fromkeys(order)}

        def forward(root: nn.Module) -> Any:
            return inside(root).forward(*positional, **by_name)

        return forward, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        value = map_inputs(torch.clone, value)  # the first operation may be in place
        self._note(node, value)
        return _Recorded(node, self, value, True) if tensors_in(value) else value

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, _COMPOSED):
            return False
        return isinstance(module, ChannelAffine) or super().is_leaf_module(module, name)

    def call_module(self, module, forward, args, kwargs):
        if self.running:
            return forward(*args, **kwargs)
        network = inside(module)
        return super().call_module(module, forward, args, kwargs) if network is module else network(*args, **kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, proxy_factory_fn=None):
        node = super().create_proxy(kind, target, args, kwargs, name, type_expr).node
        sources: list[_Recorded] = []

        def known(a: Any) -> Any:
            if type(a) is not _Recorded:
                return a
            sources.append(a)
            return a.value

        args, kwargs = fx.node.map_aggregate((args, kwargs), known)
        self.running = True
        try:
            if self.shapes_only and (_is_foreign(kind, target) or any(map(torch.is_autocast_enabled, self.places))):
                raise _ValuesNeeded("code may look at values, or numbers are of another kind where no values are")
            value = perform(self.root, self.modules, kind, target, args, kwargs)
        except Exception as error:  # which the model's code may catch
            self.failed = error
            self.graph.erase_node(node)
            raise
        finally:
            self.running = False
        self._note(node, value)
        if value is None:
            return None
        what = "" if kind == "call_module" else args[1] if target is getattr else getattr(target, "__name__", target)
        if self.shapes_only and what in _PLACES:
            self.failed = _ValuesNeeded(f"it asks where {node.name!r} is")
            raise self.failed
        ragged = any(source.ragged for source in (sources[:1] if what.endswith("_") else sources))
        ragged = ragged or what in _RAGGED or (what == "where" and len(args) == 1) or _selects(target, args)
        # A number may depend on data where it was read from a tensor, not from its size.
        says_size = what in _SIZES and not tensors_in(value) and not ragged
        self._watch_rows(what, value, args, kwargs)
        return _Recorded(node, self, value, any(source.of_data for source in sources) and not says_size, ragged)

    def _watch_rows(self, what: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note where examples are taken apart: code that loops over the parts would be of this number of them only."""
        if not isinstance(value, (tuple, list)) or not args or not isinstance(args[0], Tensor) or not args[0].ndim:
            return
        parts = [part for part in value if isinstance(part, Tensor)]
        if any(part.ndim == 0 or len(part) != len(args[0]) for part in parts):
            self.asked = True
        elif what == "split" and isinstance(args[1], int) and (kwargs.get("dim") or (*args, 0)[2]) == 0:
            self.asked, self.rows = True, max(self.rows, args[1] + 1)

    def _note(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            self.shapes[node.name] = tuple(value.shape)
        elif not tensors_in(value):
            self.plain[node.name] = value


# Packages whose functions compute shapes from shapes; others may look at what they are given, or keep it.
_KNOWN = ("torch", "torchvision", "operator", "_operator", "builtins", "math")


def _is_foreign(kind: str, target: Any) -> bool:
    """Whether an operation is a function of the user's, or of a package that is not known."""
    return kind == "call_function" and (getattr(target, "__module__", None) or "torch").partition(".")[0] not in _KNOWN


def _selects(target: Any, args: tuple) -> bool:
    """Whether an index is a mask, so that data say how many elements there are."""
    index = args[1] if target is operator.getitem else ()
    index = index if isinstance(index, tuple) else (index,)
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)


def perform(model: nn.Module, modules: Mapping, kind: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Value of a node that is no input, from its arguments."""
    if kind == "get_attr":
        return operator.attrgetter(target)(model)
    if kind == "call_module":
        return modules[target](*args, **kwargs)
    if kind == "call_function":
        return target(*args, **kwargs)
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return args[0]  # output


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in tuples, lists, dictionaries and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


class _ValuesNeeded(Exception):
    """Shapes alone do not record this network."""


_LARGE = 2**35  # weights times numbers in the example: two images of 32 pixels for a ResNet18


def record(model: nn.Module, example: Inputs) -> Tracer:
    """Graph of a model's operations in evaluation mode, with what is known of its values, and the constants it made.

    No graph may depend on the data. So shapes alone are computed for large networks and inputs, where values would take
    longer, unless an operation needs values.

    Raises:
        UntraceableModel: forward depends on the data, or does what no graph can hold.
    """
    weights, values = (sum(x.numel() for x in each) for each in (model.parameters(), tensors_in(example)))
    if weights * values > _LARGE and _plain(model, example):
        try:
            return _record(model, Tracer(example, shapes_only=True))
        except Exception:  # of any kind: an operation that has no shape without values, code that uses NumPy, ...
            pass
    return _record(model, Tracer(example))


def _plain(model: nn.Module, example: Inputs) -> bool:
    """Whether only ordinary tensors are read, and no hook looks at what modules compute."""
    ordinary = all(type(x) is Tensor and x.layout is torch.strided for x in tensors_in(example))
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return ordinary and not (everywhere or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()))


def _record(model: nn.Module, tracer: Tracer) -> Tracer:
    with untouched(model):
        own = dict(vars(model))
        try:
            with _Shapes() if tracer.shapes_only else contextlib.nullcontext(), _functions_of_autograd(tracer):
                tracer.trace(model)
        except Exception as error:
            if error is tracer.failed or isinstance(error, UntraceableModel):  # of the first kind: a wrong shape, ...
                raise
            nodes = list(getattr(tracer, "graph", fx.Graph()).nodes)
            last = f" after node '{nodes[-1].name}' ({nodes[-1].target})" if nodes else ""
            raise UntraceableModel(
                f"{type(model).__name__}.forward cannot be traced{last}{_where(error)}: {error}. Move it out of "
                "forward, or into a module or function of its own that takes and returns tensors"
            ) from error
        tracer.constants = {name: x for name, x in vars(model).items() if type(x) is Tensor and name not in own}
    if tracer.shapes_only and (tracer.failed or any(x.is_meta for x in tracer.constants.values())):
        raise _ValuesNeeded("an operation failed, and the model's code caught that, or a constant has no values")
    return tracer


@contextlib.contextmanager
def _functions_of_autograd(tracer: Tracer) -> Iterator[None]:
    """Record custom `torch.autograd.Function`s, which would take what is recorded for a tensor of C++."""
    of_class = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(type(a) is _Recorded for a in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", cls.apply, args, kwargs)  # type: ignore[attr-defined]
        return of_class.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = of_class  # type: ignore[assignment]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, and give every submodule its own attributes back: forward may keep things."""
    with eval_mode(model):
        model.train()  # some modules then forget what they computed from their weights for evaluation
        model.eval()
        kept = [(module, dict(vars(module))) for module in model.modules()]
        # Of parameters, buffers, modules, and caches of their own.
        tables = [(table, dict(table)) for _, own in kept for table in own.values() if isinstance(table, dict)]
        try:
            yield
        finally:
            for attributes, before in [(vars(module), own) for module, own in kept] + tables:
                attributes.clear()
                attributes.update(before)


def _where(error: Exception) -> str:
    """Line of the user's code that an error comes from."""
    own, library = Path(__file__).parent, Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {own, library} & {*Path(frame.filename).parents} and frame.line
    ]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`" if frames else ""
