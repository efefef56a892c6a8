"""`make test-fast` takes every method through its start and its dense reference, and the first four through everything."""

import pytest

from adapter_support import EVERYWHERE

ALWAYS = ("test_start", "test_forward_is_the_dense_reference")
#: estimators that share their engine with mezo, or take many forwards a step
PRESETS = {"zo_sgd", "zo_sgd_sign", "zo_momentum", "zo_adam", "zo_conservative", "zo_blockwise", "sparse_mezo", "forward_gradient",
           "deepzero"}


def pytest_collection_modifyitems(items):
    for item in items:
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        if item.path.name == "test_adapters.py" and method and method not in EVERYWHERE and item.originalname not in ALWAYS:
            item.add_marker(pytest.mark.slow)
        if item.path.name == "test_estimators_selections.py" and getattr(item, "callspec", None):
            names = {str(v) for k, v in item.callspec.params.items() if k in ("name", "estimator")}
            if names & PRESETS:
                item.add_marker(pytest.mark.slow)
