"""Chosen rows of a model's embedding that a graft trains beside its adapters (PEFT's `trainable_token_indices`).

    E'(t) = R_t for the named tokens t, E(t) for all others                 R (k, d), fp32; at the start R_t = E_t
    z'_t  = z_t + (R_t - E_t) . h   in an output head that shares the embedding's weight, or is named itself

Trained: k d numbers, and only these are saved. Not a method of its own: it rides on one. The tokens are ids or strings of the
tokenizer, as a list (rows of the input embedding) or by module ({embed_tokens: [...], lm_head: [...]}). As in PEFT, a tied head
follows the input embedding unless it is named with other tokens; an untied head is trained only where it is named.

Differs from PEFT: R is kept in fp32 and the head adds the change (R - E) h to its product, so an update that bf16 would round away
still counts; one batch may mix rows of several grafts; weight decay is off, since it would pull a row to zero and not to its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraftworkError, IncompatibleError, UsageError, nearest
from ..modeling.arithmetic import linear
from ..modeling.protocols import has_values, product_of
from .base import Adapter, TokenChoice, as_rows
from .slot import Slot, graft_point

if TYPE_CHECKING:
    from .graft import Graft


@dataclass
class TokenBank:
    """Rows of K grafts: ids (K, k) ascending, padded with a number that is no id; rows and origin (K, k, d) in fp32."""

    ids: Tensor
    rows: Tensor
    origin: Tensor


class TokenRows(Adapter):
    """The rows of one embedding or head. `modules_using`: names of all modules that use them. `ids` and `origin` (the frozen
    model's own rows) are known from the config and the base, so they are not saved."""

    method = "trainable_tokens"

    def __init__(self, site, config, *, shared, generator, ids: Sequence[int] = (), weight: Tensor | None = None):
        super().__init__(site, config, shared=shared, generator=generator)
        self.modules_using: tuple[str, ...] = (site.name,)
        index = torch.tensor(list(ids), dtype=torch.int64, device=weight.device)
        start = weight.detach().index_select(0, index).float()
        self.ids = nn.Parameter(index, requires_grad=False)
        self.origin = nn.Parameter(start, requires_grad=False)
        self.rows = nn.Parameter(start.clone())

    def change(self) -> Tensor:
        """R - E (k, d), fp32."""
        return self.rows - self.origin

    def effective(self, weight: float = 1.0) -> Tensor:
        """The rows (k, d) of a graft whose change is multiplied by `weight`."""
        return self.rows if weight == 1.0 else self.origin + weight * self.change()

    def moved(self, live: Tensor, weight: float = 1.0) -> Tensor:
        """Rows (k, d) of a matrix that may hold other changes already, moved by this one; fp32."""
        live = live.float()
        return self.effective(weight) if torch.equal(live, self.origin) else live + weight * self.change()

    def parameter_groups(self):
        return [{"params": [p for p in (self.rows,) if p.requires_grad], "lr_scale": 1.0, "weight_decay": 0.0}]

    def artifact_state(self):
        return {"rows": self.rows}

    def load_artifact_state(self, state):
        super().load_artifact_state({**state, "ids": self.ids.detach(), "origin": self.origin.detach()})

    @classmethod
    def stack(cls, adapters, dtype):
        most = max(a.ids.shape[0] for a in adapters)

        def padded(rows: Tensor) -> Tensor:
            return F.pad(rows, (0, 0, 0, most - rows.shape[0]))

        return TokenBank(torch.stack([F.pad(a.ids, (0, most - a.ids.shape[0]), value=2**62) for a in adapters]),
                         torch.stack([padded(a.rows) for a in adapters]), torch.stack([padded(a.origin) for a in adapters]))


class TokenHead(Adapter):
    """The same rows in an output head: logits of the named tokens move by (R - E) h."""

    method = "trainable_tokens"

    def __init__(self, tokens: TokenRows, site):
        super().__init__(site, None, shared=None, generator=None)
        self.__dict__["tokens"] = tokens  # no child: its tensors belong to the embedding

    def borrowed(self):
        return self.tokens.rows, self.tokens.origin

    def moved_rows(self):
        return self.tokens.ids, self.tokens.change()

    def _columns(self, x: Tensor) -> Tensor:
        return linear(x, self.tokens.change().to(x.dtype))

    def forward(self, x, base):
        y = base(x)
        return y.index_add(-1, self.tokens.ids, self._columns(x).to(y.dtype))

    def delta(self, x, base):
        return x.new_zeros(*x.shape[:-1], self.out_features).index_add_(-1, self.tokens.ids, self._columns(x))

    def delta_weight(self, base):
        zeros = self.tokens.origin.new_zeros(self.out_features, self.in_features)
        return zeros.index_copy(0, self.tokens.ids, self.tokens.change())

    @classmethod
    def stack(cls, adapters, dtype):
        bank = TokenRows.stack([a.tokens for a in adapters], dtype)
        width = adapters[0].out_features
        return torch.where(bank.ids < width, bank.ids, 0), (bank.rows - bank.origin).to(dtype), width

    @classmethod
    def forward_rows(cls, bank, index, x, base):
        ids, change, width = bank
        flat = as_rows(x)
        columns = torch.bmm(flat, change.index_select(0, index).transpose(1, 2).to(flat.dtype))
        places = ids.index_select(0, index).unsqueeze(1).expand(columns.shape)
        return flat.new_zeros(*flat.shape[:-1], width).scatter_add_(-1, places, columns).reshape(*x.shape[:-1], width)


class Lookup:
    """An embedding as its own class computes it (plain, scaled, normed), with the table's vectors or with others."""

    def __init__(self, module: nn.Embedding):
        self.module = module

    def __call__(self, ids: Tensor) -> Tensor:
        return self._class().forward(self.module, ids)

    def of(self, vectors: Tensor) -> Tensor:
        """What the module answers where its table holds these vectors (..., d)."""
        plain, vectors = self._class(), vectors.to(self.module.weight.dtype)
        if plain.forward is nn.Embedding.forward:
            return vectors
        flat = vectors.reshape(-1, vectors.shape[-1])
        stand_in = plain.__new__(plain)
        stand_in.__dict__.update(self.module.__dict__)
        stand_in.__dict__.update(padding_idx=None, num_embeddings=flat.shape[0],
                                 _parameters={**self.module._parameters, "weight": flat})
        return plain.forward(stand_in, torch.arange(flat.shape[0], device=flat.device)).reshape(vectors.shape)

    def _class(self) -> type:
        kind = type(self.module)
        return getattr(kind, "plain_class", kind)


class TokenSlot(Slot):
    """The rows of all grafts at one embedding."""

    frozen: Lookup

    def plain(self, x: Tensor) -> Tensor:
        """Token ids (...) -> vectors (..., d), with whatever grafts the state calls for."""
        state, y = self.holder.current, self.frozen(x)
        if state.rows is not None:
            return self._of_rows(x, y, state)
        grafts = self.holder.grafts
        live = [(self.entries[key], grafts[name].weight) for key, (name, _) in self.owners.items()
                if name not in state.disabled and not grafts[name].merged]
        for tokens, weight in live:
            place, hit = _find(tokens.ids, x)
            new = self.frozen.of(F.embedding(place, tokens.effective(weight)))
            if len(live) > 1:  # the changes of several grafts add up
                new = y + (new - self.frozen.of(F.embedding(place, tokens.origin)))
            y = torch.where(hit.unsqueeze(-1), new, y)
        return y

    def _of_rows(self, x: Tensor, y: Tensor, state) -> Tensor:
        if state.packed and x.shape[0] == 1 < x.shape[1]:
            return self._of_rows(x.T, y.transpose(0, 1), state).transpose(0, 1)
        index = self.holder.row_index(x)
        for group in self._groups(state, x.device):
            bank = self._bank(group, y.dtype)
            local = group.position if index is None else group.position.index_select(0, index)
            inside, flat = local.clamp(min=0), x.reshape(x.shape[0], -1)
            place, hit = _find(bank.ids.index_select(0, inside), flat)
            hit = (hit & (local >= 0).unsqueeze(1)).view(x.shape)
            weights, rows = group.weights, bank.rows
            if weights is not None:
                rows = bank.origin + (rows - bank.origin) * torch.tensor(weights, device=rows.device).view(-1, 1, 1)
            place = (place + inside.unsqueeze(1) * rows.shape[1]).view(x.shape)
            y = torch.where(hit.unsqueeze(-1), self.frozen.of(F.embedding(place, rows.flatten(0, 1))), y)
        return y


def _find(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(place of each wanted id among the ascending known ones, whether it is one of them); (k,) for any shape, or (N, k) for (N, T)."""
    place = torch.searchsorted(known, wanted.contiguous()).clamp(max=known.shape[-1] - 1)
    found = known[place] if known.dim() == 1 else known.gather(-1, place)
    return place, found == wanted


# -- attaching --------------------------------------------------------------------------------------------------------------
@dataclass
class _Place:
    """Rows to be trained: at the module of that name, and at others that share its weight."""

    name: str
    module: nn.Module
    ids: list[int]
    followers: dict[str, nn.Module] = field(default_factory=dict)


def attach_tokens(graft: Graft) -> None:
    """Give a graft the rows that its config names. Raises UsageError (names, ids) and IncompatibleError."""
    from .graft import on_device

    if not graft.config.trainable_tokens:
        return
    other = next((g.name for g in graft.holder.grafts.values() if g.merged), None)
    if other is not None:
        raise IncompatibleError(f"graft '{other}' is merged into the weights", remedy=f"unmerge or detach '{other}' first")
    for place in _places(graft):
        weight = place.module.weight
        site = SimpleNamespace(name=place.name, in_features=weight.shape[1], out_features=weight.shape[0])
        tokens = TokenRows(site, graft.config, shared=None, generator=None, ids=place.ids, weight=weight)
        tokens.modules_using = (place.name, *place.followers)
        graft.trainable_tokens[place.name] = on_device(tokens, weight.device).train(graft.model.training)
        for name, module in {place.name: place.module, **place.followers}.items():
            _put(graft, module, tokens, SimpleNamespace(**{**vars(site), "name": name}))


def _put(graft: Graft, module: nn.Module, tokens: TokenRows, site: Any) -> None:
    point = graft_point(graft.model, site.name, graft.holder)
    slot = point.slot("whole")
    embedding = isinstance(module, nn.Embedding)
    if slot is None:
        slot = TokenSlot(Lookup(module), graft.holder) if embedding else Slot(product_of(module), graft.holder)
        point.add_module("whole", slot)
    slot.put(graft.name, None, "tokens", tokens if embedding else TokenHead(tokens, site).train(tokens.training), beside=True)


def _places(graft: Graft) -> list[_Place]:
    model = graft.model
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.Linear)) and ".graft." not in f".{name}."}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    able = {n: m for n, m in modules.items() if isinstance(m, nn.Embedding) or m is head or id(m.weight) in tables}
    named = _named(model, graft.config.trainable_tokens, able)
    for name, ids in named.items():
        rows = able[name].weight.shape[0]
        wrong = [i for i in ids if not 0 <= i < rows]
        if wrong:
            raise UsageError(f"trainable_tokens: token {wrong[0]} is not one of the {rows} rows of '{name}'",
                             remedy=f"give the model rows for new tokens first: model.resize_token_embeddings({max(wrong) + 1})"
                             if max(wrong) >= rows else "token ids begin at 0")
        if name in graft.saved_modules:
            raise UsageError(f"trainable_tokens: '{name}' is trained whole already (modules_to_save)", remedy="name it in one of the two")
    places: list[_Place] = []
    followed: set[str] = set()
    for name, ids in sorted(named.items(), key=lambda item: not isinstance(able[item[0]], nn.Embedding)):
        if name in followed:
            continue
        place = _Place(name, able[name], ids)
        if isinstance(place.module, nn.Embedding):
            place.followers = {n: m for n, m in able.items() if m.weight is place.module.weight and n != name
                               and n not in graft.saved_modules and named.get(n, ids) == ids and n not in followed}
            followed |= set(place.followers)
        places.append(place)
    replacing = [n for n, a in graft.adapters.items() if a.multiplicative and n in graft.sites
                 and any(graft.sites[n].module_name in (p.name, *p.followers) for p in places)]
    if replacing:
        raise IncompatibleError(f"'{graft.method}' changes the product of '{replacing[0]}' itself, to which rows of tokens would be added",
                                remedy=f"exclude_modules: [{replacing[0]}], or trainable_tokens of the embedding alone")
    return places


def _named(model: nn.Module, choice: TokenChoice, able: dict[str, nn.Module]) -> dict[str, list[int]]:
    """{full name of a module: token ids}."""
    if not isinstance(choice, dict):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        found = next((name for name, module in able.items() if module is embedding), None)
        if found is None:
            raise UsageError(f"trainable_tokens: {type(model).__name__} does not say which module embeds its tokens",
                             remedy=f"name it, for example {{{next(iter(able), 'embed_tokens')}: [...]}}")
        return {found: choice}
    named: dict[str, list[int]] = {}
    for ending, ids in choice.items():
        found = [name for name in able if name == ending or name.endswith("." + ending)]
        if not found:
            raise UsageError(f"trainable_tokens: no embedding and no output head is named '{ending}'{nearest(ending, able)}",
                             remedy=f"candidates: {', '.join(able)}")
        named.update(dict.fromkeys(found, ids))
    return named


# -- tokens by name ---------------------------------------------------------------------------------------------------------
def with_token_ids(model: nn.Module, config: Any) -> Any:
    """The config with strings replaced by token ids, ascending. Raises UsageError for unknown and repeated tokens."""
    choice = config.trainable_tokens
    if not choice:
        return config
    reader = _Reader(model)
    made = {name: reader.ids(tokens) for name, tokens in choice.items()} if isinstance(choice, dict) else reader.ids(choice)
    return config.model_copy(update={"trainable_tokens": made})


class _Reader:
    def __init__(self, model: nn.Module):
        self.model, self.tokenizer, self.vocabulary, self.unseen = model, None, None, 0

    def ids(self, tokens: Sequence[int | str]) -> list[int]:
        if not tokens:
            raise UsageError("trainable_tokens names a module and no token of it", remedy="leave the module out, or name tokens")
        found = [self._id(token) if isinstance(token, str) else token for token in tokens]
        twice = next((token for i, token in enumerate(tokens) if found[i] in found[:i]), None)
        if twice is not None:
            raise UsageError(f"trainable_tokens: token {twice!r} is named twice", remedy="name every token once")
        return sorted(found)

    def _id(self, token: str) -> int:
        if self.vocabulary is None:
            from ..modeling.models import tokenizer_of

            try:
                self.tokenizer = tokenizer_of(self.model)
            except GraftworkError:
                self.tokenizer = None
            self.vocabulary = {} if self.tokenizer is None else self.tokenizer.get_vocab()
        if self.tokenizer is None:
            if not has_values(next(self.model.parameters())):  # planning: how many rows there are is all that counts
                self.unseen += 1
                return self.model.config.get_text_config().vocab_size - self.unseen
            raise UsageError(f"trainable_tokens: which token {token!r} is cannot be told: the model's tokenizer is not known",
                             remedy="give token ids, or set model.graft_tokenizer = tokenizer first")
        if token in self.vocabulary:
            return self.vocabulary[token]
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
            return ids[0]
        parts = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(ids)))
        raise UsageError(f"trainable_tokens: {token!r} is no token of this model's tokenizer, which reads it as {parts or 'nothing'}",
                         remedy=f"add it first (tokenizer.add_tokens([{token!r}]), model.resize_token_embeddings(len(tokenizer)), "
                                "model.graft_tokenizer = tokenizer), or name single tokens")
