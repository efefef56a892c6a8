"""Coupling: which rows and columns of a model's matrices belong to one structural unit, as index maps.

    kv_groups    a key/value head with the query heads that attend through it: rows of q, k, v and columns of o
    query_heads  rows of q and columns of o of one query head; it may change places only inside its key/value group
    channels     a hidden channel of a feed-forward net: rows of gate and up (fc1) and the column of down (fc2); per expert
    residual     a component of the residual stream: columns of everything that reads it, rows of everything that writes it,
                 norms, embeddings, head

Exchanging the units of a group in all parts at once leaves the function of the model as it is; `permute` does it, and its answer
undoes it. Only model families whose structure is known here are described (KNOWN); all others are refused. Indices are always
those of the original model. W is (out, in): rows are outputs, columns inputs, whatever the layout a module keeps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .protocols import StoredWeight, is_conv1d
from .sites import Site, all_sites

#: model types whose layers are plain attention (rotary or absolute positions) and plain feed-forward nets
KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "mixtral", "phi3", "gpt2", "bert"})
_READERS = {"q", "k", "v", "qkv", "gate", "up", "gate_up", "fc1", "head", "router"}
_WRITERS = {"o", "down", "fc2"}
_EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings"}
_NORMS = {"input_layernorm", "post_attention_layernorm", "norm", "ln_1", "ln_2", "ln_f", "LayerNorm"}
_INSIDE_HEADS = {"q_norm", "k_norm"}


@dataclass(frozen=True)
class Units:
    """`count` units of one site: `axis` rows or columns; a span (start, width) gives unit u the `width` lines from
    start + u * width."""

    axis: str
    count: int
    spans: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        return sum(width for _, width in self.spans)

    @property
    def index(self) -> Tensor:
        """Lines of each unit, (units, width)."""
        return torch.cat([_blocks(start, self.count, width) for start, width in self.spans], 1)

    def lines(self, chosen: Iterable[int]) -> list[int]:
        """Lines of these units. Plain numbers, so that they are known while a run is planned."""
        return [start + unit * width + i for unit in chosen for start, width in self.spans for i in range(width)]


@dataclass(frozen=True, eq=False)
class Part:
    """Lines of one parameter as it is kept: dimension `dim`, index (units, width) into it; `slab` the expert of a 3-D one."""

    parameter: str
    dim: int
    index: Tensor
    slab: int | None = None


@dataclass(eq=False)
class UnitGroup:
    """Units that may change places, in all parts at once, inside blocks of `block` consecutive ones."""

    kind: str
    layer: int
    units: int
    block: int
    parts: list[Part] = field(default_factory=list, repr=False)
    expert: int | None = None


@dataclass(frozen=True)
class Heads:
    """Attention of the model: query heads, key/value heads, width of a head."""

    query: int
    kv: int
    width: int

    @property
    def per_group(self) -> int:
        return self.query // self.kv


def heads_of(model: nn.Module) -> Heads:
    config = model.config
    query = config.num_attention_heads
    return Heads(query, getattr(config, "num_key_value_heads", None) or query,
                 getattr(config, "head_dim", None) or config.hidden_size // query)


def check_known(model: nn.Module) -> None:
    """Raises UsageError for a family whose structure is not described here."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise UsageError(f"the coupling of rows and columns in a model of type '{kind}' is not known",
                         remedy=f"known: {', '.join(sorted(KNOWN))}; use paca or lora, which need no structure")


def units_of(site: Site) -> Units:
    """The units that a site's role has: heads or channels. Raises UsageError for other roles, families and shapes."""
    check_known(site.model)
    heads = heads_of(site.model)
    q, kv, width = heads.query * heads.width, heads.kv * heads.width, heads.width
    role = site.role if site.expert is None else {"gate_up_proj": "gate_up", "down_proj": "down"}[site.attribute]
    wanted, count, spans = None, 0, ((0, 1),)
    if role in ("q", "o"):
        wanted, count, spans = q, heads.query, ((0, width),)
    elif role in ("k", "v"):
        wanted, count, spans = kv, heads.kv, ((0, width),)
    elif role == "qkv":
        wanted, count, spans = q + 2 * kv, heads.kv, ((0, heads.per_group * width), (q, width), (q + kv, width))
    elif role == "gate_up":
        count = site.out_features // 2
        wanted, spans = 2 * count, ((0, 1), (count, 1))
    elif role in ("gate", "up", "fc1"):
        wanted = count = site.out_features
    elif role in ("down", "fc2"):
        wanted = count = site.in_features
    axis = "columns" if role in _WRITERS else "rows"
    found = site.in_features if axis == "columns" else site.out_features
    if wanted != found or site.layer < 0:
        why = f"it has {found} {axis}, {wanted} were expected" if wanted is not None else f"its role is '{site.role}'"
        raise UsageError(f"'{site.name}' has no known heads or channels: {why}",
                         remedy="leave it out with exclude_modules, or target attention and mlp maps only")
    return Units(axis, count, spans)


