"""Adam-mini (arXiv 2406.16793): one second moment per block of the Hessian instead of one per weight.

    W <- (1 - lr wd) W;   M <- b1 M + (1 - b1) G;   v_k <- b2 v_k + (1 - b2) mean over block k of G^2
    W_k <- W_k - lr / (1 - b1^t) * M_k / (sqrt(v_k / (1 - b2^t)) + eps)

    role of W (m, n)                                                                  blocks
    any other tensor of two dimensions: value, output, MLP, embedding, head           m, its rows (one output or token each)
    "headH": query and key                                                            m / H, the H rows of one attention head
    "columns": GPT-2's transposed Conv1D                                              n, its columns (one output each)
    "norm": gain and shift of a normalization layer                                   1
    any other vector or number: biases                                                numel, which is Adam

State mn + blocks, half of Adam's. Departures from the reference package: roles come from module types and from the model's
config, names only tell query and key from value; the head size is the config's (the package takes dim^2 / n_heads weights, which
fails where head size times heads is not dim), and a query that does not divide into heads goes by rows; an unknown weight goes
by rows, not as one block, and an unknown vector gets Adam; Conv1D goes by outputs; state is float32 for bfloat16 weights. A
Conv1D that holds query, key and value together goes by outputs, which is finer than heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..registry import register
from .base import OptimizerConfig, Slots, kept_dtype
from .plain import PlainOptimizer

_QUERY_KEY = {"q_proj", "k_proj", "query", "key", "wq", "wk", "q_lin", "k_lin"}


class AdamMini(OptimizerConfig):
    """Options of Adam-mini."""


@register("optimizer", "adam_mini", config=AdamMini, title="Adam-mini", paper="2406.16793",
          summary="Adam with one second moment per output, head or layer norm: half the state",
          bibtex="@inproceedings{zhang2025adammini, title={Adam-mini: Use Fewer Learning Rates To Gain More}, author={Zhang, "
                 "Yushun and Chen, Congliang and Li, Ziniu and Ding, Tian and Wu, Chenwei and Kingma, Diederik P. and Ye, Yinyu "
                 "and Luo, Zhi-Quan and Sun, Ruoyu}, booktitle={ICLR}, year={2025}}",
          projects=False, fused_capable=True, reads="gradient")
class AdamMiniOptimizer(PlainOptimizer):
    """Adam-mini; pass the model itself, for bare parameters know no heads and no norms."""

    @classmethod
    def split_groups(cls, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        roles = _roles(model)
        split: dict[tuple[int, str], list[Tensor]] = {}
        for number, group in enumerate(groups):
            for p in group["params"]:
                split.setdefault((number, roles.get(p, group["role"])), []).append(p)
        return [{**groups[number], "role": role, "params": params} for (number, role), params in split.items()]

    @classmethod
    def slots(cls, config: AdamMini, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        kept = kept_dtype(dtype, config)
        if role == "norm":
            blocks: tuple[int, ...] = ()
        elif len(shape) < 2:
            blocks = shape
        else:
            blocks = (shape[-1] if role == "columns" else shape[0] // _rows_per_block(role),)
        return {"exp_avg": (shape, kept), "exp_avg_sq": (blocks, kept)}

    def move(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        b1, b2 = self.config.betas
        momentum = state["exp_avg"].lerp_(grad, 1.0 - b1)
        blocks, updated = _as_blocks(grad, group["role"]), _as_blocks(momentum, group["role"])
        mean = blocks.square() if blocks.ndim < 2 else torch.linalg.vector_norm(blocks, dim=1).square_().div_(blocks.shape[1])
        second = state["exp_avg_sq"]
        second.mul_(b2).add_(mean.view(second.shape), alpha=1.0 - b2)
        rate = second.div(1.0 - b2 ** step).sqrt_().add_(self.config.eps).reciprocal_().mul_(group["lr"] / (1.0 - b1 ** step))
        rate = rate.view(mean.shape) if mean.ndim == blocks.ndim else rate.view(-1, 1)
        _as_blocks(weight, group["role"]).addcmul_(updated, rate, value=-1.0)


def _rows_per_block(role: str) -> int:
    return int(role.removeprefix("head")) if role.startswith("head") else 1


def _as_blocks(x: Tensor, role: str) -> Tensor:
    """A view (blocks, weights of a block); a tensor below two dimensions that goes weight by weight stays as it is."""
    if role == "norm":
        return x.view(1, -1)
    if x.ndim < 2:
        return x
    return x.flatten(0, -2).T if role == "columns" else x.view(x.shape[0] // _rows_per_block(role), -1)


def _roles(model: nn.Module) -> dict[Tensor, str]:
    head = _head_size(model)
    roles: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for key, p in module.named_parameters(recurse=False):
            if p.ndim < 2:
                if any("Norm" in kind for kind in kinds):
                    roles[p] = "norm"
            elif "Conv1D" in kinds:
                roles[p] = "columns"
            elif name.rpartition(".")[2] in _QUERY_KEY and key == "weight" and head > 1 and p.shape[0] % head == 0:
                roles[p] = f"head{head}"
    return roles


def _head_size(model: nn.Module) -> int:
    """Rows of a query weight that make one attention head; 0 if the model's config does not say."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    return getattr(config, "head_dim", None) or (width // heads if heads and width else 0)
