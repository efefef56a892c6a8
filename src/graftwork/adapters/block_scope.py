"""Adapters of a feed-forward net: how an adapter that routes tokens gets between the maps of a net and back out of them.

    x (N, T, d)  ->  maps in (gate, up)  ->  the model's own code in between  ->  map out (down)  ->  (N, T, d)

A routed adapter makes copies of tokens, one for each expert that a token goes to. Each map in is multiplied once for all tokens;
its output is then copied in the order of the experts, (M, f), and gets their changes. What lies between the maps (activation,
product of gate and up) works token by token, so the model's own code runs on the copies. The map out is multiplied once for all
copies, and what it gives is combined to one vector a token, in the shape that x had. So nothing of a net is written down
here but the names of its maps, and the net may be a module of its own (Llama, GPT-2), a part of a layer (BERT, OPT), or one
of the experts of a mixture (Mixtral).

Rows of other grafts or of none have one copy of each token. The other adapters of the maps act as they always do: on the maps in
before the copies are made, on the map out inside `state.tokens`. Which copy belongs to whom depends on values; how many there
are does not, so planning on fake tensors counts right.

The slots of the maps hand their input to the net's `FeedForwardPoint` (`Slot.through`), a child of the map out beside its slot.
One hook on the model's body tells the adapters that a forward begins, and which of its tokens are padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..modeling.protocols import has_values
from ..modeling.sites import LAYER, Site, all_sites, role_of
from ..modeling.state import ForwardState, StateHolder, state_of
from .attach import check_exclusive, slot_of
from .base import Adapter
from .graft import Graft, on_device, site_generator
from .model_scope import ROOT
from .slot import Slot

INTO, OUT = ("gate", "up", "gate_up", "fc1"), ("down", "fc2")
SCOPE = "graft_block_scope"
PREFIX = f"{ROOT}_scope"  # of a graft that lengthens the rows


# -- the nets of a model ----------------------------------------------------------------------------------------------------
@dataclass
class FeedForward:
    """One net: `maps` {role: site}, the map out last. As a site it has the width of a token on both sides."""

    name: str
    maps: dict[str, Site]
    role: str = "ffn"

    @property
    def out(self) -> Site:
        return list(self.maps.values())[-1]

    @property
    def layer(self) -> int:
        return self.out.layer

    @property
    def in_features(self) -> int:
        return next(iter(self.maps.values())).in_features

    @property
    def out_features(self) -> int:
        return self.out.out_features


def feed_forward_nets(model: nn.Module, layers: list[int] | None = None) -> list[FeedForward]:
    """The nets of these layers (None: of all), those of a mixture's experts included. Raises UsageError when there are none."""
    families: dict[str, list[tuple[str, Site]]] = {}
    for site in all_sites(model):
        role = site.role if site.expert is None else role_of(site.attribute or "")
        if role in (*INTO, *OUT) and (layers is None or site.layer in layers):
            site.model = model
            family = f"{site.module_name}.{site.expert}" if site.expert is not None else site.name.rpartition(".")[0]
            families.setdefault(family, []).append((role, site))
    found, apart = [], {}
    for family, members in families.items():
        net = _net(family, members)
        found += [net] if net else []
        match = None if net else LAYER.search(f".{family}.")
        if match:  # the maps are in different modules of one layer
            apart.setdefault(family[: match.end() - 2], []).extend(members)
    found += [net for family, members in apart.items() if (net := _net(family, members))]
    if not found:
        where = "" if layers is None else f" in layers {', '.join(map(str, layers))}"
        raise UsageError(f"{type(model).__name__} has no feed-forward net{where} with maps that are known (gate, up, down; fc1, fc2)",
                         remedy="choose adapter: lora, which takes any linear map")
    return found


def _net(family: str, members: list[tuple[str, Site]]) -> FeedForward | None:
    """These maps as a net, or None when they are none: one map out, and maps in of one width with its number of channels."""
    maps = {role: site for role, site in sorted(members, key=lambda m: m[0] in OUT)}
    into, out = [maps[r] for r in maps if r in INTO], [maps[r] for r in maps if r in OUT]
    if len(maps) != len(members) or len(out) != 1 or not into:
        return None
    channels = out[0].in_features
    same = all(s.in_features == into[0].in_features and s.out_features in (channels, 2 * channels) for s in into)
    return FeedForward(f"{family}.ffn", maps) if same else None


