"""Adapters: the learned change of a site. One file a method; base.py has the contract, attach.py puts them on a model."""

from .attach import attach
from .base import Adapter, AdapterConfig, Bank, pattern_value
from .graft import Graft, MergeReport
from .routing import routing

__all__ = ["Adapter", "AdapterConfig", "Bank", "Graft", "MergeReport", "attach", "pattern_value", "routing"]