def _blocks(start: int, count: int, width: int) -> Tensor:
    return torch.arange(start, start + count * width).view(count, width)


class Coupling:
    """All groups of a model. Raises UsageError where a layer is not what its family should have."""

    def __init__(self, model: nn.Module):
        check_known(model)
        self.model, self.sites = model, [_with_model(s, model) for s in all_sites(model)]
        named: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            named[id(parameter)].append(name)
        self.tied = [tuple(names) for names in named.values() if len(names) > 1]
        self.groups: list[UnitGroup] = []
        for layer in sorted({s.layer for s in self.sites} - {-1}):
            self._attention(layer)
            self._channels(layer)

    def group(self, kind: str, layer: int = -1, expert: int | None = None) -> UnitGroup:
        """One group; `residual` has layer -1. Raises UsageError when there is none."""
        if kind == "residual":
            return self._residual()
        for group in self.groups:
            if (group.kind, group.layer, group.expert) == (kind, layer, expert):
                return group
        raise UsageError(f"layer {layer} has no group '{kind}'", remedy="kinds: kv_groups, query_heads, channels, residual")

    @torch.no_grad()
    def permute(self, group: UnitGroup, order: Tensor | Sequence[int]) -> Tensor:
        """Put unit order[i] in place i, in all parts, in place; tied weights once. Returns the order that undoes it."""
        moved = [int(i) for i in order]
        blocks = [i // group.block for i in moved]
        if sorted(moved) != list(range(group.units)) or blocks != [i // group.block for i in range(group.units)]:
            raise UsageError(f"this is no order of {group.units} units inside blocks of {group.block}",
                             remedy="query heads stay in their key/value group; move whole groups with kv_groups")
        if any(name.endswith(".graft") for name, _ in self.model.named_modules()):
            raise UsageError("the model has grafts, whose indices are those of the original order", remedy="detach them first")
        done, steps = set(), []
        for part in group.parts:
            module, parameter = self._kept(part)
            key = (id(parameter), part.dim, part.slab, int(part.index[0, 0]))
            if key not in done:
                done.add(key)
                steps.append((part, parameter))
        at = torch.tensor(moved)
        for part, parameter in steps:
            kept = parameter if part.slab is None else parameter[part.slab]
            lines = torch.arange(kept.shape[part.dim])
            lines[part.index.flatten()] = part.index.index_select(0, at).flatten()
            kept.copy_(kept.index_select(part.dim, lines.to(kept.device)))
        return torch.argsort(at)

    # -- how the groups are made ---------------------------------------------------------------------------------------
    def _kept(self, part: Part) -> tuple[nn.Module, nn.Parameter]:
        owner, _, name = part.parameter.rpartition(".")
        module = self.model.get_submodule(owner)
        parameter = getattr(module, name)
        if isinstance(module, StoredWeight) or not isinstance(parameter, nn.Parameter):
            raise UsageError(f"'{part.parameter}' is kept in a quantised format, whose lines cannot be moved",
                             remedy="load the model with storage: dense")
        return module, parameter

    def _role(self, layer: int, *roles: str) -> list[Site] | None:
        """The sites of these roles in a layer, one each; None when one is missing."""
        found = [[s for s in self.sites if s.layer == layer and s.role == role] for role in roles]
        if any(len(f) > 1 for f in found):
            raise UsageError(f"layer {layer} has several maps of one role ({', '.join(s.name for f in found for s in f)})",
                             remedy="models with cross-attention are not described")
        return None if any(not f for f in found) else [f[0] for f in found]

    def _attention(self, layer: int) -> None:
        heads = heads_of(self.model)
        split, fused = self._role(layer, "q", "k", "v", "o"), self._role(layer, "qkv", "o")
        if split is None and fused is None:
            raise UsageError(f"layer {layer} has no attention with q, k, v and o", remedy="use a method that needs no structure")
        (*_, o), starts = (split or fused), (0, 0, 0)
        maps = split[:3] if split else [fused[0]] * 3
        if fused and not split:
            starts = (0, heads.query * heads.width, (heads.query + heads.kv) * heads.width)
        for site in {s.name: s for s in (*maps, o)}.values():
            units_of(site)  # shapes
        groups = UnitGroup("kv_groups", layer, heads.kv, heads.kv)
        queries = UnitGroup("query_heads", layer, heads.query, heads.per_group)
        wide = heads.per_group * heads.width
        for site, start, width in zip(maps, starts, (wide, heads.width, heads.width)):
            groups.parts += _parts(site, "rows", _blocks(start, heads.kv, width))
        groups.parts += _parts(o, "columns", _blocks(0, heads.kv, wide))
        queries.parts += _parts(maps[0], "rows", _blocks(0, heads.query, heads.width))
        queries.parts += _parts(o, "columns", _blocks(0, heads.query, heads.width))
        self.groups += [groups, queries]

    def _channels(self, layer: int) -> None:
        experts: dict[int, list[Site]] = defaultdict(list)
        for site in self.sites:
            if site.layer == layer and site.expert is not None:
                experts[site.expert].append(site)
        plain = self._role(layer, "gate", "up", "down") or self._role(layer, "fc1", "fc2") or self._role(layer, "gate_up", "down")
        if plain is None and not experts:
            raise UsageError(f"layer {layer} has no feed-forward net", remedy="use a method that needs no structure")
        for expert, sites in ([(None, plain)] if plain else []) + list(experts.items()):
            units = [units_of(site) for site in sites]
            count = units[-1].count
            if any(u.count != count for u in units):
                raise UsageError(f"the maps of the feed-forward net of layer {layer} have unequal numbers of channels",
                                 remedy="use a method that needs no structure")
            group = UnitGroup("channels", layer, count, count, expert=expert)
            for site, own in zip(sites, units):
                group.parts += _parts(site, own.axis, own.index)
            self.groups.append(group)

    def _residual(self) -> UnitGroup:
        """Every parameter of the model is either a part of it or known not to be; anything else is refused."""
        size = self.model.config.hidden_size
        group, index, told = UnitGroup("residual", -1, size, size), _blocks(0, size, 1), set()
        for site in self.sites:
            last = site.module_name.rpartition(".")[2]
            told |= {site.parameter_name, f"{site.module_name}.bias"}
            if last == "classifier":  # behind the pooler, whose output is not the stream
                continue
            if site.layer < 0 and site.role != "head":
                raise self._unplaced(site.name)
            reads = site.attribute == "gate_up_proj" if site.expert is not None else site.role in _READERS
            if not reads and site.expert is None and site.role not in _WRITERS:
                raise self._unplaced(site.name)
            group.parts += _parts(site, "columns" if reads else "rows", index)
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            owner, _, _ = name.rpartition(".")
            last = owner.rpartition(".")[2]
            if name in told or last in _INSIDE_HEADS or ".graft." in name:
                continue
            if last not in _EMBEDDINGS | _NORMS | {"gate"}:
                raise self._unplaced(name)
            group.parts.append(Part(name, 0 if last in _NORMS else 1, index))
        return group

    @staticmethod
    def _unplaced(name: str) -> UsageError:
        return UsageError(f"it is not known how '{name}' lies on the residual stream",
                          remedy="use a causal model or a plain encoder without an extra head")


def _with_model(site: Site, model: nn.Module) -> Site:
    site.model = model
    return site


def _parts(site: Site, axis: str, index: Tensor) -> list[Part]:
    dim = 0 if axis == "rows" else 1
    parts = [Part(site.parameter_name, 1 - dim if is_conv1d(site.module) else dim, index, site.expert)]
    if axis == "rows" and getattr(site.module, "bias", None) is not None and site.expert is None:
        parts.append(Part(f"{site.module_name}.bias", 0, index))
    return parts
