"""Saved tensors with equal rows kept once: gradients of differentiable k-means exactly as without, bytes by formula, aliases."""

import pytest
import torch

from graftwork.errors import UsageError
from graftwork.modeling.saved_tensors import rows_saved_once


def clustered(weight, book, tau=0.02, rounds=3):
    """The forward of differentiable k-means of weights (N,) over a book (K,)."""
    w = weight.float().reshape(-1, 1)
    for _ in range(rounds):
        attention = (-((w - book) ** 2) / tau).softmax(-1)
        book = (attention.T @ w).squeeze(-1) / attention.sum(0)
    return (attention @ book).view_as(weight)


def weights(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def gradients(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad((out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_exactly_those_without(dtype):
    weight, book = weights(64, 300, dtype=dtype), torch.linspace(-2, 2, 8)
    plain, expected = gradients(clustered, weight, book)
    seen = []

    def hooked(w, b):
        with rows_saved_once(w) as saved:
            seen.append(saved)
            return clustered(w, b)

    value, found = gradients(hooked, weight, book)
    assert torch.equal(value, plain) and all(torch.equal(a, b) for a, b in zip(found, expected))
    distinct, n = len(weight.view(torch.int16).unique()), weight.numel()
    assert distinct < n and seen[0].bytes < seen[0].plain


@pytest.mark.slow
def test_bytes_are_two_a_weight_and_a_table():
    weight, book = weights(512, 512), torch.linspace(-2, 2, 16)
    with rows_saved_once(weight) as saved:
        attention = (-((weight.float().reshape(-1, 1) - book) ** 2) / 0.02).softmax(-1)
        attention.requires_grad_().exp()
    distinct, n = len(weight.view(torch.int16).unique()), weight.numel()
    assert saved.tensors == 1 and saved.plain == 16 * 4 * n  # exp saves what it returns
    assert saved.bytes == 2 * n + distinct * 16 * 4 < saved.plain / 10


def held(function):
    """Bytes of the distinct memories that autograd would keep."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
        out = function()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), out


def test_plain_bytes_are_what_autograd_holds():
    weight, book = weights(40, 100).requires_grad_(), torch.linspace(-2, 2, 8).requires_grad_()
    expected, _ = held(lambda: clustered(weight, book))
    with rows_saved_once(weight) as saved:
        clustered(weight, book)
    leaves = book.untyped_storage().nbytes()
    assert saved.plain in (expected, expected - leaves) and saved.tensors > saved.aliases > 0


def test_views_and_transposed_tensors_refer_to_one():
    key = weights(1000)
    rows = key.float()[:, None] * torch.arange(1, 6)
    x = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def product():
        return (rows @ x).sum() + (rows.T[:, 10:50] * x[:, :1]).sum() + (rows[::2] @ x).square().sum()

    expected = torch.autograd.grad(product(), x)[0]
    with rows_saved_once(key) as saved:
        out = product()
    assert saved.aliases >= 2 and torch.equal(torch.autograd.grad(out, x)[0], expected)


def test_what_does_not_repeat_is_kept_as_it_is():
    key, x = torch.zeros(100, dtype=torch.bfloat16), torch.randn(100, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = torch.autograd.grad((x * 2).exp().square().sum(), x)[0]
    with rows_saved_once(key) as saved:
        out = (x * 2).exp().square().sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], expected) and saved.bytes == saved.plain
    with rows_saved_once(key) as saved:  # equal as numbers, different as bits; NaN
        signed = torch.tensor([0.0, -0.0]).repeat(50).requires_grad_()
        torch.atan2(signed * 1, torch.full((100,), float("nan"))).sum()
    assert saved.bytes > 4 * 100
    with pytest.raises(UsageError, match="16 bits"), rows_saved_once(torch.zeros(3)):
        pass


@pytest.mark.slow
def test_changes_in_place_and_second_derivatives():
    key = torch.zeros(8, dtype=torch.bfloat16)
    x = torch.linspace(0, 1, 8).requires_grad_()
    with rows_saved_once(key):
        y = x * 1
        out = (y * y.sin()).sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        out.backward()
    repeated = torch.full((8,), 0.5).requires_grad_()
    with rows_saved_once(key):
        y = repeated * 1
        out = (y * y.sin()).sum()
    with torch.no_grad():
        y.mul_(2)  # what was kept is a copy
    torch.testing.assert_close(torch.autograd.grad(out, repeated)[0], torch.full((8,), 0.5).sin() + 0.5 * torch.full((8,), 0.5).cos())
    with rows_saved_once(key):
        assert torch.autograd.gradgradcheck(lambda v: v.exp() * v.sin(), torch.linspace(0, 1, 4).double().requires_grad_())


def test_what_an_operation_saved_goes_with_it():
    import gc

    from torch.multiprocessing.reductions import StorageWeakRef

    key, x = torch.zeros(100, dtype=torch.bfloat16), torch.randn(100, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with rows_saved_once(key):
        first, second = (x * 2).exp(), (x * 3).exp()
    memory = StorageWeakRef(first.untyped_storage())
    first.sum().backward()
    del first
    gc.collect()
    assert memory.expired()
    second.sum().backward()
