"""Sites: the linear maps of a model that may carry a graft, found by PEFT's target rules or by role.

`target_modules` is "all-linear", a list of name suffixes, a regular expression (matched on the full name), or roles and
groups: q k v o gate up down fc1 fc2 qkv gate_up expert, recurrent_in recurrent_x recurrent_out, attention, mlp, recurrent. The
output head is left out unless it is named. A map that its block never calls is no site (see calls.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..errors import UsageError, nearest
from .calls import reads
from .experts import expert_linears
from .protocols import Product, RowsProduct, product_of

#: last part of a module's name -> role
ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "query": "q", "key": "k", "value": "v", "c_attn": "qkv", "qkv_proj": "qkv", "query_key_value": "qkv", "c_fc": "fc1",
    "fc1": "fc1", "fc2": "fc2", "gate_up_proj": "gate_up", "out_proj": "o", "dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2",
    "w1": "gate", "w2": "down", "w3": "up", "lm_head": "head", "score": "head", "classifier": "head", "pooler": "head",
    "gate": "router", "shared_expert_gate": "router", "input_linear": "gate_up", "output_linear": "down",
}
#: the blocks that mix tokens through a state or a convolution, by the name of the module that holds their maps
RECURRENT_BLOCKS = {"mamba", "mixer", "linear_attn", "temporal_block", "ssm", "conv"}
RECURRENT = {"in_proj": "recurrent_in", "in_proj_qkvz": "recurrent_in", "in_proj_ba": "recurrent_in", "in_proj_qkv": "recurrent_in",
             "in_proj_z": "recurrent_in", "in_proj_b": "recurrent_in", "in_proj_a": "recurrent_in", "linear_x": "recurrent_in",
             "linear_y": "recurrent_in", "x_proj": "recurrent_x", "dt_proj": "recurrent_x", "out_proj": "recurrent_out",
             "linear_out": "recurrent_out"}
GROUPS = {"attention": {"q", "k", "v", "o", "qkv"}, "mlp": {"gate", "up", "down", "fc1", "fc2", "gate_up"},
          "recurrent": {"recurrent_in", "recurrent_x", "recurrent_out"}}
LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")


@dataclass
class Site:
    """One linear map. `name` is unique; `module_name` the module that runs it; `rows` the output slice of a fused map
    (q of c_attn); `expert` the expert of a fused parameter `attribute`; `layer` -1 where there is none."""

    name: str
    module_name: str
    module: nn.Module = field(repr=False)
    product: Product = field(repr=False)
    role: str
    layer: int
    rows: slice | None = None
    attribute: str | None = None
    expert: int | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)  # the whole model; set by `find_sites`

    @property
    def in_features(self) -> int:
        return self.product.in_features

    @property
    def out_features(self) -> int:
        return self.product.out_features

    @property
    def parameter_name(self) -> str:
        """Name of the weight in the pristine state dict."""
        return f"{self.module_name}.{self.attribute or 'weight'}"

    @property
    def slot_name(self) -> str:
        return "whole" if self.attribute is None else f"{self.attribute}_{self.expert}"


def role_of(name: str) -> str:
    """Role of a module by the end of its dotted name; 'other' when unknown."""
    parts = name.split(".")
    role = ROLES.get(parts[-1], "other")
    if len(parts) > 1 and parts[-2] in RECURRENT_BLOCKS:
        role = RECURRENT.get(parts[-1], role)
    if parts[-1] == "c_proj":
        role = "o" if "attn" in name else "fc2"
    elif parts[-1] == "dense":  # BERT: attention.output.dense, intermediate.dense, output.dense, pooler.dense
        role = "o" if "attention" in name else "fc1" if "intermediate" in name else "head" if "pooler" in name else "fc2"
    return role


def layer_of(name: str) -> int:
    match = LAYER.search(f".{name}.")
    return int(match.group(1)) if match else -1


def flat_tokens(name: str) -> bool:
    """Whether a map's block hands it all tokens of a batch as rows, in their order: shared experts of a mixture."""
    return "shared_expert" in name and role_of(name) != "router"


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Product]]:
    """(name, module, product) of every linear map of the model, in definition order; adapters' own maps excluded, and maps
    that are never called."""
    for name, module, product, called in _linear_modules(model):
        if called:
            yield name, module, product


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Product, bool]]:
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        owners[name] = module
        if ".graft." in f".{name}." or name.endswith(".graft"):
            continue
        product = product_of(module)
        if product is not None and "ModuleList" not in type(module).__name__ and not _inside_expert_list(model, name):
            owner, _, last = name.rpartition(".")
            yield name, module, product, not name or reads(owners[owner]).get(last) != "always"


