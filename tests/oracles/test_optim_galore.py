"""GaLore against galore-torch, step by step, and against the identities of its equations."""

import galore_torch
import pytest
import torch

from graftwork.errors import UsageError
from graftwork.optim import optimizer

SHAPES = [(24, 16), (16, 24), (20, 20)]


def parameters(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_equals_galore_torch_over_three_refreshes(proj_type, decay):
    ours, plain = parameters(SHAPES), parameters([(7,), (6, 5)])
    theirs, plain_theirs = copies(ours), copies(plain)
    options = {"rank": 4, "update_proj_gap": 4, "scale": 0.25, "proj_type": proj_type}
    # At a refresh, `full` sees a diagonal R whose off-diagonal is rounding noise; a small eps would blow that noise up.
    eps = 1e-3 if proj_type == "full" else 1e-6
    mine = optimizer("galore", [{"params": ours, "role": "linear"}, {"params": plain, "role": "other"}], lr=1e-2,
                     weight_decay=decay, eps=eps, **options)
    reference = galore_torch.GaLoreAdamW([{"params": theirs, **options}, {"params": plain_theirs}], lr=1e-2, eps=eps,
                                         weight_decay=decay, no_deprecation_warning=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(11):
        for p, q in zip(ours + plain, theirs + plain_theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
        for p, q in zip(ours + plain, theirs + plain_theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=5e-7)
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(mine.state[p][key], reference.state[q][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_step_is_the_sign_of_the_projected_gradient(shape):
    (p,) = parameters([shape])
    before = p.detach().clone()
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    optimizer("galore", [p], lr=0.02, rank=3, scale=0.5, eps=1e-12).step()
    u, _, vh = torch.linalg.svd(p.grad.double(), full_matrices=False)
    if shape[0] >= shape[1]:
        expected = torch.sign(p.grad.double() @ vh[:3].T) @ vh[:3]
    else:
        expected = u[:, :3] @ torch.sign(u[:, :3].T @ p.grad.double())
    change = (before - p.detach()).double()
    assert (change - 0.02 * 0.5 * expected).norm() < 1e-3 * change.norm()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_full_rank_basis_makes_project_and_back_the_identity(svd):
    """With r = min(m, n) and no moments (betas 0) W moves by lr * sign-like N; R projected back must be G itself."""
    from graftwork.optim.base import Clock
    from graftwork.optim.residuals import Dropped
    from graftwork.optim.subspace import SVDSubspace, project
    for shape in SHAPES:
        for proj_type in ("std", "full"):
            subspace = SVDSubspace(99, 5, proj_type, randomized=svd == "randomized")
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            state = {k: torch.zeros(s, dtype=d) for k, (s, d) in subspace.slots(shape, torch.float64).items()}
            clock = Clock(1, 0, seed=3)
            subspace.refresh(grad, state, clock)
            basis = subspace.basis(grad, state, clock)
            low = project(grad, basis)
            weight = torch.zeros(shape, dtype=torch.float64)
            update, factor = Dropped(1.0).update(grad, low, low, basis, state, 1)  # N = R: SGD as the inner rule
            update.add_to(weight, -factor)
            torch.testing.assert_close(weight, -grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_randomized_svd_finds_the_dominant_subspace(shape):
    from graftwork.optim.subspace import top_vectors
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(shape[0], 40, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(shape[1], 40, generator=generator))[0]
    grad = u @ torch.diag(0.6 ** torch.arange(40.0)) @ v.T
    left, right = top_vectors(grad, 6, seed=1)
    assert (left.T @ left - torch.eye(6)).norm() < 1e-5 and (right @ right.T - torch.eye(6)).norm() < 1e-5
    assert (left.T @ u[:, :6]).pow(2).sum() / 6 > 0.9999 and (right @ v[:, :6]).pow(2).sum() / 6 > 0.9999
    again = top_vectors(grad, 6, seed=1)
    assert torch.equal(left, again[0]) and not torch.equal(left, top_vectors(grad, 6, seed=2)[0])


def test_randomized_svd_on_a_flat_spectrum():
    """Noise has no dominant subspace: power iterations must still catch nearly the energy of the best rank-6 view."""
    from graftwork.optim.subspace import top_vectors
    for seed in range(3):
        grad = torch.randn(120, 100, generator=torch.Generator().manual_seed(seed))
        best = torch.linalg.svdvals(grad)[:6].norm()
        assert (grad @ top_vectors(grad, 6, seed=seed)[1].T).norm() > 0.97 * best


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["flat", "slow", "fast"])
@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
def test_randomized_svd_has_the_error_it_says(shape, spectrum):
    from graftwork.optim.subspace import _OVERSAMPLE as p
    from graftwork.optim.subspace import _POWER_ITERATIONS as q
    from graftwork.optim.subspace import top_vectors
    generator, r, e = torch.Generator().manual_seed(3), 6, 2 * q + 1
    j = torch.arange(1.0, 81.0, dtype=torch.float64)
    values = {"flat": torch.ones_like(j), "slow": j ** -0.5, "fast": 0.7 ** j}[spectrum]
    u, v = (torch.linalg.qr(torch.randn(size, 80, generator=generator, dtype=torch.float64))[0] for size in shape)
    grad = u @ torch.diag(values) @ v.T
    tail = values[r:]
    extra = ((1 + (r / (p - 1)) ** 0.5) * tail[0] ** e + 2.718281828 * (r + p) ** 0.5 / p * (tail ** (2 * e)).sum().sqrt()) ** (1 / e)
    errors = []
    for seed in range(10):
        left, right = top_vectors(grad, r, seed=seed)
        errors += [torch.linalg.matrix_norm(grad - grad @ right.T @ right, 2), torch.linalg.matrix_norm(grad - left @ left.T @ grad, 2)]
    mean = torch.stack(errors).mean()
    assert tail[0] * (1 - 1e-9) <= mean <= tail[0] + extra
    if spectrum == "fast":
        assert mean < 1.02 * tail[0]  # in practice nearly the exact error


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_randomized_option_trains_like_the_exact_one(shape):
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)  # rank-3 gradients
    final = {}
    for svd in ("exact", "randomized"):
        p = torch.nn.Parameter(torch.zeros(shape))
        mine = optimizer("galore", [p], lr=0.01, rank=3, svd=svd, update_proj_gap=100)
        for _ in range(3):
            p.grad = low.clone()
            mine.step()
        assert ("seed" in mine.state[p]) == (svd == "randomized")
        final[svd] = p.detach() @ low.T if shape[0] < shape[1] else low.T @ p.detach()
    # Same subspace, possibly other signs and order of the basis: Adam's sign pattern moves with the basis up to signs.
    torch.testing.assert_close(final["exact"], final["randomized"], rtol=1e-2, atol=1e-2 * final["exact"].abs().max().item())


@pytest.mark.parametrize("proj_type", ["std", "left", "full"])
def test_moments_at_a_refresh(proj_type):
    """The second gradient's singular vectors are the first one's, reordered: rotation must only permute the moments."""
    generator = torch.Generator().manual_seed(6)
    u = torch.linalg.qr(torch.randn(14, 10, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    first = u @ torch.diag(torch.arange(10, 0, -1.0, dtype=torch.float64)) @ v.T
    swapped = torch.arange(10, 0, -1.0, dtype=torch.float64)
    swapped[:3] = torch.tensor([8.0, 9.0, 10.0])
    second = u @ torch.diag(swapped) @ v.T
    full = {}
    for moments in ("keep", "reset", "rotate"):
        p = torch.nn.Parameter(torch.zeros(14, 10, dtype=torch.float64))
        mine = optimizer("galore", [p], lr=0.0, rank=3, update_proj_gap=1, moments=moments, proj_type=proj_type)
        before = {}
        for grad in (first, second):
            p.grad = grad.clone()
            before = {k: t.clone() for k, t in mine.state[p].items()}
            mine.step()
        full[moments] = mine.state[p], before

    def lifted(state, moment):  # the first moment in full coordinates
        left, right = state.get("projection_left"), state.get("projection_right")
        moment = moment if left is None else left.T @ moment
        return moment if right is None else moment @ right

    b1, b2 = 0.9, 0.999
    for moments, (state, before) in full.items():
        low = lifted_project(second, state)
        carried = (state["exp_avg"] - (1 - b1) * low) / b1
        carried_sq = (state["exp_avg_sq"] - (1 - b2) * low ** 2) / b2
        if moments == "reset":
            assert carried.abs().max() < 1e-12 and carried_sq.abs().max() < 1e-12
        elif moments == "rotate":
            torch.testing.assert_close(lifted(state, carried), lifted(before, before["exp_avg"]))
            torch.testing.assert_close(carried_sq.flatten().sort()[0], before["exp_avg_sq"].flatten().sort()[0],
                                       rtol=1e-6, atol=1e-12)
        else:
            torch.testing.assert_close(carried, before["exp_avg"])


def lifted_project(grad, state):
    left, right = state.get("projection_left"), state.get("projection_right")
    low = grad if left is None else left @ grad
    return low if right is None else low @ right.T


def test_reset_restarts_the_bias_correction():
    """gap 1 with reset: every step is a first step, so each moves by lr * scale * sign(R) in the subspace."""
    p = torch.nn.Parameter(torch.zeros(8, 6))
    mine = optimizer("galore", [p], lr=0.1, rank=2, update_proj_gap=1, scale=1.0, moments="reset", eps=1e-12)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        p.grad = torch.randn(8, 6, generator=generator)
        before = p.detach().clone()
        mine.step()
        low = (before - p.detach()) @ mine.state[p]["projection_right"].T
        torch.testing.assert_close(low.abs(), torch.full_like(low, 0.1), rtol=1e-3, atol=1e-4)


def test_projection_owns_only_its_rows():
    """A slice of V^T or U would keep every singular vector alive, as the reference's does."""
    for shape in SHAPES:
        (p,) = parameters([shape])
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(8))
        mine = optimizer("galore", [p], lr=1e-2, rank=4)
        mine.step()
        for tensor in mine.state[p].values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_bf16_weights_step_through_fp32():
    (p,) = parameters([(24, 16)], torch.bfloat16)
    q = torch.nn.Parameter(p.detach().float())
    grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(9)).bfloat16()
    p.grad, q.grad = grad, grad.float()
    for each in (p, q):
        optimizer("galore", [each], lr=1e-2, rank=4, weight_decay=0.1).step()
    assert p.dtype == torch.bfloat16 and torch.equal(p.detach(), q.detach().bfloat16())


def test_bad_options_are_one_clear_error():
    (p,) = parameters([(4, 4)])
    with pytest.raises(UsageError, match="rank"):
        optimizer("galore", [p], ranks=4)
    with pytest.raises(UsageError, match="rank"):
        optimizer("galore", [p], rank=0)
    with pytest.raises(UsageError, match="draws no random numbers"):
        optimizer("galore", [p], rank=2).reseed(p, 3)
