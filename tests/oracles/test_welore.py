"""WeLore: truncated SVDs, the threshold against bisection and a count by hand, both rules, equal size against uniform ranks, runs."""

from __future__ import annotations

import pytest
import torch

import graftwork
import tiny
from adapter_support import close, output
from graftwork.errors import GraftworkError
from graftwork.initializers.welore import normalized, threshold
from graftwork.modeling.sites import find_sites
from graftwork.registry import lookup, make_config

IDS = tiny.tokens(2, 7)


def decaying(seed=0):
    """A tiny Llama whose weights have spectra i^-p with p from 0.1 to 2.5, and largest singular values around 3."""
    model = tiny.llama(seed=seed)
    sites = find_sites(model, "all-linear")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, site in enumerate(sites):
            W = site.module.weight
            U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
            p = 0.1 + 2.4 * ((7 * i) % len(sites)) / (len(sites) - 1)
            top = 2.5 + float(torch.rand(1, generator=generator))
            W.copy_((U * (top * torch.arange(1, len(S) + 1, dtype=torch.float64) ** -p)) @ V)
    return model, sites


def started(model, adapter=None, **options):
    return graftwork.attach(model, "welore", initializer={"method": "welore", **options}, **(adapter or {}))


def kept_values(sites, ranks):
    """Values of the compressed weights: pairs, and what stays dense."""
    return sum(ranks.get(s.name, 0) * (s.out_features + s.in_features) or s.out_features * s.in_features for s in sites)


def test_pairs_are_the_truncated_svd_and_balanced():
    """Eckart-Young and B^T B = A A^T = S_k; square, wide and tall; and GPT-2's slices, whose bias is kept."""
    for model, targets in ((tiny.llama(), "all-linear"), (tiny.gpt2(), "q,v,up,down")):
        graft = graftwork.attach(model, "welore", r=9, target_modules=targets)
        assert {a.r for a in graft.adapters.values()} == {9}
        for name, a in graft.adapters.items():
            W = graft.sites[name].product.dense().detach().double()
            S = torch.linalg.svdvals(W)
            B, A = a.B.detach().double(), a.A.detach().double()
            torch.testing.assert_close((W - B @ A).square().sum(), S[9:].square().sum(), rtol=1e-5, atol=0)
            for gram in (B.T @ B, A @ A.T):
                torch.testing.assert_close(gram, S[:9].diag(), rtol=1e-5, atol=1e-5)
            x = torch.randn(3, a.in_features, generator=torch.Generator().manual_seed(0))
            bias = graft.sites[name].product.bias
            close(a(x, graft.base_of(graft.sites[name])), x.double() @ A.T @ B.T + (0.0 if bias is None else bias.double()), 1e-5)


@pytest.mark.slow
def test_full_rank_is_the_model():
    for model in (tiny.llama(), tiny.gpt2()):
        before = output(model, IDS)
        smallest = {s.name: min(s.out_features, s.in_features) for s in find_sites(model, "all-linear")}
        graftwork.attach(model, "welore", ranks=smallest)
        close(output(model, IDS), before, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [0.01, 0.2, 0.5, 0.77, 0.99])
def test_the_threshold_is_where_bisection_ends(reduction):
    _, sites = decaying()
    spectra = {s.name: normalized(torch.linalg.svdvals(s.product.dense().detach().double())) for s in sites}
    total = sum(map(len, spectra.values()))

    def pruned(theta):
        return sum(int((s < theta).sum()) for s in spectra.values())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pruned(middle) <= reduction * total else (low, middle)
    theta = threshold(spectra, reduction)
    sides = [pruned(low), pruned(high)]  # equal values: every weight has a 0 and a 1
    assert pruned(theta) == min(sides, key=lambda n: abs(n - reduction * total))
    if len(sites) <= reduction * total <= total - len(sites):
        assert sides[1] - sides[0] == 1 and abs(pruned(theta) - reduction * total) <= 0.5


def test_equal_singular_values():
    """Ties: the nearer side is taken, a weight without a spread stays whole, and theta never leaves a weight without a rank."""
    spectra = {"a": torch.tensor([1.0, 0.5, 0.5, 0.5, 0.0]), "b": torch.tensor([1.0, 0.9, 0.8, 0.7, 0.0])}
    assert [round(threshold(spectra, share), 3) for share in (0.05, 0.15, 0.3, 0.4, 0.6, 0.99)] == [0.0, 0.5, 0.5, 0.7, 0.8, 1.0]
    assert torch.equal(normalized(torch.full((4,), 3.0)), torch.ones(4)) and torch.equal(normalized(torch.zeros(2)), torch.ones(2))
    torch.testing.assert_close(normalized(torch.tensor([5.0, 3.0, 1.0])), torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["break_even", "half"])
def test_sites_that_pay_become_pairs_and_the_others_stay(rule):
    model, sites = decaying()
    dense = {s.name: s.module.weight.detach().clone() for s in sites}
    spectra = {n: torch.linalg.svdvals(W.double()) for n, W in dense.items()}
    shares = {n: (s - s[-1]) / (s[0] - s[-1]) for n, s in spectra.items()}
    theta = threshold(shares, 0.5)
    wanted = {}
    for s in sites:
        k, smaller = int((shares[s.name] >= theta).sum()), min(s.out_features, s.in_features)
        gain = k * (s.out_features + s.in_features) < s.out_features * s.in_features
        if gain if rule == "break_even" else (smaller - k) / smaller > 0.4999:
            wanted[s.name] = k
    graft = started(model, rule=rule)
    assert {n: a.r for n, a in graft.adapters.items()} == wanted and 0 < len(wanted) < len(sites)
    assert graft.parameter_count() == sum(k * sum(dense[n].shape) for n, k in wanted.items())
    assert kept_values(sites, wanted) < sum(W.numel() for W in dense.values())
    output(model, IDS).square().mean().backward()
    assert all((p.grad is not None) == (".graft." in n) for n, p in model.named_parameters())
    assert all(torch.equal(s.module.weight, dense[s.name]) for s in sites)
    most = lookup("initializer", "welore").cls(make_config("initializer", "welore", rule=rule)).plan(sites, graft.config)
    assert all(k <= most[n] for n, k in wanted.items())


