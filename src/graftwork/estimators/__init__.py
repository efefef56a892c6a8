"""Estimators: where gradients come from. base.py has the contract."""

from .base import Estimator, StepContext, StepResult

__all__ = ["Estimator", "StepContext", "StepResult"]
