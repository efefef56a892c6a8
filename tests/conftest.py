"""Shared fixtures. Tests run offline, on two threads a worker at most, and never write to the user's cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, so that a change is judged by what it changed; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="default device of new tensors, for `make gpu-check`")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


#: modules that take minutes, longest first
LONG = ("test_adapters.py", "test_plan.py", "test_storages.py", "test_resume.py", "test_estimators_selections.py", "test_serving_load.py",
        "test_training.py", "test_optimizers.py", "test_quantize.py")


def pytest_collection_modifyitems(items):
    """Long modules go first: with `--dist loadscope --no-loadscope-reorder` a module is one worker's, and none is left to be waited for
    in the end."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """A cache of the test session, unless the caller names one (GRAFTWORK_TEST_CACHE keeps converted models between runs)."""
    kept = os.environ.get("GRAFTWORK_TEST_CACHE")
    folder = kept or tmp_path_factory.getbasetemp() / "graftwork-cache"
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
