"""MixLoRA (arXiv 2404.15159): the feed-forward net as a mixture of experts that are LoRAs over its frozen maps.

    p = softmax(R h)                       (E,)  router R (E, d) trained, in fp32; the k largest p, scaled to sum 1, are w
    FFN_e(h) = W~_down,e (act(W~_gate,e h) * W~_up,e h)      W~_m,e = W_m + s B_m,e A_m,e,   s = alpha / r (rsLoRA: alpha / sqrt r)
    y = sum_{e in top k} w_e FFN_e(h)

    loss += c E sum_{slot, e} f_{slot,e} P_e       f: share of the tokens whose slot-th choice is e; P: mean of p

with f and P over the tokens of all nets of the model together, padding left out (the official loss: k where tokens are spread
evenly, E where all go to one expert). Since layers are pooled a single layer may collapse unseen: `load` of each net's adapter
keeps the share of each expert in the last training forward. Attention maps get an ordinary LoRA of the same r, alpha and
dropout (`attention`).

Start: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, R ~ N(0, router_std^2): the experts are all the base's net and w sums to 1, so y
is unchanged. Trained: per net E (sum_maps r (in + out) + d), and r (in + out) per attention map. Nothing can be merged: which
expert acts depends on the token. With top_k 1 the only weight is 1, so the router learns from the auxiliary loss alone.

Cost: gate and up are multiplied once for all tokens, down once for k times as many (block_scope.py). Pairs (token, choice) are
sorted by expert, and each expert's LoRA runs on its own segment, k T tokens in all; the sizes of the segments come to the host
once a net. While planning the segments are of equal size.

A model that has experts of its own (Mixtral, Qwen-MoE): its router stays what it is, and each of its experts is a feed-forward
net like any other, so each gets a router and E LoRA experts of its own, which see the tokens that the model's router sends
there. One set of LoRA experts over the whole mixture would need each of them to change all the model's experts: their weights
differ, so there is no shared map to put a LoRA on. The count above holds per expert of the model; a small num_experts is
called for.

Differs from the official code: the auxiliary loss is differentiable under activation checkpointing (a recomputed forward adds
nothing); jitter is left out, as it changes the hidden states in place also at inference; dropout may be 0. Not here: the
variants of the training code (top-p routing has a number of copies that depends on values; switch routing drops tokens, so that
a row would depend on its batch), DoRA experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.arithmetic import linear
from ..modeling.protocols import has_values
from ..modeling.sites import GROUPS, Site, all_sites
from ..modeling.state import StateHolder
from ..registry import MethodConfig, register
from .attach import check_exclusive, place
from .base import SAVED, TOKENS, TokenChoice
from .block_scope import BlockAdapter, Copies, FeedForward
from .graft import Graft, site_generator
from .lora import LoRA, LoRAAdapter


class MixLoRA(MethodConfig):
    """Options of `mixlora`; r, alpha, dropout and layers_to_transform as in PEFT."""

    num_experts: int = Field(8, ge=1, description="E, LoRA experts per feed-forward net")
    top_k: int = Field(2, ge=1, description="k, experts per token")
    r: int = Field(16, ge=1)
    alpha: float | None = Field(32.0, description="scale numerator; null: r, so s = 1")
    dropout: float = Field(0.05, ge=0.0, lt=1.0)
    use_rslora: bool = False
    router_std: float = Field(0.02, ge=0.0, description="of the router's start")
    aux_coefficient: float = Field(1e-3, ge=0.0, description="c, of the load-balancing loss")
    attention: bool = Field(True, description="ordinary LoRA on the attention maps too")
    layers_to_transform: list[int] | None = None
    modules_to_save: list[str] = Field([], description=SAVED)
    trainable_tokens: TokenChoice = Field([], description=TOKENS)

    @model_validator(mode="after")
    def _choices(self):
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} of {self.num_experts} experts: choose at most as many as there are")
        return self


class Balance(nn.Module):
    """What the routers of one graft did in this forward: chosen (k, E) tokens by choice, probability (E,), tokens. Nothing is
    stored."""

    def __init__(self):
        super().__init__()
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict) -> Balance:
        return Balance()  # the sums hang on a graph, which no copy can have

    def add(self, *sums: Tensor) -> None:
        self.sums = sums if self.sums is None else tuple(a + b.to(a.device) for a, b in zip(self.sums, sums))

    def take(self) -> Tensor | None:
        """The auxiliary loss, once; None where nothing was routed."""
        if self.sums is None:
            return None
        (chosen, probability, tokens), self.sums = self.sums, None
        return probability.shape[0] * (chosen * probability).sum() / tokens.clamp(min=1).square()


class ExpertMaps(nn.Module):
    """E low-rank pairs over one shared map."""

    def __init__(self, site: Site, experts: int, r: int, generator: torch.Generator):
        super().__init__()
        bound = 1.0 / math.sqrt(site.in_features)
        self.name, self.out_features = site.name, site.out_features
        self.A = nn.Parameter(torch.empty(experts, r, site.in_features).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(experts, site.out_features, r))

    def forward(self, x: Tensor, sizes: list[int], scale: float) -> Tensor:
        """s B_e A_e x for x (M, in), sorted by expert -> (M, out)."""
        parts = zip(x.split(sizes), self.A.unbind(), self.B.unbind())
        changes = [linear(linear(part, A.to(x.dtype)) * scale, B.to(x.dtype)) for part, A, B in parts if part.shape[0]]
        return torch.cat(changes) if changes else x.new_zeros(0, self.out_features)


@register("adapter", "mixlora", config=MixLoRA, paper="2404.15159",
          title="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
          summary="the feed-forward net as a mixture of LoRA experts with a trained router",
          bibtex="@article{li2024mixlora, title={MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of "
                 "Experts}, author={Li, Dengchun and Ma, Yingzi and Wang, Naizheng and Ye, Zhengmao and Cheng, Zhiyuan and Tang, "
                 "Yinghao and Zhang, Yan and Duan, Lei and Zuo, Jie and Yang, Cal and Tang, Mingjie}, journal={arXiv preprint "
                 "arXiv:2404.15159}, year={2024}}")
class MixLoRAAdapter(BlockAdapter):
    """The experts of one net. `load` (E,): share of each expert among the choices of the last training forward."""

    def __init__(self, site: FeedForward, config: MixLoRA, *, shared: Balance, generator):
        super().__init__(site, config, shared=None, generator=generator)
        for each in site.maps.values():
            if config.r > (most := min(each.in_features, each.out_features)):
                raise UsageError(f"mixlora: rank {config.r} is larger than '{each.name}' ({each.out_features} x {each.in_features})",
                                 remedy=f"choose r <= {most}")
        self.r, self.k, self.dropout, self.coefficient = config.r, config.top_k, config.dropout, config.aux_coefficient
        self.scale = (config.r if config.alpha is None else config.alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.__dict__["balance"] = shared  # not a child: all nets of the graft share it
        self.load: Tensor | None = None
        self.router = nn.Parameter(torch.randn(config.num_experts, site.in_features, generator=generator) * config.router_std)
        self.experts = nn.ModuleDict({role: ExpertMaps(each, config.num_experts, config.r, generator)
                                      for role, each in site.maps.items()})

    @classmethod
    def make_shared(cls, sites, config, seed):
        return Balance()

    @classmethod
    def parameter_count(cls, site: FeedForward, config: MixLoRA) -> int:
        """Of one net; an attention map has r (in + out) more."""
        each = config.r * sum(s.in_features + s.out_features for s in site.maps.values())
        return config.num_experts * (each + site.in_features)

    @classmethod
    def attach_to(cls, graft: Graft) -> None:
        """The nets' experts, and the LoRAs of the attention."""
        super().attach_to(graft)
        if not graft.config.attention:
            return
        layers = graft.config.layers_to_transform
        sites = [s for s in all_sites(graft.model) if s.role in GROUPS["attention"] and (layers is None or s.layer in layers)]
        if not sites:
            raise UsageError(f"{type(graft.model).__name__} has no attention maps that are known (q, k, v, o)",
                             remedy="attention: false")
        check_exclusive(graft, sites)
        lora = LoRA(r=graft.config.r, alpha=graft.config.alpha, dropout=graft.config.dropout, use_rslora=graft.config.use_rslora)
        for site in sites:
            site.model = graft.model
            place(graft, site, LoRAAdapter(site, lora, shared=None, generator=site_generator(graft.seed, site.name)))

    # -- a forward -------------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        self.balance.sums = None

    def route(self, x: Tensor, noise: StateHolder, real: Callable[[], Tensor | None]) -> Copies:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.to(wide), self.router.to(wide)).softmax(-1)
        top, chosen = p.topk(self.k, -1)  # (T, k)
        hits = chosen.unsqueeze(-1) == torch.arange(p.shape[1], device=p.device)  # (T, k, E)
        if self.training:
            self._count(p, hits, real(), noise.current.recomputing)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        if has_values(flat):
            sizes = hits.sum((0, 1)).tolist()
        else:
            share, more = divmod(flat.shape[0], p.shape[1])
            sizes = [share + (e < more) for e in range(p.shape[1])]
        return Copies(order // self.k, sizes, (top / top.sum(-1, keepdim=True), order.argsort()))

    def _count(self, p: Tensor, hits: Tensor, real: Tensor | None, again: bool) -> None:
        """again: a recomputation, which has to save the same tensors for the backward pass but counts nothing."""
        keep = p.new_ones(p.shape[0]) if real is None else real.to(p.dtype)
        probability = (p * keep[:, None]).sum(0)
        if again:
            return
        chosen, tokens = (hits * keep[:, None, None]).sum(0), keep.sum()
        self.load = chosen.sum(0) / (self.k * tokens.clamp(min=1))
        if self.coefficient:
            self.balance.add(chosen, probability, tokens)

    def change(self, role: str, x: Tensor, copies: Copies, noise: StateHolder) -> Tensor:
        maps = self.experts[role]
        if self.dropout and self.training and torch.is_grad_enabled():
            x = noise.dropout(x, self.dropout, maps.name)
        return maps(x, copies.sizes, self.scale)

    def combine(self, y: Tensor, copies: Copies) -> Tensor:
        weights, place_of = copies.rest  # (T, k); (T k,) where each pair was sorted to
        by_token = y.index_select(0, place_of).view(*weights.shape, y.shape[-1])
        return torch.bmm(weights.unsqueeze(1), by_token.to(weights.dtype)).squeeze(1).to(y.dtype)

    def auxiliary_loss(self) -> Tensor | None:
        """Of all nets of the graft, from the first one that is asked; None for the others."""
        found = self.balance.take()
        return None if found is None else self.coefficient * found
