"""The run-time of a site: a slot holds the adapters of all grafts at one linear map and combines them per forward.

Attaching changes the class of the module instance and adds one child, `graft` (a GraftPoint); the module's weight, its
hooks and its state-dict keys stay, so tied heads, `save_pretrained` and `resize_token_embeddings` keep working. The
frozen weight is multiplied once per forward, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError
from ..modeling.calls import keep_calls, owner_of, release_calls
from ..modeling.experts import is_experts, run_expert_by_expert
from ..modeling.protocols import Base, MovedRows, Product, RowsProduct
from ..modeling.state import StateHolder
from ._triton import add_in_place, takes_triton
from .base import Adapter
from .batched import row_index

#: what rows are routed to: a graft's name, or several with their weights
Route = str | tuple[tuple[str, float], ...]


def parts_of(route: Route | None) -> tuple[tuple[str, float], ...]:
    """What a row is routed to as (name, weight) pairs; none for the bare base."""
    return () if route is None else ((route, 1.0),) if isinstance(route, str) else route


class GraftPoint(nn.Module):
    """The one child that attaching adds to a module: its slots (one, or two per expert of an experts module)."""

    def __init__(self, holder: StateHolder):
        super().__init__()
        self.holder = holder

    def slot(self, name: str) -> Slot | None:
        return self._modules.get(name)


class GraftedSite:
    """Mixed into the class of a grafted module (see `graft_point`)."""

    plain_class: type

    def forward(self, x: Tensor) -> Tensor:
        return self._modules["graft"]._modules["whole"].run(x)


_GRAFTED: dict[type, type] = {}


def graft_point(model: nn.Module, name: str, holder: StateHolder) -> GraftPoint:
    """The GraftPoint of the module called `name`; made, and the module's class changed in place, on first use."""
    module = model.get_submodule(name)
    point = module._modules.get("graft")
    if point is None:
        keep_calls(owner_of(model, name), name.rpartition(".")[2])
        plain = type(module)
        if is_experts(module):
            run_expert_by_expert(module)
        else:
            if plain not in _GRAFTED:
                _GRAFTED[plain] = type(plain.__name__, (GraftedSite, plain), {"plain_class": plain})
            module.__class__ = _GRAFTED[plain]
        point = GraftPoint(holder)
        module.add_module("graft", point)
    return point


def drop_point(model: nn.Module, name: str) -> None:
    """Remove an empty GraftPoint and give the module its own class back."""
    module = model.get_submodule(name)
    point = module._modules.get("graft")
    if point is not None and all(slot.idle for slot in point.children()):
        del module._modules["graft"]
        keeps_loop = any(isinstance(getattr(module, a, None), nn.ModuleList) for a in ("gate_up_proj", "down_proj"))
        if hasattr(type(module), "plain_class") and not keeps_loop:
            module.__class__ = type(module).plain_class
        release_calls(owner_of(model, name))


