"""Experts of gpt-oss, whose parameters are transposed and have biases: sites, merges, PEFT, statistics and folders of codes."""

import warnings

import pytest
import torch

import graftwork
import tiny
from graftwork.modeling.models import load_model
from graftwork.modeling.source import pristine_weight
from graftwork.registry import make_config
from graftwork.storage import Storage, apply_storage

EXPERTS = "model.layers.1.mlp.experts"


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def filled(graft, size=0.1):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return graft


def test_sites_start_as_the_model_and_act_as_a_change_of_the_parameters():
    model, plain = tiny.gpt_oss(), tiny.gpt_oss(experts_implementation="eager")
    base = logits(model)
    torch.testing.assert_close(logits(plain), base, atol=1e-5, rtol=1e-5)
    graft = graftwork.attach(model, "lora", name="a", r=2, alpha=4, bias="lora_only")
    mine = {name: site for name, site in graft.sites.items() if site.expert is not None}
    assert len(mine) == 16 and mine[f"{EXPERTS}.gate_up_proj.3"].out_features == 192
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    filled(graft)
    with torch.no_grad():
        for name, site in graft.sites.items():
            adapter = graft.adapters[name]
            change = 2.0 * adapter.lora_B @ adapter.lora_A
            if site.expert is None:
                plain.get_submodule(name).weight += change
                plain.get_submodule(name).bias += adapter.bias_change
            else:
                plain.get_parameter(site.parameter_name)[site.expert] += change.T
                plain.get_parameter(f"{site.parameter_name}_bias")[site.expert] += adapter.bias_change
    wanted = logits(plain)
    assert (wanted - base).abs().max() > 0.1
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graft.merge()
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        torch.testing.assert_close(model.get_parameter(f"{EXPERTS}.{name}"), plain.get_parameter(f"{EXPERTS}.{name}"))
    graft.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    graft.detach()
    assert type(model.get_submodule(EXPERTS)).__name__ == "GptOssExperts" and torch.equal(logits(model), base)


@pytest.mark.slow
def test_rows_of_different_adapters_and_pristine_weights(tmp_path):
    model, _ = load_model(tiny.save(tiny.gpt_oss(), tmp_path))
    site = filled(graftwork.attach(model, "lora", name="a", r=2)).sites[f"{EXPERTS}.down_proj.2"]
    assert torch.equal(pristine_weight(model, site), model.get_parameter(f"{EXPERTS}.down_proj")[2].T)
    with graftwork.routing(model, ["a", None]):
        mixed = logits(model)
    with graftwork.routing(model, ["a", "a"]):
        torch.testing.assert_close(mixed[0], logits(model)[0], atol=1e-5, rtol=1e-5)
    with graftwork.routing(model, [None, None]):
        torch.testing.assert_close(mixed[1], logits(model)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("dora", {"r": 2}), ("ia3", {}), ("oft", {"block_size": 16})])
def test_methods_that_read_the_weight_or_the_bias_merge_as_they_act(method, options):
    model = tiny.gpt_oss()
    graft = filled(graftwork.attach(model, method, name="a", **options), 0.05)
    acting = logits(model)
    graft.merge()
    torch.testing.assert_close(logits(model), acting, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_adapters_go_to_peft_and_come_from_it(tmp_path):
    import peft

    from graftwork.errors import IncompatibleError
    from graftwork.interchange.peft import write_peft

    model = tiny.gpt_oss()
    graft = filled(graftwork.attach(model, "lora", name="a", r=2, alpha=5))
    wanted = logits(model)
    write_peft(graft, tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny.gpt_oss(), str(tmp_path / "x")).eval()
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-4, rtol=1e-4)
    other = tiny.gpt_oss()
    graftwork.attach_saved(other, tmp_path / "x")
    torch.testing.assert_close(logits(other), wanted, atol=1e-5, rtol=1e-5)
    biased = filled(graftwork.attach(tiny.gpt_oss(), "lora", name="a", r=2, bias="lora_only"))
    with pytest.raises(IncompatibleError, match="no bias beside expert parameters"):
        write_peft(biased, tmp_path / "y")


@pytest.mark.slow
def test_a_folder_of_codes_and_statistics_of_experts(tmp_path):
    from graftwork.compression.quantize import quantize
    from graftwork.storage.base import places
    from graftwork.storage.calibration.walk import _pass

    dense = tiny.save(tiny.gpt_oss(), tmp_path / "m")
    quantize(dense, tmp_path / "q", storage={"method": "int4", "group_size": 16})
    loaded, expected = graftwork.load(tmp_path / "q")[0], tiny.gpt_oss()
    config = make_config("storage", "int4", group_size=16)
    apply_storage(expected, config)
    stored = [name for name, module in loaded.named_modules() if isinstance(module, Storage)]
    assert len(stored) == 8 + 16 and torch.equal(logits(loaded), logits(expected))

    model, seen = tiny.gpt_oss(), {}
    module = model.get_submodule(EXPERTS)
    handle = module.register_forward_pre_hook(lambda _, args: seen.update(zip(("x", "chosen"), args)))
    wanted = [place for place in places(model, config) if place.name in (f"{EXPERTS}.gate_up_proj.1", f"{EXPERTS}.down_proj.1")]
    found = _pass(wanted, frozenset({"hessian"}), lambda watch: logits(model))
    handle.remove()
    x = seen["x"][(seen["chosen"] == 1).any(-1)].double()
    inner = module._apply_gate(x @ module.gate_up_proj[1].double() + module.gate_up_proj_bias[1].double())
    mine, wanted = found[f"{EXPERTS}.down_proj.1"].hessian.double(), inner.T @ inner
    torch.testing.assert_close(mine / mine.trace(), wanted / wanted.trace(), atol=1e-7, rtol=1e-4)
