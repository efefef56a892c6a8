"""MeZO: zeroth-order SGD in place (arXiv 2305.17333), with n-SPSA averaging.

    z_q ~ N(0, I), drawn per tensor from (seed, step, q, parameter name)
    l+ = L(theta + eps z),  l- = L(theta - eps z)   (the same batch, dropout off, no graph)
    c_q = (l+ - l-) / (2 eps)
    theta <- theta - lr * (1/n * sum_q c_q z_q + wd * theta)     (no decay on 1-D tensors)

theta: any trained tensors (a graft's, or the model's own). Memory: forward only, plus one tensor: z exists for one tensor at a
time and is drawn again when it is needed. All micro-batches of a step enter one evaluation of L. The numbers c_q of each step
are its metrics; `replay` repeats a run's updates from them alone.

Differs from the official code: noise comes from private generators keyed by name, so the order and placement of tensors, data
order and dropout are independent of it; z is drawn in pieces, so not even one tensor of it exists at a time. fp32 tensors are
perturbed in place and restored by arithmetic. Below fp32 arithmetic does not restore (bf16 rounds most of eps z away):
there a module's own tensors are perturbed when its forward begins and copied back when it ends, so one module's copy is
alive at a time; and the update, which is far smaller than the spacing of bf16 numbers, is rounded up or down with the
probability that keeps its mean, from the same seed. The loss that is logged is (l+ + l-)/2, not l+. Tensors that a selection
froze for this step stay where they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling import repeated
from ..modeling.arithmetic import round_stochastic
from ..registry import MethodConfig, register
from .base import Estimator, StepContext, StepResult, micro_forward

#: values of z that exist at a time
PIECE = 1 << 20
EXACT = (torch.float32, torch.float64)
Named = Sequence[tuple[str, nn.Parameter]]
#: directions to go: (key of z, factor)
Moves = Sequence[tuple[tuple, float | Tensor]]


class MeZO(MethodConfig):
    """Options of `mezo`."""

    lr: float = Field(1e-6, gt=0, description="rate of the update; about 1e-6 for full weights, 1e-4 for LoRA")
    eps: float = Field(1e-3, gt=0, description="size of the perturbation; 1e-3 full weights, 1e-2 LoRA")
    n_samples: int = Field(1, ge=1, description="directions averaged per step")
    weight_decay: float = Field(0.0, ge=0)


@register("estimator", "mezo", config=MeZO, title="MeZO: Fine-Tuning Language Models with Just Forward Passes",
          paper="2305.17333",
          summary="two forward passes per step, no backward: the memory of inference",
          bibtex="@inproceedings{malladi2023mezo, title={Fine-Tuning Language Models with Just Forward Passes}, author={Malladi, "
                 "Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and Lee, Jason D. and Chen, Danqi and Arora, "
                 "Sanjeev}, booktitle={NeurIPS}, year={2023}}")
class MeZOEstimator(Estimator):
    gradients = differentiates = False

    def __init__(self, config: MeZO | None = None):
        super().__init__(config or MeZO())

    @torch.no_grad()
    def step(self, ctx: StepContext) -> StepResult:
        moving = [(n, p) for n, p in ctx.parameters if p.requires_grad]
        with evaluating(ctx.model):
            coefficients, loss, rows = self.measure(ctx, moving)
        update(moving, ctx.seed, ctx.step, coefficients, self.rate(ctx), self.config.weight_decay)
        names = ["projected_gradient", *(f"projected_gradient_{i}" for i in range(1, len(coefficients)))]
        return StepResult(loss.float(), dict(zip(names, coefficients)), rows, updated=True)

    def rate(self, ctx: StepContext) -> float:
        return self.config.lr if ctx.lr is None else ctx.lr

    def measure(self, ctx: StepContext, moving: Named) -> tuple[list[Tensor], Tensor, list]:
        """([c_q], the loss, its rows). The tensors of `moving` are where they were when it returns."""
        in_place, in_forward = self.split(ctx, moving)
        eps, losses, coefficients, rows = self.config.eps, [], [], []
        for sample in range(self.config.n_samples):
            key = (ctx.seed, ctx.step, sample)
            self.shift(in_place, [(key, eps)])
            with perturbed_modules(ctx.model, in_forward, self.add, [(key, eps)]):
                plus, rows = self._loss(ctx)
            self.shift(in_place, [(key, -2 * eps)])
            with perturbed_modules(ctx.model, in_forward, self.add, [(key, -eps)]):
                minus, _ = self._loss(ctx)
            self.shift(in_place, [(key, eps)])
            losses.append((plus + minus) / 2)
            coefficients.append((plus - minus) / (2 * eps))
        return coefficients, torch.stack(losses).mean(), rows

    def split(self, ctx: StepContext, moving: Named) -> tuple[Named, dict[int, str]]:
        """Which tensors are perturbed in place, and which only inside their module's forward ({id: name})."""
        return [(n, p) for n, p in moving if p.dtype in EXACT], {id(p): n for n, p in moving if p.dtype not in EXACT}

    def shift(self, parameters: Named, moves: Moves) -> None:
        for name, p in parameters:
            for key, scale in moves:
                self.add(key, name, p, scale)

    def add(self, key: tuple, name: str, p: Tensor, scale: float | Tensor) -> None:
        """p += scale * z in place."""
        add_noise(key, name, p, scale)

    @staticmethod
    def _loss(ctx: StepContext) -> tuple[Tensor, list]:
        total, rows = None, []
        for micro in range(len(ctx.batches)):
            with micro_forward(ctx, micro) as out:
                total = out.loss.double() if total is None else total + out.loss.double()
                rows.append((out.row_loss, out.row_tokens))
        extra = ctx.graft_losses()
        return total if extra is None else total + extra.double(), rows