class Slot(nn.Module):
    """Adapters at one linear map. `entries` maps a key (graft name, or `name[q]` for a slice of a fused map) to an
    adapter; `owners` maps the key to (graft name, output slice or None)."""

    def __init__(self, frozen: Product, holder: StateHolder, *, flat: bool = False):
        super().__init__()
        self.frozen, self.holder = frozen, holder
        self.flat = flat  # tokens come as (N*T, in) in the order of the batch, see `flat_tokens`
        self.entries = nn.ModuleDict()
        self.owners: dict[str, tuple[str, slice | None]] = {}
        self.taps: list[Callable[[Tensor, Tensor], None]] = []
        self.through: Callable[[Slot, Tensor], Tensor] | None = None  # set by a block that runs this map its own way
        self.merged: dict[Route, Product] = {}  # the frozen map with a graft's change in it, see merged_copy.py
        self._plan: tuple | None = None
        self._banks: dict = {}

    @property
    def idle(self) -> bool:
        """True when nothing needs this slot any more."""
        return not self.entries and self.through is None

    def put(self, graft: str, rows: slice | None, part: str, adapter: Adapter, *, beside: bool = False) -> None:
        """beside: the graft may hold another adapter of the same output rows here."""
        key = f"{graft}[{part}]" if rows is not None or beside else graft
        self.entries[key] = adapter
        self.owners[key] = (graft, rows)
        self._plan, self._banks = None, {}

    def drop(self, graft: str) -> None:
        for key in [k for k, (owner, _) in self.owners.items() if owner == graft]:
            self.take(key)

    def take(self, key: str) -> None:
        """Remove one adapter by its key."""
        self.merged = {route: kept for route, kept in self.merged.items() if self.owners[key][0] not in dict(parts_of(route))}
        del self.entries[key], self.owners[key]
        self._plan, self._banks = None, {}

    def run(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), with whatever grafts the state calls for."""
        return self.plain(x) if self.through is None else self.through(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The same with the adapters of this map alone."""
        state = self.holder.current
        base = Base(self.frozen if state.merged is None else self.merged.get(state.merged, self.frozen), self.holder)
        if state.rows is None:
            y = self._all(x, base, state)
        elif state.packed and x.dim() == 3:
            y = self._by_row(x[0], base, state).unsqueeze(0)
        else:
            y = self._by_row(x, base, state)
        if self.taps and y.requires_grad:
            seen = x.detach()
            y.register_hook(lambda grad: [tap(seen, grad) for tap in self.taps] and None)
        return y

    def moved_rows(self) -> MovedRows | None:
        """What the grafts that the state calls for do, where it is nothing but a change of single rows of W. With named rows, x must
        be announced by `state.tokens`."""
        state, grafts = self.holder.current, self.holder.grafts
        if state.rows is not None and any(isinstance(row, tuple) for row in state.rows):
            return None
        called = {name for name in (grafts if state.rows is None else state.rows) if name is not None and name not in state.disabled}
        live = [(self.entries[key], name) for key, (name, _) in self.owners.items() if name in called and not grafts[name].merged]
        parts = [(adapter.moved_rows(), name) for adapter, name in live]
        if self.taps or self.through is not None or not parts or any(part is None for part, _ in parts):
            return None
        ids, change = (torch.cat(each) for each in zip(*((ids, change * grafts[name].weight) for (ids, change), name in parts)))
        if state.rows is None:
            return MovedRows(ids, change)
        member = torch.tensor([[row == name for (own, _), name in parts for _ in own] for row in state.rows], device=ids.device)
        return MovedRows(ids, change, member.index_select(0, state.token_rows))

    # -- every graft on every row --------------------------------------------------------------------------------
    def _all(self, x: Tensor, base: Base, state) -> Tensor:
        grafts = self.holder.grafts
        live = []
        for key, (name, rows) in self.owners.items():
            graft = grafts[name]
            if name not in state.disabled and not graft.merged:
                live.append((self.entries[key], graft.weight, rows))
        if not live:
            return base(x)
        if len(live) == 1 and live[0][1] == 1.0 and live[0][2] is None:
            return live[0][0](x, base)
        y = base(x)
        for adapter, weight, rows in live:
            if adapter.multiplicative:
                if rows is not None and weight == 1.0 and sum(r == rows for _, _, r in live) == 1:
                    sliced = Base(RowsProduct(self.frozen, rows))
                    y = torch.cat([y[..., : rows.start], adapter(x, sliced), y[..., rows.stop:]], -1)
                    continue
                raise IncompatibleError(
                    f"'{adapter.method}' changes the frozen product and cannot be added to other grafts at one site",
                    remedy="choose one graft per row with graftwork.routing, or disable the others")
            change = adapter.delta(x, self._part(base, rows))
            change = change if weight == 1.0 else change * weight
            y = y + change if rows is None else torch.cat(
                [y[..., : rows.start], y[..., rows] + change, y[..., rows.stop:]], -1)
        return y

    def _part(self, base: Base, rows: slice | None) -> Base:
        """What an adapter of these output rows sees of the frozen map: its own rows of W."""
        return base if rows is None else Base(RowsProduct(self.frozen, rows), self.holder)

    # -- one graft per row ------------------------------------------------------------------------------------------
    def _by_row(self, x: Tensor, base: Base, state) -> Tensor:
        index = self.holder.row_index(x, flat=self.flat)
        groups = self._groups(state, x.device)
        if not groups:
            return base(x)
        added, replaced, in_place = [], [], []
        for cls, out_rows, keys, position, selected, local, shares in groups:
            if _by_its_bank(cls) and not torch.is_grad_enabled() and takes_triton(x, bank := self._bank(cls, keys, x.dtype)):
                factors = self._factors(keys, position.clamp(min=0), shares, torch.float32)
                found = (each if index is None or each is None else each.index_select(0, index) for each in (position, factors))
                in_place.append((bank, out_rows, *found))
                continue
            if index is not None:
                local = position.index_select(0, index)
                shares = None if shares is None else shares.index_select(0, index)
                if selected is not None:
                    selected = torch.where(local >= 0)[0]
                    local = local.index_select(0, selected)
                elif state.token_rows is None:  # every row as often as any other, see `row_index`: known without asking the device
                    local.numbers = tuple(n for n in position.numbers for _ in range(x.shape[0] // len(state.rows)))
            if shares is not None and selected is not None:
                shares = shares.index_select(0, selected)
            (replaced if cls.multiplicative else added).append((cls, out_rows, keys, selected, local, shares))
        y = self._replace(x, base, replaced) if replaced else base(x)
        for bank, out_rows, of, factors in in_place:
            if not add_in_place(y, x, of, bank, outputs=out_rows, factors=factors):
                return self._by_row(x, base, state)  # from now on without them
        for cls, out_rows, keys, selected, local, shares in added:
            part = x if selected is None else x.index_select(0, selected)
            change = cls.forward_rows(self._bank(cls, keys, x.dtype), local, part, self._part(base, out_rows))
            factor = self._factors(keys, local, shares, change.dtype)
            if factor is not None:
                change = change * factor.view(-1, *[1] * (change.dim() - 1))
            if out_rows is not None:
                padded = y.new_zeros(*change.shape[:-1], y.shape[-1])
                padded[..., out_rows] = change
                change = padded
            y = y + change if selected is None else y.index_add(0, selected, change.to(y.dtype))
        return y

    def _factors(self, keys: tuple[str, ...], local: Tensor, shares: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What each row's change is multiplied by (rows,): its graft's weight and its share in a sum. None where all are 1."""
        weights = [self.holder.grafts[self.owners[key][0]].weight for key in keys]
        if shares is None and all(w == 1.0 for w in weights):
            return None
        factor = torch.tensor(weights, dtype=dtype, device=local.device).index_select(0, local)
        return factor if shares is None else factor * shares.to(dtype)

    def _groups(self, state, device: torch.device) -> list[tuple]:
        """For the named rows: [(class, output slice, keys, position (rows,) in the bank of these keys or -1, the rows that are in
        it (None: all), their positions, shares (rows,) of it or None)]. A row with a sum of grafts is in one group for each of them.
        Kept while the rows stay the same: what a bank makes of the positions is kept with these very tensors."""
        token = (state.rows, state.disabled, device, torch.is_inference_mode_enabled())
        if self._plan is not None and self._plan[0] == token:
            return self._plan[1]
        sorted_keys: dict[tuple, list[str]] = {}
        parts = [parts_of(row) for row in state.rows]
        wanted = {name for row in parts for name, _ in row if name not in state.disabled}
        for key, (name, rows) in self.owners.items():
            if name in wanted:
                bounds = None if rows is None else (rows.start, rows.stop)
                sorted_keys.setdefault((type(self.entries[key]), bounds), []).append(key)
        groups = []
        for (cls, bounds), keys in sorted_keys.items():
            place = {self.owners[key][0]: i for i, key in enumerate(keys)}
            for turn in range(max(map(len, parts))):
                numbers = [place.get(row[turn][0], -1) if turn < len(row) else -1 for row in parts]
                chosen = [i for i, number in enumerate(numbers) if number >= 0]
                if not chosen:
                    continue
                shares = [row[turn][1] if turn < len(row) else 1.0 for row in parts]
                if cls.multiplicative and any(isinstance(state.rows[i], tuple) for i in chosen):
                    raise IncompatibleError(f"'{cls.method}' changes the frozen product and cannot be part of a sum of grafts",
                                            remedy="choose it alone")
                groups.append((cls, None if bounds is None else slice(*bounds), tuple(keys), row_index(numbers, device),
                               None if len(chosen) == len(numbers) else torch.tensor(chosen, device=device),
                               row_index([numbers[i] for i in chosen], device),
                               None if all(share == 1.0 for share in shares) else torch.tensor(shares, device=device)))
        self._plan = (token, groups)
        return groups

    def _bank(self, cls: type[Adapter], keys: tuple[str, ...], dtype: torch.dtype):
        adapters = [self.entries[key] for key in keys]
        if torch.is_grad_enabled() and any(p.requires_grad for a in adapters for p in (*a.parameters(), *a.borrowed())):
            return cls.stack(adapters, dtype)
        version = (dtype, torch.is_inference_mode_enabled(), tuple(map(_version, adapters)))
        kept = self._banks.get(keys)
        if kept is None or kept[0] != version:
            self._banks = {} if len(self._banks) > 8 else self._banks
            self._banks[keys] = kept = (version, cls.stack(adapters, dtype))
        return kept[1]

    def _replace(self, x: Tensor, base: Base, groups: list[tuple]) -> Tensor:
        """Rows of multiplicative adapters get their product, all other rows the plain one: one product in all."""
        device, total = x.device, x.shape[0]
        pieces, order, sizes, parts = [], [], [], []
        taken = torch.zeros(total, dtype=torch.bool, device=device)
        for cls, out_rows, keys, selected, local, _ in groups:
            if out_rows is not None:
                raise IncompatibleError(f"'{cls.method}' on a slice of a fused projection cannot be chosen per row",
                                        remedy="target the whole projection, or attach it alone")
            chosen = torch.arange(total, device=device) if selected is None else selected
            taken = taken.index_fill(0, chosen, True)
            part = x if selected is None else x.index_select(0, selected)
            inputs = cls.rows_inputs(self._bank(cls, keys, x.dtype), local, part)
            pieces.append(inputs)
            parts.append(part)
            order.append(chosen)
            sizes.append(inputs.shape[0])
        covered = sum(o.shape[0] for o in order)
        if covered < total:
            rest = torch.argsort(taken.to(torch.int8), stable=True)[: total - covered]
            pieces.append(x.index_select(0, rest))
            order.append(rest)
            sizes.append(rest.shape[0])
        products = base.product(torch.cat(pieces)).split(sizes)
        outputs = [cls.rows_combine(self._bank(cls, keys, x.dtype), local, z, part, base)
                   for (cls, _, keys, _, local, _), z, part in zip(groups, products, parts)]
        outputs += list(products[len(groups):])
        back = torch.argsort(torch.cat(order))
        y = torch.cat(outputs).index_select(0, back)
        return y if base.bias is None else y + base.bias.to(y.dtype)


def bank_bytes(model: nn.Module) -> int:
    """Bytes of what the sites keep beside the adapters' own tensors: banks, and what these made of the rows they last saw."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return tensor_bytes([slot._banks for slot in model.modules() if isinstance(slot, Slot)], known)


def bytes_beside(model: nn.Module, pool: Tensor) -> int:
    """Bytes that the attached adapters take outside of `pool`, in which their tensors lie: those banks, tensors that a method draws from
    a seed or takes from the weights when it is loaded, and all of an adapter that was never put there."""
    base = {name: module for name, module in model.named_modules() if not any(part.startswith("graft") for part in name.split("."))}
    tensors = [t for module in base.values() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    known = {t.untyped_storage().data_ptr() for t in (*tensors, pool)}
    holder: StateHolder | None = model.__dict__.get("graft_state")
    grafts = [] if holder is None else list(holder.grafts.values())
    roots = [module for graft in grafts for _, module in graft.named_modules()]
    banks = [slot._banks for slot in model.modules() if isinstance(slot, Slot)]
    return tensor_bytes([*roots, *banks], known, {id(thing) for thing in (*base.values(), *grafts, holder)})


def tensor_bytes(things: list[Any], known: set[int], skip: set[int] = frozenset()) -> int:
    """Bytes of the tensors that these lead to, each storage once. known: data pointers of storages that do not count; skip: ids of
    objects that are not followed."""
    found: dict[int, int] = {}
    todo, seen = list(things), set(skip)
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif isinstance(thing, nn.Module) or (hasattr(thing, "__dict__") and not isinstance(thing, type) and not callable(thing)):
            todo.append(vars(thing))
    return sum(found.values())


def _by_its_bank(cls: type[Adapter]) -> bool:
    """Whether what this class adds to rows is what their bank holds, and nothing of its own."""
    return not cls.multiplicative and cls.forward_rows.__func__ is Adapter.forward_rows.__func__


def _version(adapter: Adapter) -> tuple:
    """Changes whenever a tensor that the adapter reads is replaced or written. Walks the plain dict where there are no submodules:
    this runs at every site of every decode step."""
    parameters = adapter.parameters() if adapter._modules else adapter._parameters.values()
    return tuple((id(p), p._version) for p in (*parameters, *adapter.borrowed()) if p is not None)
