"""Adapters of the whole model that put virtual tokens before the text: how a prefix gets into a decoder and out again.

For a row whose graft has m virtual tokens Z (m, d), the model is run as if m more tokens stood before its first real one:

    embeddings  [padding; Z; Emb(x)]      mask  [0.. ; 1 x m ; 1..]      positions  first + (0..m-1), then all of x's plus m

Rows without such a graft get the same width in masked positions and keep their own positions, so a row of a mixed batch
equals the row alone. Z stands directly before the text, behind left padding, which keeps sliding windows right too. The
states of the prefix are cut from the output: losses, heads and generation loops see the shapes they always saw.

The work is done by two hooks on the decoder body (which maps token ids to hidden states). When a key/value cache is
filled, its prefix is in it, and the cache is marked with the width; later calls lengthen the mask and shift positions
only. The instance of a row is its *prompt*: in training the tokens before the first trained one, known from the labels
(of the forward state, or given to the model's forward); without labels the whole input of the call that fills the cache.

A method may also set the keys and values of its virtual tokens in every layer (`keys_values`, see _prefix_fill.py).

Two uses of Transformers' `generate` differ from this: with use_cache=False it reads the growing text as a new instance at
every step, and it cannot continue a cache of an earlier call, because it counts the prefix in there as text.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache

from ..errors import IncompatibleError, UsageError
from ..modeling.caches import cache_argument
from ..modeling.protocols import has_values
from ..modeling.state import state_of
from ._prefix_fill import FILL, Fill, fill_attention, rooms
from .base import Adapter
from .graft import on_device, site_generator

ROOT = "graft_prefix"  # the model's child that holds the adapters, and the mark on a cache
REFUSED = ("token_type_ids", "cache_position", "cu_seq_lens_q", "block_sequence_ids")


@dataclass(frozen=True)
class Prompts:
    """input_ids (n, T) int64; mask (n, T) bool: the tokens of the prompt; position_ids (n, T) or None."""

    input_ids: Tensor
    mask: Tensor
    position_ids: Tensor | None = None

    def rows(self, index: Tensor | None) -> Prompts:
        """These rows only; None: all."""
        if index is None:
            return self
        return Prompts(*(None if t is None else t.index_select(0, index) for t in (self.input_ids, self.mask, self.position_ids)))


class PrefixAdapter(Adapter):
    """Base of adapters whose change is a prefix. A method overrides `width_of` and `prefix`; the one module of a graft is
    `graft.adapters["prefix"]`, in_features the width of the instance, out_features the width d of an embedding."""

    scope: ClassVar[str] = "model"
    starts_at_identity: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = True  # the prefix depends on the prompt of its row
    length: int  # virtual tokens m

    @classmethod
    def shape_of(cls, config: Any, base: Decoder) -> tuple[int, int]:
        """(in_features, out_features) of the adapter's site."""
        return cls.width_of(config, base), base.width

    @classmethod
    def width_of(cls, config: Any, base: Decoder) -> int:
        """Width of the vector that stands for the instance. Raises what loading an encoder raises."""
        raise NotImplementedError

    def start(self, base: Decoder, generator: torch.Generator) -> None:
        """Starting values that need the model (rows of its embedding, say)."""

    def prefix(self, prompts: Prompts, base: Decoder) -> Tensor:
        """Virtual tokens (n, m, d) of n prompts, in fp32."""
        raise NotImplementedError

    def keys_values(self) -> Tensor | None:
        """Keys and values (layers, 2, m, heads * head size) that stand in place of those of the virtual tokens, or None."""
        return None

    @classmethod
    def attach_to(cls, graft: Any) -> None:
        """Builds the graft's adapter and hooks the decoder. Raises IncompatibleError for models that are no causal decoders."""
        scope = PrefixScope.of(graft.model)
        width_in, width_out = cls.shape_of(graft.config, scope.base)
        site = SimpleNamespace(name="prefix", layer=-1, role="prefix", in_features=width_in, out_features=width_out)
        generator = site_generator(graft.seed, "prefix")
        adapter = cls(site, graft.config, shared=None, generator=generator)
        if cls.restarts_on_load or not graft.loading:
            adapter.start(scope.base, generator)
        graft.adapters["prefix"] = on_device(adapter, scope.base.embedding.weight.device).train(graft.model.training)
        scope.put(graft.name, adapter)

    @classmethod
    def on_detach(cls, graft: Any) -> None:
        scope = graft.model.__dict__.get(f"{ROOT}_scope")
        if scope is not None:
            scope.drop(graft.name)


