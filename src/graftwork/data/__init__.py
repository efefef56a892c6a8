"""Data: files and formats to examples, chat templates and masks, packing, collation, batch order."""

from __future__ import annotations

import importlib

_HOME = {
    "Example": "example", "Source": "example",
    "find_files": "files", "read_file": "files", "read_rows": "files",
    "FORMATS": "formats", "Format": "formats", "data_format": "formats", "detect_format": "formats", "parse_message": "formats",
    "TRAIN_ON": "rendering", "Encoded": "rendering", "Renderer": "rendering",
    "assert_packable": "packing", "first_fit_decreasing": "packing",
    "ClassificationCollator": "collate", "Collator": "collate", "model_inputs": "collate", "real_tokens": "collate",
    "pad_token_of": "collate",
    "BatchOrder": "order", "DataConfig": "config",
    "Statistics": "loading", "TokenDataset": "dataset", "build": "dataset", "build_splits": "dataset",
    "describe_example": "dataset", "from_examples": "dataset", "hold_out": "dataset", "load_dataset_rows": "loading",
    "terminal_progress": "loading",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
