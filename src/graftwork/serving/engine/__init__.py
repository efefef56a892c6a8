"""The serving engine: a packed batch a step, a pool of pages, a scheduler; see engine.py."""

from .engine import Engine
from .request import Request, Sampling, Status
from .scheduler import Limits

__all__ = ["Engine", "Limits", "Request", "Sampling", "Status"]
