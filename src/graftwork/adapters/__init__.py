"""Adapters: the learned change of a site. One file a method; base.py has the contract, graft.py attaches."""

from .base import Adapter, AdapterConfig, Bank, pattern_value
from .graft import Graft, MergeReport, attach, routing

__all__ = ["Adapter", "AdapterConfig", "Bank", "Graft", "MergeReport", "attach", "pattern_value", "routing"]
