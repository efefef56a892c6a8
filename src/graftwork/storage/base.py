"""The contract of a storage format, and the walk that puts a model's weights into one.

A storage keeps one frozen weight W (out, in); a format whose codes can train says so by `train_weight`. Its tensors are
`leaves`: codes and float metadata, all kept as uint8 Parameters without gradient and viewed at use, since `model.to(bf16)` and
FSDP2 mixed precision would silently cast float leaves, and buffers are replicated by FSDP2 and re-broadcast by DDP. Only the
storage reads its codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import UsageError
from ..modeling.arithmetic import dtype_for, product_dtype
from ..modeling.protocols import Product, has_values
from ..registry import MethodConfig, lookup


class StorageConfig(MethodConfig):
    """Options every format has."""

    skip_modules: list[str] = ["lm_head", "score", "classifier", "pooler"]
    """Name suffixes whose weights stay dense (the output head and task heads by default)."""


class Storage(nn.Module):
    """A frozen weight (out, in) in some format.

    Subclasses implement `from_weight`, `dequantize` and `leaves`, and may override `product` with something faster.
    """

    trainable_leaves: ClassVar[tuple[str, ...]] = ()
    """Float leaves in which `product` and `dequantize` are differentiable, for adapters that train them. One called `scale` has a row
    for every row of W, and W is proportional to it."""
    recodes: ClassVar[bool] = False
    """Whether single codes may move: it has a leaf `codes`, a row for every row of W, and `recoded`."""
    does_without: ClassVar[bool] = False
    """Whether a format that reads statistics can be made without them (with a warning: it costs quality)."""
    allocates: ClassVar[bool] = False
    """Whether maps that are alike may get different formats."""
    options: StorageConfig
    in_features: int
    out_features: int

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, compute_dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features, self.compute_dtype = out_features, in_features, compute_dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    # -- to be written by a format ------------------------------------------------------------------------------
    @classmethod
    def needs(cls, config: StorageConfig) -> frozenset[str]:
        """Names of the statistics of a layer's inputs that `from_weight` reads under these options; see calibration.statistics."""
        return frozenset()

    @classmethod
    def windowed(cls, config: StorageConfig) -> Any:
        """The calibration that finds the codes of several blocks at once under these options (calibration.windows), or None."""
        return None

    @classmethod
    def without_data(cls, config: StorageConfig) -> StorageConfig:
        """The options under which `from_weight` needs no statistics and otherwise does the same: for weights that are made after
        the calibration (an edit), or that no data reached."""
        plain = {"calibration": {"method": "rtn"}} if cls.needs(config) and "calibration" in type(config).model_fields else {}
        return config.model_copy(update=plain)

    @classmethod
    def prepare(cls, model: nn.Module, config: StorageConfig, batches: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """What a format must know of the whole dense model before its first weight is stored: {map: {attribute of its statistics:
        value}}. Called once, with the calibration batches: none without data, and none where weights have no values. A class that
        overrides this needs all weights in memory at that point."""
        return {}

    @classmethod
    def from_weight(cls, weight: Tensor, config: StorageConfig, *, bias: Tensor | None = None, dtype: torch.dtype | None = None,
                    statistics: Any = None, generator: torch.Generator | None = None) -> Storage:
        """Put a dense weight (out, in) into this format. dtype: the compute dtype (default: the weight's).
        A fake or meta weight gives leaves of the right shapes and bytes, without values.
        Raises UsageError on NaN/Inf weights or shapes that the format cannot hold."""
        raise NotImplementedError

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any] | None = None) -> Storage:
        """The storage of one module of a published quantised checkpoint, codes kept. tensors: that module's tensors, by
        their names below the module. Raises UsageError when this format is not what a published checkpoint holds."""
        from .published import read

        return read(cls.method, tensors, quantization_config)

    @classmethod
    def load(cls, ref: Any, config: StorageConfig, *, on_site: Any = None, **options: Any) -> tuple[nn.Module, Any] | None:
        """(model, tokenizer) of a reference whose file holds this format's codes, kept; None for any other reference.
        options: of `modeling.models.load_model`."""
        return None

    def dequantize(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W (out, in) in the compute dtype, differentiable in the given leaves."""
        raise NotImplementedError

    def leaves(self) -> dict[str, Tensor]:
        """All tensors of the format, viewed in their true dtypes."""
        raise NotImplementedError

    def fake_quantize(self, weight: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """D(Q(weight)) (out, in) under this format's options, `without_data`; the gradient goes straight through to weight. A format
        with trainable leaves overrides this to quantise against the given ones."""
        if self.info.traits.get("lossless"):
            return weight
        stored = self.from_weight(weight.detach(), self.without_data(self.options), dtype=weight.dtype)
        return weight + (stored.dequantize() - weight).detach()

    def with_leaves(self, leaves: dict[str, Tensor], *, exact: bool = True) -> Storage:
        """A storage with other values of some of `trainable_leaves` (and of `codes`, where it `recodes`); bias and compute dtype are
        this one's. exact: floats are kept in fp32 where the format has an option for it, else rounded to the dtypes of this one."""
        raise UsageError(f"storage '{self.method}' has no leaves that an adapter trains", remedy="storage: int4")

    @classmethod
    def lets_train(cls, leaf: str) -> bool:
        """Whether an adapter may own this leaf: one of `trainable_leaves`, or `codes`."""
        return leaf in cls.trainable_leaves or leaf == "codes" and cls.recodes

    def recoded(self, weight: Tensor, leaves: dict[str, Tensor], moved: Tensor) -> Tensor:
        """The leaf `codes`: where moved (out, in) says so, the codes of the numbers nearest to weight (out, in) under these leaves
        (this storage's own where they are not given), elsewhere those of `leaves`."""
        raise UsageError(f"the codes of storage '{self.method}' do not move one by one", remedy="storage: int4")

    def shifted(self, change: Tensor, *, exact: bool = True) -> Storage | None:
        """A storage of the same codes whose weight is W + change (out, in), where the format can hold that; else None. exact: as in
        `with_leaves`."""
        return None

    @classmethod
    def joined(cls, parts: Sequence[Storage]) -> Storage:
        """The rows of several storages of this format, one below the other, as one storage of the same codes and values, without bias:
        maps that files keep apart and a model as one. Raises UsageError where one storage cannot hold them."""
        raise UsageError(f"storage '{cls.method}' does not put maps together", remedy="give the dense model")

    @classmethod
    def alike(cls, parts: Sequence[Storage], run: int = 1) -> Storage:
        """The first of `parts`. run: codes in memory order that share a scale. Raises UsageError where `joined` has parts of several kinds,
        or one but the last that ends within a run."""
        first = parts[0]
        if any((part.in_features, part.options, set(part.leaves())) != (first.in_features, first.options, set(first.leaves()))
               for part in parts):
            raise UsageError(f"maps that the model keeps as one are coded as {cls.method} in different ways", remedy="give the dense model")
        if any(part.out_features * part.in_features % run for part in parts[:-1]):
            raise UsageError(f"maps that the model keeps as one end within a group of {run} codes", remedy="give the dense model")
        return first

    def train_weight(self) -> nn.Parameter:
        """Let the weight itself train (full tuning), where the format can: from now on the module has a parameter `weight`, a
        stand-in for its codes (see modeling.trained_codes). Raises UsageError where the codes are frozen."""
        raise UsageError(f"{self.method} weights are frozen codes", remedy="storage: int8, dense, or add an adapter")

    # -- shared ---------------------------------------------------------------------------------------------------
    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W x without bias: (..., in) -> (..., out). Nothing dequantised is kept for the backward pass."""
        if leaves is not None:
            return F.linear(x, self.dequantize(leaves).to(x.dtype))
        return _DequantizedProduct.apply(x, self) if differentiated(x) else self.forward_product(x)

    def forward_product(self, x: Tensor) -> Tensor:
        """x D(W)^T, (..., in) -> (..., out) in x's dtype, without gradient."""
        return frozen_linear(x, self)

    def dense_as(self, dtype: torch.dtype) -> Tensor:
        """`dequantize()` in another dtype: the same values (rounded to the compute dtype), without gradient."""
        return self.dequantize().to(dtype)

    def transposed(self, grad: Tensor) -> Tensor:
        """W^T g: (..., out) -> (..., in) in grad's dtype; W is rebuilt for it and dropped."""
        dtype = product_dtype(grad.dtype, grad.device)
        return (grad.to(dtype) @ self.dense_as(dtype)).to(grad.dtype)

    def forward(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        y = self.product(x, leaves)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n,) int64 of W: (n, in)."""
        return self.dequantize().index_select(0, index)

    @property
    def weight(self) -> Tensor:
        """Zero-size proxy that carries compute dtype and device, for code that asks `module.weight.dtype`."""
        return torch.empty(0, dtype=self.compute_dtype, device=next(iter(self.parameters())).device)

    @property
    def bits_per_weight(self) -> float:
        """Exact, with all metadata (not the bias): 8 * bytes of the leaves / (out * in)."""
        kept = sum(p.numel() * p.itemsize for n, p in self.named_parameters(recurse=False) if n not in ("bias", "weight"))
        return 8.0 * kept / (self.out_features * self.in_features)

    def _apply(self, fn, recurse=True):
        # .to(dtype) changes the compute dtype only; codes are bytes and stay.
        probe = fn(torch.empty(0, dtype=self.compute_dtype))
        self.compute_dtype = probe.dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits_per_weight:.4g}"


def differentiated(x: Tensor) -> bool:
    """Whether a derivative of what is computed from x may be asked for; otherwise a custom function costs time for nothing."""
    # Below level 0 nothing has a tangent: unpack_dual says so too, in calls that a small product feels.
    return torch.is_grad_enabled() or getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None


class _DequantizedProduct(torch.autograd.Function):
    """y = x D(W)^T with D(W) rebuilt in the backward pass: neither x nor anything of the weight is saved."""

    @staticmethod
    def forward(ctx, x: Tensor, storage: Storage) -> Tensor:
        ctx.storage = storage
        return storage.forward_product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (ctx.storage.transposed(grad) if ctx.needs_input_grad[0] else None), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return ctx.storage.product(tangent)  # differentiable once more, if tangents are


def frozen_linear(x: Tensor, storage: Storage) -> Tensor:
    """x D(W)^T, (..., in) -> (..., out) in x's dtype."""
    dtype = dtype_for(x)
    return F.linear(x.to(dtype), storage.dense_as(dtype)).to(x.dtype)


def bytes_parameter(tensor: Tensor) -> nn.Parameter:
    """A tensor of any dtype as a frozen uint8 Parameter of its bytes, flat."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one number out of a matrix keeps its stride, which a view in bytes refuses
        flat = flat.clone(memory_format=torch.contiguous_format)
    # A view also where it is bytes already: fake tensors that an operation remembers could not be moved to a device.
    return nn.Parameter(flat.view(torch.uint8), requires_grad=False)


def view_as(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of bytes_parameter: its bytes read as dtype, flat."""
    if dtype == torch.uint8:
        return parameter
    try:
        return parameter.view(dtype)
    except RuntimeError:  # a slice of a larger buffer (a flat shard) may start anywhere
        return parameter.clone().view(dtype)


def check_weight(weight: Tensor, name: str) -> None:
    """Raises UsageError for a weight that no format may hold (not 2-D, NaN or infinite)."""
    if weight.dim() != 2:
        raise UsageError(f"{name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise UsageError(f"{name}: the weight is empty, shape {tuple(weight.shape)}")
    if has_values(weight) and not torch.isfinite(weight).all():
        raise UsageError(f"{name}: the weight has NaN or infinite entries", remedy="the model file is damaged; load it anew")


def make_storage(weight: Tensor, method: str, config: StorageConfig, **kwargs) -> Storage:
    """One weight into the named format."""
    return lookup("storage", method).cls.from_weight(weight, config, **kwargs)


@dataclass(frozen=True)
class Place:
    """One linear map that goes into a storage: a module, or expert `expert` of the fused parameter `attribute` of one."""

    name: str
    module: nn.Module
    product: Product
    attribute: str | None = None
    expert: int | None = None


def places(model: nn.Module, config: StorageConfig, within: str = "") -> list[Place]:
    """The maps of a model (or of its module `within`) that are dense now and that this config puts into a storage."""
    from ..modeling.experts import expert_linears
    from ..modeling.sites import linear_modules

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    root, prefix = model.get_submodule(within), f"{within}." if within else ""
    found = [Place(f"{within}.{name}".strip("."), module, product) for name, module, product in linear_modules(root)
             if module is not head and not isinstance(module, Storage)]
    found = [place for place in found if place.name.split(".")[-1] not in config.skip_modules]
    return found + [Place(f"{prefix}{name}.{attribute}.{expert}", module, product, attribute, expert)
                    for name, module, attribute, expert, product in expert_linears(root)
                    if not isinstance(getattr(module, attribute), nn.ModuleList)]


def store(model: nn.Module, place: Place, config: StorageConfig, statistics: Any = None) -> Storage:
    """Put one map into its storage, in place."""
    dense, cls = place.product.dense(), lookup("storage", config.method).cls
    bias = place.product.bias if place.expert is None else None
    try:
        stored = cls.from_weight(dense.detach(), config, bias=bias, dtype=dense.dtype, statistics=statistics)
    except UsageError as error:
        raise UsageError(f"{place.name}: {error.message}", remedy=error.remedy) from None
    here = next(stored.parameters()).device == dense.device  # a needless move would be refused for fake tensors
    return install(model, place, stored if here else stored.to(dense.device))


def install(model: nn.Module, place: Place, stored: Storage) -> Storage:
    """A storage in the place of a map."""
    from ..modeling.calls import keep_calls
    from ..modeling.experts import replace_expert
    from ..modeling.protocols import is_conv1d

    if place.expert is not None:
        replace_expert(place.module, place.attribute, place.expert, stored)
        return stored
    stored.transposed_source = is_conv1d(place.module)  # its weight in the model's file is (in, out)
    parent, _, last = place.name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, last, stored)
    keep_calls(owner, last)  # a fused kernel would be handed the weight, which is codes now
    return stored


def apply_storage(model: nn.Module, config: StorageConfig, *, on_site=None, batches=None, notes: list[str] | None = None) -> nn.Module:
    """Replace every linear map of the model (except `skip_modules` and the output head) by its storage, in place.

    Works site by site: one dense weight is alive beside the storages at any time. on_site(name) is called per site
    for progress. Dense storage leaves nn.Linear as it is: a plain module is the dense format. A config that reads how inputs are
    distributed takes them from `batches` (model inputs, iterable or a function that returns one), block by block: see
    calibration.walk. notes: gets what a reader should know of that; left out, they are warnings.
    A model that is in this storage already stays as it is; UsageError where its codes came from files and are of another one."""
    if config.method == "dense":
        return model
    kept = model.__dict__.get("graft_storage")
    if kept is not None and kept.method == config.method and kept == config:
        return model
    if kept is not None and model.__dict__.get("graft_codes_kept"):
        other = "with other options" if kept.method == config.method else f"not {config.method}"
        raise UsageError(f"the weights of this model are {kept.method} codes already, {other}",
                         remedy="leave the storage out to keep the codes, or give the dense model")
    cls = lookup("storage", config.method).cls
    if cls.needs(config) and not (batches is None and cls.does_without) and any(has_values(p) for p in model.parameters()):
        from .calibration.walk import walk

        walk(model, config, batches, on_site=on_site, notes=notes)
        return model
    from .calibration.statistics import with_attributes

    prepared, made = cls.prepare(model, config, []), {}
    todo = places(model, config)[::-1]
    while todo:  # what is done is let go, with its dense weight
        place = todo.pop()
        known = prepared.get(place.name, {})
        key = _kind(place, known)
        if key is None or key not in made:
            made[key] = store(model, place, config, with_attributes(None, known))
        else:
            install(model, place, _another(made[key]))
        if on_site:
            on_site(place.name)
    model.__dict__["graft_storage"] = config
    return model


def _kind(place: Place, attributes: Mapping[str, Any]) -> tuple | None:
    """What a weight without values shares with all whose storages are like its own; None for one with values."""
    dense, bias = place.product.dense(), place.product.bias if place.expert is None else None
    if has_values(dense):
        return None
    known = tuple((name, tuple(value.tolist())) for name, value in sorted(attributes.items()))
    return tuple(dense.shape), dense.dtype, dense.device, None if bias is None else (tuple(bias.shape), bias.dtype), known


def _another(stored: nn.Module) -> nn.Module:
    """The like of a module without values, with tensors of its own; `deepcopy` asks for the address of fake ones, which they lack."""
    made = copy.copy(stored)
    made.__dict__ |= {name: copy.copy(value) for name, value in stored.__dict__.items() if isinstance(value, dict | list | set)}
    for kind, again in (("_parameters", lambda each: nn.Parameter(torch.empty_like(each), each.requires_grad)),
                        ("_buffers", torch.empty_like), ("_modules", _another)):
        getattr(made, kind).update({name: again(each) for name, each in getattr(stored, kind).items() if each is not None})
    return made


def load_stored(ref: Any, config: StorageConfig | None, *, on_site: Any = None, notes: list[str] | None = None, batches: Any = None,
                keep_codes: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """(model with its weights in a storage, tokenizer): with the codes of the file where the format keeps those, else loaded and
    quantised. config None: as loaded. batches(model, tokenizer): what `apply_storage` calibrates on. keep_codes: a
    folder of codes stays as it is, whatever config says. options: of `modeling.models.load_model`."""
    from ..modeling.models import load_model

    found = None if config is None else lookup("storage", config.method).cls.load(ref, config, on_site=on_site, **options)
    if found is None:
        found = load_model(ref, **options)
        if config is not None and not (keep_codes and found[0].__dict__.get("graft_codes_kept")):
            apply_storage(found[0], config, on_site=on_site, notes=notes, batches=batches(*found) if batches else None)
    return found


def train_weights(model: nn.Module) -> None:
    """Make all of a model's own weights trainable, codes where the storage can. Raises UsageError for frozen codes."""
    for module in list(model.modules()):
        if isinstance(module, Storage):
            module.train_weight()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


@torch.no_grad()
def dense_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of a model with dense weights in place of its storages, under the names of the model's file; None if nothing
    is stored. All weights are dense at once."""
    from ..modeling.experts import ExpertLoop

    stored = {name: module for name, module in model.named_modules() if isinstance(module, Storage)}
    if not stored:
        return None
    state, experts = model.state_dict(), {}
    for name, module in stored.items():
        for key in module.leaves():
            del state[f"{name}.{key}"]
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent.rpartition(".")[0])
        if isinstance(owner, ExpertLoop) and last.isdigit():
            weight = module.dequantize()
            experts.setdefault(parent, []).append(weight.T if getattr(owner, "is_transposed", False) else weight)
        else:
            weight = module.dequantize()
            state[f"{name}.weight"] = weight.T.contiguous() if getattr(module, "transposed_source", False) else weight
    return {**state, **{name: torch.stack(parts) for name, parts in experts.items()}}


def storage_bits(model: nn.Module) -> float:
    """Average bits per weight over the stored modules of a model (0.0 when none is stored)."""
    stored = [m for m in model.modules() if isinstance(m, Storage)]
    total = sum(m.out_features * m.in_features for m in stored)
    return sum(m.bits_per_weight * m.out_features * m.in_features for m in stored) / total if total else 0.0