# -- adapters ---------------------------------------------------------------------------------------------------------------
@dataclass
class Copies:
    """How an adapter copies T tokens. token (M,) int64: the token of each copy; sizes: consecutive copies with one expert;
    rest: what the adapter needs to combine them."""

    token: Tensor
    sizes: list[int]
    rest: Any = None


class BlockAdapter(Adapter):
    """Base of adapters of a feed-forward net. A method overrides `route`, `change` and `combine`."""

    scope: ClassVar[str] = "block"

    def begin(self) -> None:
        """A forward of the model begins."""

    def route(self, x: Tensor, noise: StateHolder, real: Callable[[], Tensor | None]) -> Copies:
        """The copies of tokens x (T, d). real(): which of them are no padding (T,) bool, None: all."""
        raise NotImplementedError

    def change(self, role: str, x: Tensor, copies: Copies, noise: StateHolder) -> Tensor:
        """Change of a map's output: copies x (M, in) -> (M, out)."""
        raise NotImplementedError

    def combine(self, y: Tensor, copies: Copies) -> Tensor:
        """Outputs of the copies (M, d) -> (T, d)."""
        raise NotImplementedError

    @classmethod
    def attach_to(cls, graft: Graft) -> None:
        """One adapter for each net of the model, named as the net."""
        nets = feed_forward_nets(graft.model, graft.config.layers_to_transform)
        check_exclusive(graft, [site for net in nets for site in net.maps.values()])
        shared = cls.make_shared(nets, graft.config, graft.seed)
        scope = BlockScope.of(graft.model)
        for net in nets:
            adapter = cls(net, graft.config, shared=shared, generator=site_generator(graft.seed, net.name))
            scope.put(graft, net, adapter)

    @classmethod
    def on_detach(cls, graft: Graft) -> None:
        scope = graft.model.__dict__.get(SCOPE)
        if scope is not None:
            scope.drop(graft.name)


