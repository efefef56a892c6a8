"""Objectives: from a batch to a loss. base.py has the contract, _head.py the chunked output head."""

from .base import LossOutput, Objective

__all__ = ["LossOutput", "Objective"]