@torch.no_grad()
def update(parameters: Named, seed: int, step: int, coefficients: Sequence[Tensor | float], lr: float,
           weight_decay: float = 0.0) -> None:
    """theta <- theta - lr * (mean_q c_q z_q + wd * theta) for one step, in place."""
    for name, p in parameters:
        decay = 1 - lr * weight_decay if p.dim() > 1 else 1.0
        scales = [c * (-lr / len(coefficients)) for c in coefficients]
        if p.dtype in EXACT:
            if decay != 1.0:
                p.mul_(decay)
            for sample, scale in enumerate(scales):
                add_noise((seed, step, sample), name, p, scale)
        else:
            generators = [_generator((seed, step, sample), name, p) for sample in range(len(scales))]
            rounding = _generator((seed, step, "rounding"), name, p)
            for piece in _pieces(p):
                new = piece.float().mul_(decay)
                for generator, scale in zip(generators, scales):
                    new += torch.randn(piece.shape, generator=generator, device=p.device).mul_(scale)
                piece.copy_(round_stochastic(new, p.dtype, rounding))


def replay(parameters: Named, log: Sequence[tuple[int, Sequence[float], float]], seed: int, weight_decay: float = 0.0) -> None:
    """Repeat the updates of a run on tensors at its starting point. log: (step, [c_q], lr) per step; a step costs no forward."""
    for step, coefficients, lr in log:
        update(parameters, seed, step, list(coefficients), lr, weight_decay)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; its mode comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def perturbed_modules(model: nn.Module, names: dict[int, str], add: Callable[[tuple, str, Tensor, float], None],
                      moves: Moves) -> Iterator[None]:
    """Forwards in this scope see theta + sum of scale z; outside a module's forward its tensors are untouched. A tied tensor is
    owned by several modules and gets the same z in each. names: {id of a parameter: its name}."""
    handles, kept = [], {}

    def enter(module: nn.Module, _) -> None:
        for p in module.parameters(recurse=False):
            if id(p) in names and id(p) not in kept:
                kept[id(p)] = (p, p.detach().clone(), module)
                for key, scale in moves:
                    add(key, names[id(p)], p, scale)

    def leave(module: nn.Module, *_) -> None:
        for p in module.parameters(recurse=False):
            if id(p) in kept and kept[id(p)][2] is module:
                p.copy_(kept.pop(id(p))[1])

    try:
        if names:
            for module in model.modules():
                if any(id(p) in names for p in module.parameters(recurse=False)):
                    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, copy, _ in kept.values():
            p.copy_(copy)


def _generator(key: tuple, name: str, p: Tensor) -> torch.Generator:
    text = "/".join(str(part) for part in (*key, name))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device=p.device).manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def _pieces(p: Tensor) -> Iterator[Tensor]:
    """Views of p that together cover it, of at most PIECE values where its memory is in order."""
    if not p.is_contiguous():
        yield p.detach()
        return
    flat = p.detach().view(-1)
    for start in repeated.each(range(0, flat.numel(), PIECE)):
        yield flat[start:start + PIECE]


def noise(key: tuple, name: str, p: Tensor) -> Iterator[Tensor]:
    """z in the pieces of p, a function of key = (seed, step, sample) and name, in fp32 (fp64 for fp64)."""
    generator = _generator(key, name, p)
    kind = torch.float64 if p.dtype == torch.float64 else torch.float32
    for piece in _pieces(p):
        yield torch.randn(piece.shape, generator=generator, device=p.device, dtype=kind)


def add_noise(key: tuple, name: str, p: Tensor, scale: float | Tensor) -> None:
    """p += scale * z in place."""
    for piece, z in zip(_pieces(p), noise(key, name, p)):
        add_scaled(piece, z, scale)


def add_scaled(piece: Tensor, z: Tensor, scale: float | Tensor) -> None:
    """piece += scale * z in place; z is used up."""
    z.mul_(scale)
    if piece.dtype == z.dtype:
        piece.add_(z)
    else:
        piece.copy_(z.add_(piece))
