"""Training on the Transformers Trainer and Accelerate."""

import importlib

_PUBLIC = {"GraftTrainer": ".trainer", "TrainerMixin": ".trainer", "TrainStep": ".step", "train_recipe": ".run"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module 'graftwork.training' has no attribute '{name}'")