# -- a forward --------------------------------------------------------------------------------------------------------------
@dataclass
class _Call:
    """A net between its first map in and its map out. shape: of what it was given, (..., d) without d; entries: how many parts of
    it have a row each; token (M,): the token of every copy, those without an adapter first; parts: (adapter, its copies);
    back (T,): where each token's result is, None where they are in order."""

    shape: torch.Size
    entries: int
    token: Tensor
    plain: int
    parts: list[tuple[BlockAdapter, Copies]]
    back: Tensor | None
    served: list[Slot] = field(default_factory=list)
    copied: tuple[Tensor, Tensor] | None = None

    def copies_of(self, x: Tensor) -> Tensor:
        """x (..., n) as copies (M, n); those of the last x are kept, because gate and up read the same."""
        if self.copied is None or self.copied[0] is not x:
            self.copied = x, x.reshape(-1, x.shape[-1]).index_select(0, self.token)
        return self.copied[1]

    def pieces(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """(M, ...) tensors, cut into copies without an adapter and those of each."""
        sizes = [self.plain, *(copies.token.shape[0] for _, copies in self.parts)]
        return list(zip(*(t.split(sizes) for t in tensors)))


class FeedForwardPoint(nn.Module):
    """The adapters of all grafts at one net: `entries` maps a graft's name to its adapter. Beside the slot of the map out."""

    def __init__(self, net: FeedForward, scope: BlockScope):
        super().__init__()
        self.net, self.block_scope, self.holder = net, scope, scope.holder
        self.entries = nn.ModuleDict()
        self.slots: dict[str, Slot] = {role: slot_of(scope.model, site) for role, site in net.maps.items()}
        for slot in self.slots.values():
            slot.through = self.run
        self.call: _Call | None = None

    @property
    def idle(self) -> bool:
        return not self.entries

    def drop(self, name: str) -> None:
        if name in self.entries:
            del self.entries[name]

    def close(self) -> None:
        """Give the maps back."""
        for slot in self.slots.values():
            slot.through = None

    def run(self, slot: Slot, x: Tensor) -> Tensor:
        """What a map of the net does: x (..., in) -> copies (M, out) in; copies (M, in) -> (..., out) out."""
        role = next(r for r, s in self.slots.items() if s is slot)
        if role in OUT:
            call, self.call = self.call, None
            return slot.plain(x) if call is None else self._out(call, role, slot, x)
        if self.call is None or slot in self.call.served:  # served: a forward before this one ended between the maps
            self.call = self._begin(x)
        call = self.call
        if call is None:
            return slot.plain(x)
        call.served.append(slot)
        y = slot.plain(x)
        y = y.reshape(-1, y.shape[-1]).index_select(0, call.token)
        (plain, _), *own = call.pieces(y, call.copies_of(x))
        changed = [before + adapter.change(role, inputs, copies, self.holder)
                   for (adapter, copies), (before, inputs) in zip(call.parts, own)]
        return torch.cat([plain, *changed]) if call.plain else changed[0] if len(changed) == 1 else torch.cat(changed)

    def _out(self, call: _Call, role: str, slot: Slot, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[0] != call.token.shape[0]:
            raise IncompatibleError(f"'{self.net.name}' does not work token by token between its maps", remedy="choose adapter: lora")
        state = self.holder.current
        if state.rows is None:
            y = slot.plain(z)
        else:
            entry = call.token // max(1, call.shape.numel() // call.entries)
            with self.holder.tokens(entry if state.token_rows is not None else entry // (call.entries // len(state.rows))):
                y = slot.plain(z)
        (plain, _), *own = call.pieces(y, z)
        results = [adapter.combine(before + adapter.change(role, inputs, copies, self.holder), copies)
                   for (adapter, copies), (before, inputs) in zip(call.parts, own)]
        whole = results[0] if call.back is None else torch.cat([plain, *results]).index_select(0, call.back)
        return whole.reshape(*call.shape, whole.shape[-1])

    def _begin(self, x: Tensor) -> _Call | None:
        """Routes the tokens of x (..., d); None when no adapter of this net is wanted."""
        state = self.holder.current
        active = {name: adapter for name, adapter in self.entries.items() if name not in state.disabled}
        flat, entries = x.reshape(-1, x.shape[-1]), x.shape[0]
        if state.rows is None:
            if len(active) > 1:
                raise IncompatibleError(f"grafts {', '.join(active)} all route the tokens of '{self.net.name}'",
                                        remedy="name one per row with graftwork.routing, or switch others off (graft.disabled())")
            chosen, rest = [(adapter, None) for adapter in active.values()], None
        else:
            if state.packed or (state.token_rows is not None and state.token_rows.shape[0] == flat.shape[0]):
                entries = flat.shape[0]  # each token has its row
            chosen, rest = self._by_row(flat if entries == flat.shape[0] else x, active)
        if not chosen:
            return None
        if chosen[0][1] is None:  # every token is this one adapter's
            copies = self._route(chosen[0][0], flat, None)
            return _Call(x.shape[:-1], entries, copies.token, 0, [(chosen[0][0], copies)], None)
        parts = [(adapter, self._route(adapter, flat, own)) for adapter, own in chosen]
        owned = [own for _, own in chosen]
        token = torch.cat([rest, *(own.index_select(0, copies.token) for own, (_, copies) in zip(owned, parts))])
        return _Call(x.shape[:-1], entries, token, rest.shape[0], parts, torch.cat([rest, *owned]).argsort())

    def _route(self, adapter: BlockAdapter, flat: Tensor, own: Tensor | None) -> Copies:
        x = flat if own is None else flat.index_select(0, own)
        return adapter.route(x, self.holder, lambda: self.block_scope.real(flat.shape[0], own))

    def _by_row(self, x: Tensor, active: dict[str, BlockAdapter]) -> tuple[list[tuple[BlockAdapter, Tensor | None]], Tensor | None]:
        """[(adapter, its tokens, None for all)] and the tokens without one, for the named rows."""
        state, index = self.holder.current, self.holder.row_index(x, flat=any(s.flat for s in self.slots.values()))
        wanted = [name for name in dict.fromkeys(state.rows) if name in active]
        if len(wanted) == 1 and len(set(state.rows)) == 1:
            return [(active[wanted[0]], None)], None
        if not wanted:
            return [], None
        number = [wanted.index(name) if name in active else -1 for name in state.rows]
        if state.token_rows is None:  # known on the host
            number = [number[i // (x.shape[0] // len(number))] for i in range(x.shape[0])]
            entries = {n: torch.tensor([i for i, own in enumerate(number) if own == n], dtype=torch.int64, device=x.device)
                       for n in range(-1, len(wanted))}
        elif has_values(index):
            of = torch.tensor(number, device=x.device).index_select(0, index)
            entries = {n: torch.where(of == n)[0] for n in range(-1, len(wanted))}
        else:  # planned: as many tokens for each row
            ends = [x.shape[0] * sum(own < n for own in number) // len(number) for n in range(-1, len(wanted) + 1)]
            entries = {n: torch.arange(ends[n + 1], ends[n + 2], device=x.device) for n in range(-1, len(wanted))}
        each = torch.arange(max(1, x.shape[1:-1].numel()), device=x.device)
        tokens = {n: (entry[:, None] * each.shape[0] + each).reshape(-1) for n, entry in entries.items()}
        return [(active[name], tokens[n]) for n, name in enumerate(wanted) if tokens[n].shape[0]], tokens[-1]


class BlockScope:
    """The nets of one model that carry adapters, and the hook on its body; made with the first such graft and gone with the last."""

    def __init__(self, model: nn.Module):
        self.model, self.holder = model, state_of(model)
        self.outer: list[ForwardState] = []  # of the forwards that are running
        self.points: dict[str, tuple[FeedForwardPoint, nn.Module, str]] = {}
        body = getattr(model, "base_model", model)
        self.names = [*inspect.signature(type(body).forward).parameters][1:]
        self.handles = [body.register_forward_pre_hook(self._enter, with_kwargs=True),
                        body.register_forward_hook(self._leave, always_call=True)]
        model.__dict__[SCOPE] = self

    @classmethod
    def of(cls, model: nn.Module) -> BlockScope:
        return model.__dict__.get(SCOPE) or cls(model)

    def put(self, graft: Graft, net: FeedForward, adapter: BlockAdapter) -> None:
        module = net.out.module
        on_device(adapter, net.out.product.device).train(module.training)
        if net.name not in self.points:
            point = FeedForwardPoint(net, self)
            key = f"ffn_{net.out.slot_name}"
            module._modules["graft"].add_module(key, point)
            self.points[net.name] = point, module, key
        graft.sites.update({site.name: site for site in net.maps.values()})
        self.points[net.name][0].entries[graft.name] = adapter
        graft.adapters[net.name] = adapter

    def drop(self, name: str) -> None:
        for net, (point, module, key) in list(self.points.items()):
            point.drop(name)
            if point.idle:
                point.close()
                del module._modules["graft"]._modules[key], self.points[net]
        if not self.points:
            for handle in self.handles:
                handle.remove()
            del self.model.__dict__[SCOPE]

    def _enter(self, body: nn.Module, args: tuple, kwargs: dict) -> None:
        call = {**dict(zip(self.names, args)), **kwargs}
        given, mask = call.get("input_ids"), call.get("attention_mask")
        given = call.get("inputs_embeds") if given is None else given
        usable = given is not None and isinstance(mask, Tensor) and mask.dim() == 2
        state = self.holder.current
        self.outer.append(state)
        if usable and state.real is None:  # in the state, because checkpointing takes that along to the recomputation
            self.holder.current = replace(state, real=mask[:, -given.shape[1]:].ne(0))
        if not state.recomputing:
            for point, _, _ in self.points.values():
                for adapter in point.entries.values():
                    adapter.begin()

    def _leave(self, body: nn.Module, args: tuple, output: Any) -> None:
        if self.outer:
            self.holder.current = self.outer.pop()

    def real(self, tokens: int, own: Tensor | None) -> Tensor | None:
        """(T,) bool: which tokens are no padding, of all or of `own` ones of the `tokens` that a net was given; None: all of them.

        Raises IncompatibleError where the model was given a mask of other tokens."""
        state = self.holder.current
        lengthened = any(self.model.__dict__[PREFIX].widths[-1:]) if PREFIX in self.model.__dict__ else False
        flat = None if state.real is None else state.real.reshape(-1)
        if flat is not None and state.places is not None and not lengthened:
            flat = flat.index_select(0, state.places)
        if lengthened or (flat is not None and flat.shape[0] != tokens):
            raise IncompatibleError("which tokens are padding is not known inside the model: its attention mask is for other tokens",
                                    remedy="train without a prefix graft, or set aux_coefficient: 0")
        return flat if flat is None or own is None else flat.index_select(0, own)
