"""What every optimizer shares: options, groups, lifecycle, saving, per-layer updates in backward, byte counts.

State per parameter is a dict of tensors, allocated at the parameter's first gradient:
- `step`: 0-dim float32, number of updates so far (as in torch.optim); `seed`: 0-dim int64, for methods that draw numbers;
- whatever the method's `slots` name, of the configured state_dtype (float64 for float64 parameters);
- `compensation`: what the last rounding of a 16-bit weight cut off, with `rounding: kahan`.
All of it is counted by `state_bytes`. Decisions (refresh now?) read a Python mirror of step and seed, or a slot that is kept on the
host, so that no step waits for a device and a step runs on fake tensors; loading restores the mirror from the tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..errors import ArtifactError, UsageError
from ..modeling.trained_codes import codes_of
from ..registry import MethodConfig, lookup, make_config
from .groups import as_groups
from .pieces import LARGE, cut, in_order, spans
from .rounding import NARROW, check_rounding, noise, widened

#: slot name -> (shape, dtype) of one state tensor
Slots = dict[str, tuple[tuple[int, ...], torch.dtype]]
#: slots that decide what a step does, read without waiting for a device
ON_HOST = ("seed", "refresh_gap")
_SAVED_GROUP_KEYS = ("lr", "base_lr", "lr_scale", "weight_decay", "role")


def below_one(betas: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError("each beta must lie in [0, 1)")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(below_one)]


class CommonConfig(MethodConfig):
    """Options common to all optimizers."""

    lr: float = Field(1e-3, ge=0, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; W -= lr * weight_decay * W")
    state_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 halves the state, rounds the moments")
    rounding: Literal["nearest", "stochastic", "kahan"] = Field(
        "nearest", description="of updated 16-bit weights; kahan keeps what is cut off, 2 bytes a weight")
    fused: bool = Field(False, description="update each tensor inside backward and free its gradient at once")


class OptimizerConfig(CommonConfig):
    """Options of the optimizers with Adam's two moments."""

    betas: Betas = Field((0.9, 0.999), description="decay of the first and second moment")
    eps: float = Field(1e-8, ge=0)


@dataclass
class Clock:
    """Python mirror of one parameter's `step` and `seed`, plus its place: construction index from 1, and group number."""

    index: int
    group: int
    seed: int
    step: int = 0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which updates are computed: float32, or float64 for float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def kept_dtype(dtype: torch.dtype, config: CommonConfig) -> torch.dtype:
    """Type of the state of a parameter of that dtype: the configured one, but float64 for float64 parameters."""
    return dtype if dtype == torch.float64 else getattr(torch, config.state_dtype)


