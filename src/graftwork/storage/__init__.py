"""Storage: how the frozen weight of a site is kept and multiplied. One file a format; base.py has the contract."""

from .base import Storage, StorageConfig, apply_storage, storage_bits

__all__ = ["Storage", "StorageConfig", "apply_storage", "storage_bits"]