class Decoder:
    """What a prefix may ask of the frozen model: embeddings, states without any graft, noise, and the tokenizer."""

    def __init__(self, model: nn.Module):
        config = model.config.get_text_config(decoder=True)
        body = model.get_decoder() if hasattr(model, "get_decoder") else None
        if body is None or getattr(model.config, "is_encoder_decoder", False) or any(
                getattr(module, "is_causal", True) is False for module in body.modules()):
            raise IncompatibleError(f"{type(model).__name__} is no causal decoder: there is no prompt to put a prefix before",
                                    remedy="choose a causal model, or adapter: lora")
        if cache_argument(model) != "past_key_values":
            raise IncompatibleError(f"{type(model).__name__} keeps its state in no key/value cache: a prefix would be put before every new "
                                    "token", remedy="choose adapter: lora")
        self.model, self.body, self.noise = model, body, state_of(model)
        self.embedding = body.get_input_embeddings()
        self.width, self.hidden_size = self.embedding.weight.shape[1], config.hidden_size
        self.names = [*inspect.signature(type(body).forward).parameters][1:]
        room = getattr(config, "max_position_embeddings", None)
        learned = [m for m in body.modules() if isinstance(m, nn.Embedding) and m is not self.embedding]
        self.room = room if room and any(room <= m.num_embeddings <= room + 8 for m in learned) else None
        self.encoders: dict[str, Any] = {}  # reference -> encoder, shared by the grafts of this model

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., d) as the bare base embeds its tokens."""
        with self._no_graft():
            return self.embedding(ids)

    def states(self, prompts: Prompts) -> Tensor:
        """Last hidden states (n, T, h) of the bare base in eval mode, whatever grafts and rows the forward is for."""
        return self._bare(input_ids=prompts.input_ids, attention_mask=prompts.mask.long(), position_ids=prompts.position_ids,
                          use_cache=False).last_hidden_state

    def keys_values(self, ids: Tensor) -> Tensor:
        """Keys and values (layers, 2, T, heads * head size) of the text `ids` (1, T) in the bare base, as a cache holds them.
        Raises IncompatibleError for models whose layers do not all keep keys and values of one width."""
        try:
            layers = self._bare(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers
            return torch.stack([torch.stack([t[0].transpose(0, 1).flatten(1) for t in (layer.keys, layer.values)])
                                for layer in layers])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise IncompatibleError(f"{type(self.model).__name__} does not keep keys and values of one width in every layer "
                                    f"({type(error).__name__}: {error})", remedy="choose adapter: prompt or lora") from None

    @torch.no_grad()
    def _bare(self, **inputs: Any) -> Any:
        training = [module for module in self.body.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with self._no_graft():
                return self.body(**inputs)
        finally:
            for module in training:
                module.training = True

    def _no_graft(self):
        return self.noise.scope(rows=None, expansion=1, token_rows=None, disabled=frozenset(self.noise.grafts))

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from ..modeling.models import tokenizer_of

        found = tokenizer_of(self.model)
        if found is None:
            raise UsageError("the text of a prompt cannot be read back: the model's tokenizer is not known",
                             remedy="set model.graft_tokenizer = tokenizer, or use encoder: base")
        return found


class Members(nn.Module):
    """Holds the adapters as children of the model, so that .train(), .to() and the ledger reach them."""


class PrefixScope:
    """The hooks of one model; made with its first prefix graft and gone with the last."""

    def __init__(self, model: nn.Module):
        self.base = Decoder(model)
        self.model, self.holder = model, state_of(model)
        self.adapters: dict[str, PrefixAdapter] = {}
        self.widths: list[int] = []  # of the forwards that are running
        self.labels: list[Tensor | None] = []
        self.warned = False
        self.fills: list[Fill | None] = []  # beside `widths`
        self.fills_attentions = False  # the attentions are hooked, from the first graft that sets keys and values
        body = self.base.body
        self.handles = [body.register_forward_pre_hook(self._enter, with_kwargs=True),
                        body.register_forward_hook(self._leave, always_call=True)]
        if body is not model and "labels" in inspect.signature(type(model).forward).parameters:
            self.handles += [model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
                             model.register_forward_hook(self._forget_labels, always_call=True)]
        model.add_module(ROOT, Members())
        model.__dict__[f"{ROOT}_scope"] = self

    @classmethod
    def of(cls, model: nn.Module) -> PrefixScope:
        return model.__dict__.get(f"{ROOT}_scope") or cls(model)

    def put(self, name: str, adapter: PrefixAdapter) -> None:
        self.adapters[name] = adapter
        self.model._modules[ROOT].add_module(f"of_{name}", adapter)
        if not self.fills_attentions and type(adapter).keys_values is not PrefixAdapter.keys_values:
            found = [m for m in self.base.body.modules() if isinstance(getattr(m, "layer_idx", None), int)
                     and "Attention" in type(m).__name__ and "past_key_values" in inspect.signature(type(m).forward).parameters]
            self.handles += [m.register_forward_pre_hook(fill_attention, with_kwargs=True) for m in found]
            self.fills_attentions = True

    def drop(self, name: str) -> None:
        if self.adapters.pop(name, None) is not None:
            del self.model._modules[ROOT]._modules[f"of_{name}"]
        if not self.adapters:
            for handle in self.handles:
                handle.remove()
            del self.model._modules[ROOT], self.model.__dict__[f"{ROOT}_scope"]

    # -- labels of the model's own forward ------------------------------------------------------------------------------
    def _see_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.labels.append(kwargs.get("labels"))

    def _forget_labels(self, *_: Any) -> None:
        if self.labels:
            self.labels.pop()

    # -- into the body -----------------------------------------------------------------------------------------------------
    def _enter(self, body: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.holder.current.packed:  # who packs tokens of many requests puts the prefixes there itself
            self.widths.append(0), self.fills.append(None)
            return None
        call = {**dict(zip(self.base.names, args)), **kwargs}
        ids, embeds, cache = call.get("input_ids"), call.get("inputs_embeds"), call.get("past_key_values")
        rows = self._adapters_of_rows(ids if ids is not None else embeds)
        lengths = [0 if a is None else a.length for a in rows]
        past = cache.get_seq_length() if cache is not None else 0
        width = getattr(cache, ROOT, 0) if past else max(lengths, default=0)
        if cache is not None and not past:
            setattr(cache, ROOT, width)
        if past and max(lengths) > width:
            raise UsageError("the key/value cache was filled without this graft's prefix",
                             remedy="start with an empty cache in the same routing")
        if not width:
            self.widths.append(0), self.fills.append(None)
            return None
        self._check(call, past, width)
        place = Place(width, lengths, call, past - width if past else 0)
        if not past:
            vectors = torch.cat([self._prefix(rows, width, call), self.base.embedding(ids)], 1)
            call["inputs_embeds"], call["input_ids"] = place.arrange(vectors), None
        call["attention_mask"], call["position_ids"] = place.mask(), place.positions(prefill=not past)
        self.widths.append(0 if past else width)
        self.fills.append(None if past else Fill.of(rows, width, place))
        if self.fills[-1] is not None:
            call[FILL] = self.fills[-1]
        return (), call

    def _adapters_of_rows(self, given: Tensor) -> list[PrefixAdapter | None]:
        state, n = self.holder.current, given.shape[0]
        active = {name: adapter for name, adapter in self.adapters.items() if name not in state.disabled}
        if state.rows is None:
            if len(active) > 1:
                raise IncompatibleError(f"grafts {', '.join(active)} all put a prefix before the text",
                                        remedy="name one per row with graftwork.routing, or switch others off (graft.disabled())")
            return [next(iter(active.values()), None)] * n
        if n != len(state.rows) * state.expansion:
            self.holder.row_index(given)  # raises with what was expected
        return [active.get(state.rows[i // state.expansion]) for i in range(n)]

    def _check(self, call: dict, past: int, width: int) -> None:
        ids, mask, positions = call.get("input_ids"), call.get("attention_mask"), call.get("position_ids")
        bad = [name for name in REFUSED if call.get(name) is not None]
        if ids is None:
            bad.append("inputs_embeds")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            bad.append("an attention_mask that is not (rows, tokens), as a static cache makes it,")
        if positions is not None and positions.dim() != 2:
            bad.append("position_ids of several axes")
        if bad:
            raise IncompatibleError(f"a prefix cannot be put before the text: the model was given {', '.join(bad)}",
                                    remedy="give input_ids with an attention_mask (rows, tokens), and use a dynamic cache")
        if positions is not None and mask is None and call.get("past_key_values") is None and (
                isinstance(positions, FakeTensor) or bool((positions.diff(dim=-1) != 1).any())):
            raise IncompatibleError("a prefix goes before each example, and packed rows hold several",
                                    remedy="data.packing: false, or give an attention_mask")
        room, total = self.base.room, (past or width) + ids.shape[1]
        if room is not None and total > room:
            raise UsageError(f"the text and a prefix of {width} need {total} positions, the model has {room}",
                             remedy="shorten the text, or choose fewer virtual tokens")

    def _prefix(self, rows: list[PrefixAdapter | None], width: int, call: dict) -> Tensor:
        """Prefixes (N, width, d), each at the right end of its room."""
        ids, mask, positions = call["input_ids"], call.get("attention_mask"), call.get("position_ids")
        labels = self._labels_for(ids) if any(a is not None and a.reads_prompt for a in rows) else None
        prompts = Prompts(ids, prompt_mask(ids, mask, labels), None if positions is None else positions.expand(ids.shape[0], -1))
        dtype = self.base.embedding.weight.dtype
        return rooms(rows, width, lambda a, index: a.prefix(prompts.rows(index), self.base).to(dtype), ids.device)

    def _labels_for(self, ids: Tensor) -> Tensor | None:
        labels = next((given for given in (*self.labels[-1:], self.holder.current.labels) if given is not None), None)
        if labels is None or labels.dim() != 2:
            if labels is None and self.model.training and torch.is_grad_enabled() and not self.warned and \
                    getattr(self.model, "get_output_embeddings", lambda: None)() is not None:
                self.warned = True
                warnings.warn("training without labels: the prefix is computed from the whole input, answers included; give "
                              "labels to the model, or set them with model.graft_state.scope(labels=...)", stacklevel=2)
            return None
        if labels.shape != ids.shape:
            raise UsageError(f"labels {tuple(labels.shape)} do not belong to input_ids {tuple(ids.shape)}",
                             remedy="give labels of this batch, or run it in model.graft_state.scope(labels=None)")
        return labels

    # -- out of the body ---------------------------------------------------------------------------------------------------
    def _leave(self, body: nn.Module, args: tuple, output: Any) -> Any:
        width = self.widths.pop() if self.widths else 0
        fill = self.fills.pop() if self.fills else None
        if output is None or not width:  # None: the forward raised
            return None
        if fill is not None:
            fill.check(self.model)
        if isinstance(output, tuple):
            return (output[0][:, width:], *output[1:])
        n = output.last_hidden_state.shape[0]
        output.last_hidden_state = output.last_hidden_state[:, width:]
        if getattr(output, "past_key_values", None) is not None:
            setattr(output.past_key_values, ROOT, width)
        for name, cut in (("hidden_states", lambda t: t[:, width:]), ("attentions", lambda t: t[..., width:, :]),
                          ("router_logits", lambda t: t.reshape(n, -1, t.shape[-1])[:, width:].flatten(0, 1))):
            found = getattr(output, name, None)
            if found is not None:
                setattr(output, name, tuple(None if t is None else cut(t) for t in found))
        return output


class Place:
    """Where what stands in the lengthened rows: entry e of row i is entry `source[i, e]` of [prefix room; text]. `held`: text
    positions in the cache."""

    def __init__(self, width: int, lengths: list[int], call: dict, held: int):
        ids, self.given, self.width, self.held = call["input_ids"], call.get("attention_mask"), width, held
        (self.n, self.tokens), self.device = ids.shape, ids.device
        if self.given is not None and has_values(self.given) and self.given.shape[1] == held + self.tokens and bool(self.given.all()):
            self.given = None  # nothing is padded: no second copy of the embeddings, and one row of positions for all
        self.given_positions = call.get("position_ids")
        self.plain = self.given is None and all(length == width for length in lengths)  # nothing is padded
        self.shift = torch.tensor(lengths, device=self.device)[:, None]
        self.empty = width - self.shift  # (N, 1) unused entries of the prefix room
        if self.given is None and not self.plain:
            self.given = torch.ones(self.n, held + self.tokens, dtype=torch.int64, device=self.device)
        self.first = torch.zeros_like(self.shift) if self.given is None else self.given.ne(0).int().argmax(1, keepdim=True)
        total = width + (held + self.tokens)
        e = torch.arange(total, device=self.device).expand(self.n, -1)
        before, behind = e < self.empty + self.first, e < width + self.first
        self.source = torch.where(e < self.empty, e, torch.where(before, e + self.shift, torch.where(behind, e - self.first, e)))

    def arrange(self, parts: Tensor) -> Tensor:
        """[prefix room; text] (N, width + T, ...) in the order of the lengthened rows."""
        if self.plain:
            return parts
        source = self.source if parts.dim() == 2 else self.source.unsqueeze(-1).expand(-1, -1, parts.shape[-1])
        return parts.gather(1, source)

    def mask(self) -> Tensor | None:
        """The lengthened mask (N, width + all text), None where nothing is padded."""
        if self.plain:
            return None
        used = (torch.arange(self.width, device=self.device) >= self.empty).to(self.given.dtype)
        return self.arrange(torch.cat([used, self.given], 1))

    def positions(self, prefill: bool) -> Tensor | None:
        """Positions of what is computed in this call: prefix and text, or (cache filled) text alone."""
        given = self.given_positions
        if given is None:
            if self.plain:
                return None  # the model counts from the length of its cache, prefix included
            given = torch.arange(self.held, self.held + self.tokens, device=self.device)[None]
        given = given.expand(self.n, -1)
        if not prefill:
            return given + self.shift
        own = (torch.arange(self.width, device=self.device) - self.empty).clamp(min=0) + given.gather(1, self.first)
        return self.arrange(torch.cat([own, given + self.shift], 1))


def prompt_mask(ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """(N, T) bool: the real tokens before the first trained one; all real tokens of a row that trains none or without labels.

    The first real token belongs to the prompt also where it is labelled: nothing predicts it."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.ne(0)
    if labels is None:
        return real
    place = torch.arange(ids.shape[1], device=ids.device)
    trained = (labels != -100) & (place > real.int().argmax(1, keepdim=True))
    start = torch.where(trained.any(1), trained.int().argmax(1), ids.shape[1])
    return real & (place < start[:, None])
