"""The common ground of all adapter formats: a graft as low-rank changes of whole modules, on the pristine base.

Slices of a fused projection become rows of the fused map: [B_q; 0; B_v-part ...] with the ranks side by side. A graft that
was trained on an edited storage (QPiSSA) takes its frozen pair along, [B | B0], [A; -A0], since other tools hold the
pristine weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.graft import Graft
from ..adapters.lora import LoRAAdapter
from ..errors import IncompatibleError, UsageError
from ..modeling.experts import expert_count


@dataclass
class LowRank:
    """A change scale * B A of one map: A (r, in), B (out, r), fp32 on the CPU."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def folded(self, rank: int | None = None) -> LowRank:
        """The same change with scale 1, padded with zeros to `rank`."""
        more = 0 if rank is None else rank - self.r
        B = self.B if self.scale == 1.0 else self.B * self.scale
        return LowRank(F.pad(self.A, (0, 0, 0, more)).contiguous(), F.pad(B, (0, more)).contiguous())


@dataclass
class Factors:
    """Low-rank changes by module, expert maps by (module, attribute) with one entry per expert (None: no change), changes
    of biases by module (an expert's by its site), and the relative Frobenius error of the whole (0 where everything is exact)."""

    modules: dict[str, LowRank] = field(default_factory=dict)
    experts: dict[tuple[str, str], list[LowRank | None]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    error: float = 0.0

    def all(self) -> list[LowRank]:
        return [*self.modules.values(), *(p for pairs in self.experts.values() for p in pairs if p is not None)]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((p.r for p in self.all()), default=1)


def check_exportable(graft: Graft) -> None:
    """Raises IncompatibleError for a graft that is no change of weights, UsageError for one that is merged."""
    if graft.info.traits["scope"] != "site" or not graft.info.traits["mergeable"]:
        raise IncompatibleError(f"'{graft.method}' is no change of weights: this format does not hold it",
                                remedy="serve it with graftwork")
    if graft.merged:
        raise UsageError(f"graft '{graft.name}' is merged", remedy="graft.unmerge() first")


@torch.no_grad()
def whole_modules(graft: Graft) -> dict[str, dict[str, Tensor]]:
    """{module: {weight, bias}} of the modules that a graft replaces, as they act: between the base's and the trained ones where the
    graft has a weight other than 1."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in graft.saved_modules.items():
        product = graft.model.get_submodule(name)._modules["graft"].slot("whole").frozen
        old = {"weight": product.dense(), "bias": product.bias}
        values = {key: value.detach() for key, value in module.named_parameters()}
        found[name] = values if graft.weight == 1.0 else {
            key: old[key].float() + graft.weight * (value - old[key].float()) for key, value in values.items()}
    return found


def token_rows(graft: Graft) -> dict[str, Tensor]:
    """{module: rows (k, d)} of the tokens that a graft trains, as they act, on the CPU."""
    return {name: tokens.effective(graft.weight).detach().cpu() for name, tokens in graft.trainable_tokens.items()}


@torch.no_grad()
def lora_factors(graft: Graft, rank: int | None = None) -> Factors:
    """Every change of a graft as LowRank. rank: bound of the rank of a site; the truncated SVD is taken where it binds, and
    for methods that are not low-rank. Raises UsageError when such a method comes without a rank."""
    check_exportable(graft)
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} is not a rank", remedy="choose 1 or more")
    low_rank = graft.info.traits["low_rank"]
    if not low_rank and rank is None:
        raise UsageError(f"'{graft.method}' is not low-rank: as a LoRA it can only be approximated",
                         remedy="name the rank of the approximation (--rank 16); its error is reported")
    pairs, error = graft.to_lora(None if low_rank else rank)
    found = Factors(error=error)
    lost = total = 0.0
    slices: dict[str, list[tuple[slice, LowRank]]] = {}
    for name, adapter in graft.adapters.items():
        site = graft.sites[name]
        B, A = (t.detach().cpu() for t in pairs[name])
        pair = LowRank(A, B)
        if isinstance(adapter, LoRAAdapter) and adapter.lora_A0 is None:
            own_A, own_B = adapter.lora_A.detach().float().cpu(), adapter.lora_B.detach().float().cpu()
            pair = LowRank(own_A, own_B, adapter.scale * graft.weight)
        elif getattr(adapter, "pair_in_storage", False):
            B0, A0 = (t.detach().float().cpu() for t in adapter.base_edit())
            pair = LowRank(torch.cat([A, -A0]), torch.cat([B, B0], 1))
        if low_rank and rank is not None:
            pair, cut, whole = truncated(pair, rank)
            lost, total = lost + cut, total + whole
        bias = adapter.delta_bias()
        if bias is not None:
            full = torch.zeros(site.product.whole.out_features if site.rows is not None else site.out_features)
            full[site.rows or slice(None)] = bias.detach().float().cpu() * graft.weight
            place = site.module_name if site.expert is None else name
            found.biases[place] = found.biases.get(place, 0) + full
        if site.expert is not None:
            kept = found.experts.setdefault((site.module_name, site.attribute), [None] * expert_count(site.module))
            kept[site.expert] = pair
        elif site.rows is not None:
            slices.setdefault(site.module_name, []).append((site.rows, pair.folded()))
        else:
            found.modules[name] = pair
    for module, parts in slices.items():
        out = graft.model.get_submodule(module)._modules["graft"].slot("whole").frozen.out_features
        found.modules[module] = LowRank(
            torch.cat([p.A for _, p in parts]),
            torch.cat([F.pad(p.B, (0, 0, rows.start, out - rows.stop)) for rows, p in parts], 1).contiguous())
    if low_rank and rank is not None:
        found.error = (lost / total) ** 0.5 if total else 0.0
    return found


def truncated(pair: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """(best pair of at most `rank`, what it loses, its whole), the last two as squared Frobenius norms; through the QR of
    both factors, so nothing of size (out, in) is made. A pair whose rank is small enough is returned as it is."""
    if pair.r <= rank:
        return pair, 0.0, float((pair.scale * pair.B @ pair.A).square().sum())
    Qb, Rb = torch.linalg.qr(pair.B)
    Qa, Ra = torch.linalg.qr(pair.A.T)
    U, S, Vh = torch.linalg.svd(pair.scale * Rb @ Ra.T)
    root = S[:rank].sqrt()
    smaller = LowRank((root[:, None] * (Vh[:rank] @ Qa.T)).contiguous(), (Qb @ (U[:, :rank] * root)).contiguous())
    return smaller, float(S[rank:].square().sum()), float(S.square().sum())


def base_name(graft: Graft) -> str | None:
    """The reference under which the base is known: a packaged name, a folder, a Hub id; None for a model without files."""
    source = getattr(graft.model, "graft_source", None)
    return getattr(source, "ref", None) or getattr(getattr(graft.model, "config", None), "_name_or_path", None) or None
