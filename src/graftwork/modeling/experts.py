"""Fused 3-D expert parameters of Transformers 5 (Mixtral, Qwen-MoE, gpt-oss ...), as one linear map per expert.

An experts module keeps `gate_up_proj` (E, 2*ff, d) and `down_proj` (E, d, ff), some of them transposed and with a bias a row (gpt-oss:
(E, d, 2*ff), rows of gate and up by turns). Grafting one changes the class of the module in place to a loop over its
experts, in which every expert's two maps are sites of their own; the parameters and their state-dict keys stay.
Tokens arrive flat, (N*T, d), row-major; routed rows are followed through `state.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .protocols import ExpertProduct, Product, has_values
from .state import ForwardState

ATTRIBUTES = ("gate_up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """True for a module with fused, gated 3-D expert parameters (or the storages that replaced them) which lets its experts run one by
    one: Llama 4's and LongCat's have forwards of their own."""
    kept = [module._parameters.get(a, module._modules.get(a)) for a in ATTRIBUTES]
    fused = all((isinstance(k, nn.Parameter) and k.dim() == 3) or isinstance(k, nn.ModuleList) for k in kept)
    return fused and getattr(module, "has_gate", True) and hasattr(module, "_apply_gate")


def expert_count(module: nn.Module) -> int:
    return len(getattr(module, ATTRIBUTES[0]))


def expert_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int, Product]]:
    """(module name, module, attribute, expert, product) for every expert map of the model."""
    for name, module in model.named_modules():
        if is_experts(module):
            for attribute in ATTRIBUTES:
                for expert in range(expert_count(module)):
                    yield name, module, attribute, expert, ExpertProduct(module, attribute, expert)


def expert_map(product: Product, x: Tensor) -> Tensor:
    """What an expert's map makes of x (..., in), with its bias where it has one."""
    y, bias = product.product(x), product.bias
    return y if bias is None else y + bias.to(y.dtype)


def replace_expert(module: nn.Module, attribute: str, expert: int, stored: nn.Module) -> None:
    """Put expert `expert` of a fused parameter into a storage. The last one replaces the 3-D parameter by the list of
    storages and makes the module run expert by expert."""
    pending = module.__dict__.setdefault("_pending_experts", {}).setdefault(attribute, {})
    pending[expert] = stored
    if len(pending) == len(getattr(module, attribute)):
        delattr(module, attribute)
        setattr(module, attribute, nn.ModuleList(pending[e] for e in range(len(pending))))
        module.__dict__["_pending_experts"].pop(attribute)
        run_expert_by_expert(module)


def run_expert_by_expert(module: nn.Module) -> None:
    """Change the class of an experts module in place to the loop over its experts (idempotent)."""
    if not isinstance(module, ExpertLoop):
        module.__class__ = type(type(module).__name__, (ExpertLoop, type(module)), {"plain_class": type(module)})


def _whereabouts(state: ForwardState, token: Tensor, total: int) -> dict[str, Tensor]:
    """Row (where rows are named) and place of these tokens out of `total`, for the sites of one expert."""
    found = {"places": token if state.places is None else state.places.index_select(0, token)}
    if state.rows is not None and state.token_rows is not None:
        found["token_rows"] = state.token_rows.index_select(0, token)
    elif state.rows is not None:
        found["token_rows"] = token // (total // (len(state.rows) * state.expansion)) // state.expansion
    return found


class ExpertLoop:
    """Forward of an experts module as a loop in which each expert's map may be taken over by a graft's slot."""

    plain_class: type

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (M, d); top_k_index, top_k_weights (M, k) -> (M, d)."""
        slots = self._modules.get("graft")
        holder = slots.holder if slots is not None else None
        mask = F.one_hot(top_k_index, num_classes=expert_count(self) + 1).sum(1)  # (M, E+1)
        out = torch.zeros_like(hidden_states)
        for expert in range(expert_count(self)):
            token = self._tokens(mask[:, expert], top_k_index)
            if token.numel() == 0:
                continue
            share = (top_k_weights * (top_k_index == expert)).sum(-1)[token, None]
            x = hidden_states.index_select(0, token)
            if holder is None:
                y = self._one(expert, x, slots)
            else:
                with holder.scope(**_whereabouts(holder.current, token, hidden_states.shape[0])):
                    y = self._one(expert, x, slots)
            out.index_add_(0, token, (y * share).to(out.dtype))
        return out

    def _tokens(self, mine: Tensor, top_k_index: Tensor) -> Tensor:
        """The tokens (M_e,) of the expert to which `mine` (M,) counts them. While planning every expert has as many."""
        if has_values(mine):
            return torch.where(mine > 0)[0]
        return torch.arange(-(-top_k_index.numel() // expert_count(self)), device=mine.device)

    def _one(self, expert: int, x: Tensor, slots: nn.Module | None) -> Tensor:
        def linear(attribute: str, value: Tensor) -> Tensor:
            slot = None if slots is None else slots.slot(f"{attribute}_{expert}")
            return expert_map(ExpertProduct(self, attribute, expert), value) if slot is None else slot.run(value)

        hidden = self._apply_gate(linear("gate_up_proj", x))
        return linear("down_proj", hidden)