class BaseOptimizer(torch.optim.Optimizer):
    """Base of all optimizers. A subclass defines `slots` and either `update` (a list of tensors) or `update_one`.

    Args:
        params: parameters, or groups with the extra keys `role` ("linear" by default), `lr_scale` and `update_gain` (a function,
            see `_apply`); a group's own `lr` counts before `lr_scale`.
        config: an instance of the method's config class; or give its fields as keyword arguments.
    """

    config_class: type[CommonConfig]
    uses_seed = False

    def __init__(self, params: Iterable, config: CommonConfig | None = None, **options: Any):
        if config is None:
            config = make_config("optimizer", self.method, **options)
        elif options:
            raise UsageError(f"give either a config object or options, not both ({', '.join(options)})")
        self.config = config
        self._clocks: dict[Tensor, Clock] = {}
        self._hooks: dict[Tensor, Any] = {}
        super().__init__(params, {"lr": config.lr, "base_lr": None, "lr_scale": 1.0, "role": "linear",
                                  "weight_decay": config.weight_decay})

    # -- what a method defines ---------------------------------------------------------------------------------------
    @classmethod
    def slots(cls, config: CommonConfig, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        """State tensors of one parameter besides `step`. `dtype` is the parameter's."""
        raise TypeError(f"{cls.__name__} must define slots")

    @classmethod
    def split_groups(cls, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        """The groups made from a model, with finer roles where a method needs to know more about a weight than `groups.py`."""
        return groups

    @classmethod
    def all_slots(cls, config: CommonConfig, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Slots:
        """`slots`, and what the rounding of the weight keeps."""
        kept = {"compensation": (shape, dtype)} if config.rounding == "kahan" and dtype in NARROW else {}
        return {**cls.slots(config, shape, dtype, role), **kept}

    @classmethod
    def elementwise(cls, config: CommonConfig, shape: tuple[int, ...], role: str) -> bool:
        """Whether the update of each entry depends on that entry, its gradient and its state (or their block's) alone."""
        return False

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update parameters that have a gradient; the result for one tensor must not depend on the others."""
        for p in params:
            self.update_one(group, p, p.grad)

    def update_one(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} must define update or update_one")

    # -- torch.optim.Optimizer ---------------------------------------------------------------------------------------
    def add_param_group(self, group: dict[str, Any]) -> None:
        super().add_param_group(group)
        added, number = self.param_groups[-1], len(self.param_groups) - 1
        if added["base_lr"] is None:
            added["base_lr"] = added["lr"]
            added["lr"] = added["base_lr"] * added["lr_scale"]
        for p in added["params"]:
            check_rounding(self.config.rounding, p)
            index = len(self._clocks) + 1
            self._clocks[p] = Clock(index, number, self._first_seed(index))
            self._hook(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. With `fused`, backward has used its gradients up already; what
        is left are gradients set by hand, as an estimator does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(group, params)
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """`_apply`, with the configured rounding of 16-bit weights; weights that are codes are decoded for it, and those that can be
        are updated in pieces."""
        rounding, whole = self.config.rounding, []
        for p in params:
            if self._is_cut(group, p):
                self._move_pieces(group, p)
            elif rounding == "nearest" and codes_of(p) is None:
                whole.append(p)
            else:
                state, clock = self.prepare(group, p)
                with widened(p, rounding, state.get("compensation"), noise(rounding, p.device, (clock.index, clock.step))):
                    self._apply(group, [p])
        if whole:
            self._apply(group, whole)

    def _is_cut(self, group: dict[str, Any], p: Tensor) -> bool:
        return (p.numel() > LARGE and "update_gain" not in group and codes_of(p) is None
                and self.elementwise(self.config, tuple(p.shape), group["role"])
                and in_order(p, p.grad, *self.prepare(group, p)[0].values()))

    def _move_pieces(self, group: dict[str, Any], p: Tensor) -> None:
        """Each piece stands in for a parameter of its own; all begin with the same step and end with the next."""
        state, clock = self.prepare(group, p)
        weights, grads = p.detach().view(-1), p.grad.view(-1)
        generator, own = noise(self.config.rounding, p.device, (clock.index, clock.step)), clock
        for span in spans(p.numel()):
            piece, own = weights[span], replace(clock)
            piece.grad, part = grads[span], cut(state, span, p.numel())
            self.state[piece], self._clocks[piece] = part, own
            try:
                with nullcontext() if self.config.rounding == "nearest" else widened(
                        piece, self.config.rounding, part.get("compensation"), generator):
                    self._apply(group, [piece])
            finally:
                del self.state[piece], self._clocks[piece]
            del piece
        clock.step = own.step
        state["step"].copy_(part["step"])

    def _apply(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """`update`, and where the group has an `update_gain` (values before -> factors, broadcasting) each entry's step times
        its factor."""
        gain = group.get("update_gain")
        before = None if gain is None else [p.detach().clone() for p in params]
        self.update(group, params)
        for p, old in zip(params, before or ()):
            p.copy_(torch.addcmul(old, p - old, gain(old)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that state keeps its own dtypes (torch would cast fp32 moments to a bf16 parameter's type)."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            for number, p in zip(saved["params"], group["params"]):
                if number in state_dict["state"]:
                    self._set_state(p, state_dict["state"][number])

    # -- state -------------------------------------------------------------------------------------------------------
    def prepare(self, group: dict[str, Any], p: Tensor) -> tuple[dict[str, Tensor], Clock]:
        """The parameter's state, allocated at its first gradient, and its clock."""
        state, clock = self.state[p], self._clocks[p]
        if clock.step == 0 and "step" not in state:  # a reseeded parameter has a seed already
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name, (shape, dtype) in self.all_slots(self.config, tuple(p.shape), p.dtype, group["role"]).items():
                if name == "seed":
                    state[name] = torch.tensor(clock.seed, dtype=dtype, device="cpu")
                else:
                    state[name] = torch.zeros(shape, dtype=dtype, device="cpu" if name in ON_HOST else p.device)
        return state, clock

    def drop(self, p: Tensor) -> None:
        """Free the state of `p`; at its next gradient it starts as a new parameter would."""
        clock = self._clock_of(p)
        self.state.pop(p, None)
        clock.step, clock.seed = 0, self._first_seed(clock.index)

    def reseed(self, p: Tensor, seed: int) -> None:
        """Free the state of `p` and start its random projections from `seed`. Survives saving before the next gradient."""
        if not self.uses_seed:
            raise UsageError(f"{self.method} draws no random numbers", remedy="use drop(p) to start a parameter afresh")
        self.drop(p)
        self._clocks[p].seed = seed
        self.state[p]["seed"] = torch.tensor(seed, dtype=torch.int64)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Put `new` in the place of `old`. State moves along if shape and dtype are equal, else `new` starts afresh."""
        clock = self._clock_of(old)
        params = self.param_groups[clock.group]["params"]
        params[next(i for i, p in enumerate(params) if p is old)] = new
        state = self.state.pop(old, None)
        del self._clocks[old]
        if handle := self._hooks.pop(old, None):
            handle.remove()
        if old.shape == new.shape and old.dtype == new.dtype:
            self._clocks[new] = clock
            if state is not None:
                self.state[new] = state
        else:
            self._clocks[new] = Clock(clock.index, clock.group, self._first_seed(clock.index))
        self._hook(new)

    @classmethod
    def state_bytes(cls, shape: Iterable[int], dtype: torch.dtype = torch.float32, *, role: str = "linear",
                    config: CommonConfig | None = None, **options: Any) -> int:
        """Exact bytes of all state tensors of one parameter (step and seed included) after its first update."""
        config = config or make_config("optimizer", cls.method, **options)
        total = 4  # step
        for slot_shape, slot_dtype in cls.all_slots(config, tuple(shape), dtype, role).values():
            total += torch.Size(slot_shape).numel() * slot_dtype.itemsize
        return total

    # -- per-layer updates -------------------------------------------------------------------------------------------
    @staticmethod
    def fused_conflicts(accumulation: int = 1, clipping: float | None = None,
                        selections_read_gradients: bool = False) -> list[str]:
        """Reasons why updates inside backward cannot be combined with the rest of a run; empty if they can."""
        reasons = []
        if accumulation > 1:
            reasons.append(f"fused updates act on every backward, so {accumulation} accumulated micro-batches would become "
                           f"{accumulation} optimizer steps")
        if clipping:
            reasons.append("clipping by the global norm needs all gradients at once; fused updates free each one in backward")
        if selections_read_gradients:
            reasons.append("a selection reads gradients after backward, when fused updates have freed them")
        return reasons

    def _hook(self, p: Tensor) -> None:
        if not self.config.fused:
            return
        frozen = not p.requires_grad  # hooks need requires_grad; a layer frozen for now must fire later
        p.requires_grad_(True)
        self._hooks[p] = p.register_post_accumulate_grad_hook(partial(_update_in_backward, weakref.ref(self)))
        p.requires_grad_(not frozen)

    # -- helpers -----------------------------------------------------------------------------------------------------
    def _first_seed(self, index: int) -> int:
        return getattr(self.config, "seed", 0) + index

    def _clock_of(self, p: Tensor) -> Clock:
        if p not in self._clocks:
            raise UsageError(f"the optimizer has no such parameter (shape {tuple(p.shape)})")
        return self._clocks[p]

    def _set_state(self, p: Tensor, tensors: Mapping[str, Tensor]) -> None:
        clock = self._clocks[p]
        self.state[p] = {k: torch.as_tensor(v).detach().clone().to("cpu" if k in ON_HOST else p.device)
                         for k, v in tensors.items()}
        clock.step = int(tensors["step"]) if "step" in tensors else 0
        clock.seed = int(tensors["seed"]) if "seed" in tensors else self._first_seed(clock.index)


def _update_in_backward(reference: weakref.ref, p: Tensor) -> None:
    # A weak reference, so that parameters do not keep a discarded optimizer (and its state) alive.
    optimizer = reference()
    if optimizer is not None:
        with torch.no_grad():
            optimizer._move(optimizer.param_groups[optimizer._clocks[p].group], [p])
        p.grad = None


def optimizer(method: str | CommonConfig, model_or_groups: nn.Module | Iterable, lr: float | None = None, *,
              trainable: Iterable[nn.Parameter] | None = None, **options: Any) -> BaseOptimizer:
    """Build an optimizer by name, or from its config object.

    Args:
        model_or_groups: a model (groups are made from it, see `parameter_groups`), a list of groups, or a list of parameters.
        lr: learning rate; the method's default if None.
        trainable: with a model: the parameters that will ever train, if some are frozen at the moment.
        options: fields of the method's config.

    Raises: UsageError for an unknown method, an unknown or bad option, a model without trainable parameters.
    """
    if lr is not None:
        options["lr"] = lr
    if isinstance(method, MethodConfig):
        info = lookup("optimizer", type(method).method)
        config = make_config("optimizer", info.name, **{**method.model_dump(), **options})
    else:
        info = lookup("optimizer", method)
        config = make_config("optimizer", info.name, **options)
    groups = as_groups(model_or_groups, weight_decay=config.weight_decay, trainable=trainable)
    if isinstance(model_or_groups, nn.Module):
        groups = info.cls.split_groups(groups, model_or_groups)
    return info.cls(groups, config)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's lr to base_lr * lr_scale * factor: a schedule as a function of (group, step), safe when groups are
    added later. The key is not `initial_lr`, which a foreign LambdaLR would take without `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * group.get("lr_scale", 1.0) * factor


def optimizer_state_tensors(optimizer: BaseOptimizer, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, Tensor], dict]:
    """Everything to save: ({"<parameter name>.<slot>": tensor}, JSON-able header). No copies are made.

    Raises: UsageError if a parameter of the optimizer has no name.
    """
    def name_of(p: Tensor) -> str:
        if p not in names:
            raise UsageError(f"a parameter of the optimizer (shape {tuple(p.shape)}) has no name")
        return names[p]

    groups = [{**{key: group[key] for key in _SAVED_GROUP_KEYS}, "params": [name_of(p) for p in group["params"]]}
              for group in optimizer.param_groups]
    tensors = {f"{name_of(p)}.{slot}": tensor for p, state in optimizer.state.items() for slot, tensor in state.items()}
    return tensors, {"format": 1, "method": optimizer.method, "groups": groups}


def load_optimizer_state(optimizer: BaseOptimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any],
                         names: Mapping[nn.Parameter, str]) -> None:
    """Restore what `optimizer_state_tensors` gave; the optimizer must have the same method, groups and options.

    Raises: ArtifactError naming what differs; the optimizer is then unchanged.
    """
    if header.get("format") != 1 or header.get("method") != optimizer.method:
        raise ArtifactError(f"saved state is of '{header.get('method')}' (format {header.get('format')}), "
                            f"the optimizer is '{optimizer.method}' (format 1)")
    here = [[names.get(p) for p in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in header["groups"]]:
        raise ArtifactError("saved optimizer groups hold other parameters than the optimizer's",
                            remedy="resume with the recipe of the saved run")
    by_name = {names[p]: p for p in optimizer._clocks}
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        if name not in by_name:
            raise ArtifactError(f"saved optimizer state names '{key}', which is no parameter here")
        states.setdefault(name, {})[slot] = tensor
    for name, state in states.items():
        _check_slots(optimizer, by_name[name], name, state)
    for group, saved in zip(optimizer.param_groups, header["groups"]):
        group.update({key: saved[key] for key in _SAVED_GROUP_KEYS})
    for name, p in by_name.items():
        optimizer.drop(p)
        if name in states:
            optimizer._set_state(p, states[name])


def _check_slots(optimizer: BaseOptimizer, p: Tensor, name: str, state: Mapping[str, Tensor]) -> None:
    group = optimizer.param_groups[optimizer._clocks[p].group]
    expected = {"step": ((), torch.float32),
                **optimizer.all_slots(optimizer.config, tuple(p.shape), p.dtype, group["role"])}
    if set(state) == {"seed"} and "seed" in expected:  # reseeded, no gradient since
        expected = {"seed": expected["seed"]}
    found = {slot: (tuple(tensor.shape), tensor.dtype) for slot, tensor in state.items()}
    if found != expected:
        wrong = sorted(slot for slot in {*found, *expected} if found.get(slot) != expected.get(slot))
        raise ArtifactError("; ".join(f"optimizer state '{name}.{slot}': saved {found.get(slot)}, expected "
                                      f"{expected.get(slot)}" for slot in wrong),
                            remedy="resume with the options of the saved run")