def _inside_expert_list(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 2 and parts[-1].isdigit() and parts[-2] in ("gate_up_proj", "down_proj")


def all_sites(model: nn.Module) -> list[Site]:
    """Every linear map, expert maps included."""
    sites = [Site(name, name, module, product, role_of(name), layer_of(name)) for name, module, product in linear_modules(model)]
    sites += [Site(f"{name}.{attribute}.{expert}", name, module, product, "expert", layer_of(name), None, attribute, expert)
              for name, module, attribute, expert, product in expert_linears(model)]
    return sites


def find_sites(model: nn.Module, target_modules: str | list[str] = "all-linear", *,
               exclude_modules: list[str] | None = None, layers: list[int] | None = None) -> list[Site]:
    """Sites that match. Raises UsageError listing the candidates when nothing matches."""
    known = all_sites(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = _select(known, target_modules, head, model)
    if exclude_modules:
        chosen = [s for s in chosen if not any(_suffix(s.name, e) for e in exclude_modules)]
    if layers is not None:
        chosen = [s for s in chosen if s.layer in layers]
    if not chosen:
        suffixes = sorted({s.name.split(".")[-1] if s.expert is None else s.attribute for s in known})
        wrong = target_modules if isinstance(target_modules, str) else ", ".join(target_modules)
        raise UsageError(f"no module of this model matches target_modules = {wrong!r}{nearest(wrong, suffixes)}",
                         remedy=f"candidates: {', '.join(suffixes)}; or 'all-linear', 'attention', 'mlp', or roles "
                                f"{', '.join(sorted({s.role for s in known} - {'other', 'head'}))}")
    for site in chosen:
        site.model = model
    return chosen


def _select(known: list[Site], target: str | list[str], head: nn.Module | None, model: nn.Module) -> list[Site]:
    if target == "all-linear":
        return [s for s in known if s.module is not head and s.role not in ("head", "router")]
    if isinstance(target, str):
        words = [w.strip() for w in target.split(",")]
        if not all(w in GROUPS or w in ROLES.values() or w.replace("_", "").isalnum() for w in words):
            pattern = re.compile(target)
            return [s for s in known if pattern.fullmatch(s.name)]
        target = words
    chosen: dict[str, Site] = {}
    for word in target:
        matched = [s for s in known if _suffix(s.name, word) or (s.attribute and _suffix(s.parameter_name, word))]
        if not matched:
            roles = GROUPS.get(word, {word})
            matched = [s for s in known if s.role in roles]
            silent = [] if matched else [name for name, _, _, called in _linear_modules(model) if not called and _suffix(name, word)]
            if silent:
                raise UsageError(f"'{silent[0]}' takes no adapter: its block reads the weight and never calls the map, so the "
                                 "adapter would have no effect", remedy=f"remove '{word}' from target_modules")
            if "gate_up" in roles or word == "mlp":
                matched += [s for s in known if s.expert is not None and s not in matched]
            for fused in (s for s in known if s.role == "qkv" and roles & {"q", "k", "v"} and "qkv" not in roles):
                matched += [slice_site(fused, part, model) for part in sorted(roles & {"q", "k", "v"})]
        chosen.update((s.name, s) for s in matched)
    return list(chosen.values())


def slice_site(site: Site, part: str, model: nn.Module) -> Site:
    """q, k or v of a fused projection as a site of its own (rows ordered q, k, v; GQA sizes from the config)."""
    if site.module_name.endswith("query_key_value"):
        raise UsageError(f"'{site.module_name}' interleaves q, k and v by head; '{part}' is no slice of it",
                         remedy="target the whole projection: target_modules: [query_key_value]")
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = site.out_features // (heads + 2 * kv_heads)
    start = {"q": 0, "k": heads * width, "v": (heads + kv_heads) * width}[part]
    rows = slice(start, start + (heads if part == "q" else kv_heads) * width)
    return Site(f"{site.name}[{part}]", site.module_name, site.module, RowsProduct(site.product, rows), part, site.layer, rows)


def _suffix(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
