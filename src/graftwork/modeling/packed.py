"""A dense weight once more in oneDNN's own layout, for products of few rows on a CPU.

F.linear lays the weight out anew in every call. For a weight that is long on the output side, as an output head is, that is half of
a small product: 576 to 49,152 in fp32 on AVX2 runs 1.3x as fast from the packed form at 1 row, 2.0x at 8, 1.7x at 32, 1.3x at 64 and
1.2x at 128 (docs/serving-benchmarks.md). The other products of a 135M decoder gained nothing, so only heads are packed. The packed
form takes the weight's bytes a second time; the weight stays, since embeddings that are tied to it read its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .arithmetic import WideLinear, product_dtype, use_linear

#: for how many rows the layout is chosen; others run at the same speed from it (1 to 128 were measured)
ROWS = 32


class Packed:
    """The packed form of a weight (out, in), as it was when it was packed."""

    def __init__(self, weight: Tensor):
        self.values = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.dtype, self.seen = weight.dtype, self._state(weight)

    @staticmethod
    def _state(weight: Tensor) -> tuple[int, int]:
        return weight.data_ptr(), weight._version

    def serves(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it gives x W^T: not in training, and not when the weight was written since."""
        return x.dtype == self.dtype and not torch.is_grad_enabled() and self._state(weight) == self.seen

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.values, bias, "none", [], "")


def pack_head(model: nn.Module) -> Callable[[], None]:
    """Pack the weight of a model's output head; the function gives it back as it was. Raises UsageError where that is not possible."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise UsageError("only a dense output head on a CPU can be packed", remedy="leave the option out")
    if product_dtype(weight.dtype, weight.device) != weight.dtype or weight.dtype == torch.float64:
        raise UsageError(f"this processor has no packed products in {str(weight.dtype).removeprefix('torch.')}",
                         remedy="load the model in fp32 (--dtype fp32), or leave the option out")
    plain = type(head) if type(head) is nn.Linear else None
    weight.graft_packed = Packed(weight)
    if plain is not None:
        use_linear(head)

    def restore() -> None:
        weight.__dict__.pop("graft_packed", None)
        if plain is not None and type(head).__bases__[0] is WideLinear:  # nothing was attached to it meanwhile
            head.__class__ = plain

    return restore