def test_the_rules_differ_for_rectangles():
    """4:1 pays up to 0.8 a, and the official code's rule stops at half of a; square weights are the same to one value."""
    shape = type("Shape", (), {})
    sites = []
    for name, out, into in (("square", 64, 64), ("wide", 64, 256), ("vector", 1, 64)):
        sites.append(shape())
        sites[-1].name, sites[-1].out_features, sites[-1].in_features = name, out, into
    plans = {rule: lookup("initializer", "welore").cls(make_config("initializer", "welore", rule=rule)).plan(sites, None)
             for rule in ("break_even", "half")}
    assert plans == {"break_even": {"square": 31, "wide": 51, "vector": 0}, "half": {"square": 32, "wide": 32, "vector": 0}}
    for rule, plan in plans.items():
        for s in sites:
            a = min(s.out_features, s.in_features)
            pays = [k for k in range(1, a + 1) if (k * (s.out_features + s.in_features) < s.out_features * s.in_features
                                                   if rule == "break_even" else (a - k) / a > 0.4999)]
            assert plan[s.name] == max(pays, default=0)


@pytest.mark.slow
def test_at_equal_size_it_is_closer_than_uniform_ranks():
    """Relative squared error of the weights and the model's own outputs, against pairs everywhere at the same share of each weight."""
    model, sites = decaying()
    before = output(model, IDS).detach()
    graft = started(model, reduction=0.6)
    ranks = {n: a.r for n, a in graft.adapters.items()}
    size, full = kept_values(sites, ranks), sum(s.out_features * s.in_features for s in sites)

    def errors(graft):
        relative = [float(change.double().square().sum() / graft.sites[n].module.weight.double().square().sum())
                    for n, change in graft.delta_weights().items()]
        with torch.no_grad():
            return sum(relative), float((output(model, IDS) - before).norm() / before.norm())

    ours = errors(graft)
    graft.detach()
    assert torch.equal(output(model, IDS), before)
    uniform = {s.name: -(-size * s.out_features * s.in_features // (full * (s.out_features + s.in_features))) for s in sites}
    assert kept_values(sites, uniform) >= size, "the other has no fewer values"
    theirs = errors(graftwork.attach(model, "welore", ranks=uniform))
    assert ours[0] < 0.8 * theirs[0] and ours[1] < 0.8 * theirs[1], (ours, theirs)


@pytest.mark.slow
def test_merged_and_saved_it_is_dense_again(tmp_path):
    model, sites = decaying()
    graft = started(model)
    learned = output(model, IDS)
    graft.save(tmp_path / "g")
    graft.merge()
    close(output(model, IDS), learned, 1e-4)
    for s in sites:
        rank = torch.linalg.matrix_rank(s.module.weight.double(), rtol=1e-5)
        assert s.module.weight.numel() == s.out_features * s.in_features
        assert rank == (graft.adapters[s.name].r if s.name in graft.adapters else min(s.out_features, s.in_features))
    again, _ = decaying()
    loaded = graftwork.attach_saved(again, tmp_path / "g")
    assert torch.equal(output(again, IDS), learned) and loaded.adapters.keys() == graft.adapters.keys()


@pytest.mark.slow
def test_it_is_planned_from_above_runs_and_resumes(tmp_path):
    import training_support as support

    made, whole = support.plans_runs_and_resumes(tmp_path, adapter={"method": "welore"},
                                                 initializer={"method": "welore", "reduction": 0.7})
    graft = whole.grafts[0]
    assert 0 < graft.parameter_count() <= made.trained and any("upper bound" in note for note in made.notes)
    assert graft.initializer == {"method": "welore", "reduction": 0.7, "rule": "break_even"}
    # the start that belongs to the method, when the recipe names none
    from graftwork.recipe import load_recipe

    document = support.recipe(support.folder(tmp_path), tmp_path / "d.jsonl", tmp_path / "r", adapter={"method": "welore"})
    assert load_recipe(document).initializer.reduction == 0.5


@pytest.mark.slow
def test_what_cannot_be_is_refused():
    for options in ({"r": 4}, {"rank_pattern": {"q_proj": 3}}):
        with pytest.raises(GraftworkError, match="chooses every rank"):
            started(tiny.llama(), options)
    with pytest.raises(GraftworkError, match="no weight becomes a pair"):
        started(tiny.llama(), reduction=0.01)
    with pytest.raises(GraftworkError, match="allows 64"):
        graftwork.attach(tiny.llama(), "welore", r=65)
    with pytest.raises(GraftworkError, match="starts welore"):
        graftwork.attach(tiny.llama(), "lora", initializer="welore")
    ranks = {n.rpartition(".")[2]: a.r for n, a in graftwork.attach(tiny.llama(), "welore", rank_pattern={"q_proj": 3}).adapters.items()}
    assert ranks == {"q_proj": 3, "o_proj": 31, "k_proj": 21, "v_proj": 21, "gate_proj": 38, "up_proj": 38, "down_proj": 38}
