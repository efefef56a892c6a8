"""`make test-fast` takes every method through its start and its dense reference, and the first four through everything."""

import pytest

from adapter_support import EVERYWHERE

ALWAYS = ("test_start", "test_forward_is_the_dense_reference")


def pytest_collection_modifyitems(items):
    for item in items:
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        if item.path.name == "test_adapters.py" and method and method not in EVERYWHERE and item.originalname not in ALWAYS:
            item.add_marker(pytest.mark.slow)
