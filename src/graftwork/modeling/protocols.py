"""What the axes need of each other, as small protocols. The frozen linear map of a site is a `Product`.

Shapes: x (..., in), y (..., out), W (out, in). Only these classes know how a module keeps its weight; adapters ask
`product`, `dense`, `bias`, never `.weight.shape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .arithmetic import linear


def has_values(tensor: Tensor) -> bool:
    """False for meta and fake tensors (planning), which carry shape and dtype only."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


@runtime_checkable
class StoredWeight(Protocol):
    """A module that keeps a frozen weight in its own format (graftwork.storage.Storage)."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor: ...
    def dequantize(self, leaves: dict[str, Tensor] | None = None) -> Tensor: ...


class Product:
    """The frozen product of one site: y = W x (+ bias), W (out, in)."""

    in_features: int
    out_features: int

    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W x without bias: (..., in) -> (..., out)."""
        return linear(x, self.dense(leaves))

    def dense(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W (out, in) as a dense tensor of the compute dtype; a view of the parameter where the format is dense."""
        raise NotImplementedError

    def transposed(self, grad: Tensor) -> Tensor:
        """W^T g: (..., out) -> (..., in), a new tensor in grad's dtype; not differentiable."""
        return linear(grad, self.dense().detach().T)

    @property
    def frozen(self) -> bool:
        """True when no gradient of W is wanted."""
        return not self.dense().requires_grad

    bias: Tensor | None = None

    @property
    def stored(self) -> Any:
        """The storage that keeps W alone, or None: a dense weight, or part of a larger one."""
        return None

    def leaf(self, name: str) -> Tensor | None:
        """A leaf of the stored weight, by name; None where there is none."""
        return None if self.stored is None else self.stored.leaves().get(name)

    @property
    def dtype(self) -> torch.dtype:
        return self.dense().dtype

    @property
    def device(self) -> torch.device:
        return self.dense().device


class LinearProduct(Product):
    """nn.Linear."""

    def __init__(self, module: nn.Linear):
        self.module, self.in_features, self.out_features = module, module.in_features, module.out_features

    def dense(self, leaves=None):
        return self.module.weight

    @property
    def bias(self):
        return self.module.bias


class Conv1DProduct(Product):
    """GPT-2's Conv1D: keeps W transposed, (in, out)."""

    def __init__(self, module):
        self.module = module
        self.in_features, self.out_features = module.weight.shape

    def dense(self, leaves=None):
        return self.module.weight.T

    @property
    def bias(self):
        return self.module.bias


class StorageProduct(Product):
    """A module that keeps its weight in a storage format."""

    def __init__(self, module: StoredWeight):
        self.module, self.in_features, self.out_features = module, module.in_features, module.out_features

    def product(self, x, leaves=None):
        return self.module.product(x, leaves)

    def dense(self, leaves=None):
        return self.module.dequantize(leaves)

    def transposed(self, grad):
        return self.module.transposed(grad)

    @property
    def stored(self):
        return self.module

    frozen = True

    @property
    def bias(self):
        return self.module.bias

    @property
    def dtype(self):
        return self.module.weight.dtype

    @property
    def device(self):
        return self.module.weight.device


class RowsProduct(Product):
    """A slice of output rows of another product: q, k or v of a fused projection."""

    def __init__(self, whole: Product, rows: slice):
        self.whole, self.rows = whole, rows
        self.in_features, self.out_features = whole.in_features, rows.stop - rows.start

    def dense(self, leaves=None):
        """leaves: of these rows only."""
        if leaves is not None:
            own = {name: self.whole.leaf(name) for name in leaves}
            leaves = {n: torch.cat([own[n][: self.rows.start].to(v.dtype), v, own[n][self.rows.stop:].to(v.dtype)])
                      for n, v in leaves.items()}
        return self.whole.dense(leaves)[self.rows]

    def leaf(self, name):
        """Of these rows; for leaves that have a row for every row of W."""
        found = self.whole.leaf(name)
        return None if found is None else found[self.rows]

    @property
    def bias(self):
        return None if self.whole.bias is None else self.whole.bias[self.rows]

    @property
    def dtype(self):
        return self.whole.dtype

    @property
    def device(self):
        return self.whole.device


class ExpertProduct(Product):
    """Expert e of a fused 3-D parameter (experts, out, in), or (experts, in, out) in a module that says `is_transposed`, or of a list of
    storages that replaced it. Its bias, where the module has one, is a row of the parameter `ATTRIBUTE_bias` (experts, out)."""

    def __init__(self, module: nn.Module, attribute: str, expert: int):
        self.module, self.attribute, self.expert = module, attribute, expert
        self.transposed_source = getattr(module, "is_transposed", False)
        kept = getattr(module, attribute)
        if isinstance(kept, nn.ModuleList):
            self.in_features, self.out_features = kept[expert].in_features, kept[expert].out_features
        else:
            self.out_features, self.in_features = self._of(kept).shape

    def _of(self, whole: Tensor) -> Tensor:
        """This expert's part of the parameter or its like, as a view (out, in)."""
        return whole[self.expert].T if self.transposed_source else whole[self.expert]

    def product(self, x, leaves=None):
        kept = getattr(self.module, self.attribute)
        return kept[self.expert].product(x, leaves) if isinstance(kept, nn.ModuleList) else linear(x, self._of(kept))

    def dense(self, leaves=None):
        kept = getattr(self.module, self.attribute)
        return kept[self.expert].dequantize(leaves) if isinstance(kept, nn.ModuleList) else self._of(kept)

    @property
    def bias(self):
        kept = self.module._parameters.get(f"{self.attribute}_bias") if getattr(self.module, "has_bias", False) else None
        return None if kept is None else kept[self.expert]

    @property
    def stored(self):
        kept = getattr(self.module, self.attribute)
        return kept[self.expert] if isinstance(kept, nn.ModuleList) else None


@dataclass(frozen=True)
class MovedRows:
    """Rows of W that differ: (W x)[ids] += change x. ids (m,) int64, change (m, in) fp32; used (n, m): which of them the n rows of x
    see (None: all)."""

    ids: Tensor
    change: Tensor
    used: Tensor | None = None


def product_of(module: nn.Module) -> Product | None:
    """The Product of a module, or None when it is not a linear map that may carry a graft."""
    if hasattr(module, "dequantize") and isinstance(module, StoredWeight):  # the protocol's own check is slow
        return StorageProduct(module)
    if isinstance(module, nn.Linear):
        return LinearProduct(module)
    if is_conv1d(module):
        return Conv1DProduct(module)
    return None


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


class Base:
    """What an adapter sees of the frozen weight during one forward of one site.

    `base(x)` is memoised on the identity of x, so several adapters of one site multiply the frozen weight once."""

    __slots__ = ("frozen", "noise", "_x", "_y")

    def __init__(self, frozen: Product, noise: Any = None):
        """noise: the model's StateHolder, from whose clock dropout masks are drawn."""
        self.frozen, self.noise, self._x, self._y = frozen, noise, None, None

    def __call__(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W x + bias, (..., in) -> (..., out)."""
        if leaves is None and self._x is x:
            return self._y
        bias = self.frozen.bias
        if leaves is None and type(self.frozen) is LinearProduct:
            y = linear(x, self.frozen.module.weight, bias)
        else:
            y = self.frozen.product(x, leaves)
            if bias is not None:
                y = y + bias
        if leaves is None:
            self._x, self._y = x, y
        return y

    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W x without the bias, (..., in) -> (..., out); not memoised."""
        return self.frozen.product(x, leaves)

    def weight(self, leaves: dict[str, Tensor] | None = None) -> Tensor:
        """W (out, in), dense."""
        return self.frozen.dense(leaves)

    @property
    def bias(self) -> Tensor | None:
        return self.frozen.bias


class Quantizer(Protocol):
    """W (out, in) -> a Storage; how an initializer reaches the storage axis without importing it."""

    def __call__(self, weight: Tensor, **kwargs: Any) -> nn.Module: ...
