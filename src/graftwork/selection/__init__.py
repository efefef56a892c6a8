"""Selections: what trains when, and how capacity moves. base.py has the contract."""

from .base import Selection, SelectionContext

__all__ = ["Selection", "SelectionContext"]
