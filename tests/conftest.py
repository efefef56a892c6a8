"""Shared fixtures. Tests run offline, on two threads a worker at most, and never write to the user's cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="default device of new tensors, for `make gpu-check`")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """A cache of the test session, unless the caller names one (GRAFTWORK_TEST_CACHE keeps converted models between runs)."""
    kept = os.environ.get("GRAFTWORK_TEST_CACHE")
    folder = kept or tmp_path_factory.getbasetemp() / "graftwork-cache"
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
