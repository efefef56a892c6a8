"""Optimizers: plain `torch.optim.Optimizer`s, most of them composed from the stages subspace -> rule -> residual -> apply."""

from .base import (
    BaseOptimizer,
    CommonConfig,
    OptimizerConfig,
    load_optimizer_state,
    optimizer,
    optimizer_state_tensors,
    set_learning_rates,
)
from .groups import parameter_groups

__all__ = ["BaseOptimizer", "CommonConfig", "OptimizerConfig", "load_optimizer_state", "optimizer", "optimizer_state_tensors",
           "parameter_groups", "set_learning_rates"]
