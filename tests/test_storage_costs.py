"""The table of costs and sizes of a model's matrices, against storing the model."""

import copy
from itertools import product

import pytest
import torch

import tiny
from graftwork.errors import UsageError
from graftwork.storage import Storage, apply_storage
from graftwork.storage._costs import configurations, cost_table
from graftwork.storage.calibration.statistics import InputStatistics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_table_is_what_storing_the_model_gives(name):
    model = tiny.ALL[name]()
    before = copy.deepcopy(model.state_dict())
    configs = configurations("lowrank_plus", base=[{"method": "nf", "bits": b, "group_size": g} for b, g in product((2, 4), (16, 32))],
                             r=[2], iterations=[2])
    seen = []
    table = cost_table(model, configs, on_site=seen.append)
    assert len(configs) == 4 and seen == table.names and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for column in (0, 3):
        stored = apply_storage(copy.deepcopy(model), configs[column])
        modules = {n: m for n, m in stored.named_modules() if isinstance(m, Storage)}
        assert set(modules) == set(table.names) and table.budget(2) == 2 * sum(m.in_features * m.out_features for m in modules.values())
        for site, cost, size in zip(table.names, table.cost, table.size):
            own = modules[site]
            assert size[column] == 8 * sum(leaf.numel() * leaf.itemsize for leaf in own.leaves().values())
            if f"{site}.weight" in before:
                error = ((own.dequantize() - before[f"{site}.weight"]).double() ** 2).sum()
                assert cost[column] == pytest.approx(float(error), rel=1e-5)
    assert all(row[0] > row[2] for row in table.cost) and all(row[0] < row[2] for row in table.size)


def test_statistics_weigh_the_errors_and_bad_input():
    model = tiny.llama()
    configs = configurations("int4", group_size=[16, 32], skip_modules=[["q_proj", "lm_head"]])
    site = "model.layers.0.self_attn.v_proj"
    weight = model.get_submodule(site).weight.detach()
    found = InputStatistics(weight.shape[1])
    found.add(torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0)))
    plain, weighted = cost_table(model, configs), cost_table(model, configs, statistics={site: found})
    found.fisher = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    fisher = cost_table(model, configs, statistics={site: found})
    assert not any("q_proj" in name for name in plain.names)
    at = plain.names.index(site)
    different = [i for i in range(len(plain.names)) if plain.cost[i] != weighted.cost[i]]
    assert different == [at] and fisher.cost[at] not in (plain.cost[at], weighted.cost[at])
    from graftwork.storage.base import make_storage

    difference = (make_storage(weight, "int4", configs[1]).dequantize() - weight).double()
    assert weighted.cost[at][1] == pytest.approx(float(((difference @ found.hessian.double()) * difference).sum()), rel=1e-6)
    assert fisher.cost[at][1] == pytest.approx(float((found.fisher.double() * difference**2).sum()), rel=1e-6)
    with pytest.raises(UsageError, match="configurations"):
        cost_table(model, [])
    with pytest.raises(UsageError, match="no option"):
        configurations("int4", bit=[1])
