"""What every registered optimizer must do, asked of the registry: a new one is tested without being named here."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftwork.errors import ArtifactError, UsageError
from graftwork.optim import load_optimizer_state, optimizer, optimizer_state_tensors, parameter_groups, set_learning_rates
from graftwork.registry import lookup, methods

NAMES = [info.name for info in methods("optimizer")]
PROJECTING = [info.name for info in methods("optimizer") if info.traits["projects"]]
#: options that make a tiny run cross a refresh; kept only where a method has them
SMALL = {"rank": 3, "update_proj_gap": 4}
VARIANTS = [(name, {}) for name in NAMES] + [
    ("galore", {"svd": "randomized"}), ("galore", {"proj_type": "full", "moments": "rotate"}),
    ("galore", {"proj_type": "reverse_std", "moments": "reset"}), ("apollo", {"projection": "cached"}),
    ("apollo", {"growth_limit": None, "scale_type": "tensor"}), ("adamw", {"state_dtype": "bfloat16"}),
    ("galore", {"state_dtype": "bfloat16"}), ("apollo", {"projection": "cached", "state_dtype": "bfloat16"})]
#: left to the full run
SLOW = [
    ("adamw", {"rounding": "stochastic"}), ("adamw", {"rounding": "kahan"}), ("galore", {"rounding": "kahan"}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "state_dtype": "bfloat16"}), ("lion", {"rounding": "kahan"}),
    ("adafactor", {"beta1": 0.9, "scale_parameter": True}), ("adam_mini", {"state_dtype": "bfloat16"}),
    ("came", {"state_dtype": "bfloat16", "rounding": "kahan"}),
    ("muon", {"adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32", "rounding": "stochastic"}),
    ("adamw8bit", {"min_8bit_size": 5}), ("galore", {"state": "8bit", "min_8bit_size": 5}),
    ("galore", {"state": "8bit", "min_8bit_size": 5, "moments": "rotate"}),
    ("apollo", {"state": "8bit", "min_8bit_size": 5}), ("fira", {"state": "8bit", "min_8bit_size": 5}),
    ("q_galore", {"min_8bit_size": 5, "similarity": "cosine", "queue_size": 1, "update_proj_gap": 1, "quant_group_size": 16}),
    ("q_galore", {"svd": "randomized", "queue_size": 1, "cos_threshold": -1.0, "gamma_proj": 1.5, "state": "dense"}),
    ("q_galore", {"projection": "dense", "cos_threshold": None, "rounding": "nearest"}),
    ("fira", {"svd": "randomized", "growth_limit": None}), ("frugal", {"subspace": "random", "moments": "keep"}),
    ("natural_galore", {"history": 3, "moments": "rotate"}), ("subtrack", {"state_dtype": "bfloat16"}),
    ("gradnormlorp", {"proj_type": "full", "state_dtype": "bfloat16"}), ("cosmos", {"state_dtype": "bfloat16", "gamma": 0.0})]
#: learning rate of a method over Adam's, where Adam's would not do
RATES = {"sgd": 10.0, "lomo": 20.0, "adalomo": 5.0, "adafactor-scaled": 5.0}
SHAPES = [(24, 16), (16, 24), (8, 8), (12, 1), (5,), ()]
#: what the fast run takes of every kind
QUICK = ("adamw", "galore", "apollo", "sgd")
every = pytest.mark.parametrize("name, options", [pytest.param(*v, marks=[pytest.mark.slow] if v in SLOW or v[0] not in QUICK else [])
                                                  for v in [*VARIANTS, *SLOW]],
                                ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))


def build(name, target, lr=1e-2, **options):
    known = lookup("optimizer", name).config.model_fields
    small = {key: value for key, value in SMALL.items() if key in known and not (name == "apollo_mini" and key == "rank")}
    return optimizer(name, target, lr=lr, **{**small, **options})


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(built, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        built.step()


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.LayerNorm(8))
                                    for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


def tiny(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().to(dtype)


def loss_of(model, step):
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step))
    logits = model(tokens)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_the_suite_covers_the_registry():
    assert {name for name, _ in VARIANTS} == set(NAMES) >= {"adamw", "galore", "apollo", "apollo_mini"}
    assert all(lookup("optimizer", name).traits["fused_capable"] for name in NAMES)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state_bytes_are_exact(name, options, dtype):
    params = parameters(dtype)
    built = build(name, params, **options)
    run(built, params, 2)
    for p in params:
        tensors = list(built.state[p].values())
        assert all(isinstance(t, torch.Tensor) for t in tensors)
        counted = sum(t.untyped_storage().nbytes() for t in tensors)
        assert counted == type(built).state_bytes(p.shape, dtype, config=built.config)
        kept = torch.float64 if dtype == torch.float64 else getattr(torch, built.config.state_dtype)
        assert all(t.dtype == kept for k, t in built.state[p].items() if k == "exp_avg")


def test_state_bytes_follow_the_published_formulas():
    """For SmolLM2's up projection, rank 64: a r + 2 b r (GaLore), 2 b r (APOLLO) elements, plus step, seed and norm."""
    b, a, r = 1536, 576, 64

    def size(name, **options):
        return lookup("optimizer", name).cls.state_bytes((b, a), torch.bfloat16, **options)

    assert size("adamw") == 4 * 2 * a * b + 4
    assert size("galore", rank=r) == 4 * (a * r + 2 * b * r) + 4
    assert size("galore", rank=r, state_dtype="bfloat16") == 2 * (a * r + 2 * b * r) + 4
    assert size("galore", rank=r, svd="randomized") == 4 * (a * r + 2 * b * r) + 4 + 8
    assert size("galore", rank=r, proj_type="full") == 4 * ((a + b) * r + 2 * r * r) + 4
    assert size("galore", rank=r, proj_type="reverse_std") == 4 * (b * r + 2 * a * r) + 4
    assert size("galore", rank=r, role="other") == 4 * 2 * a * b + 4
    assert size("apollo", rank=r) == 4 * 2 * b * r + 4 + 8 + 4
    assert size("apollo", rank=r, projection="cached") == 4 * (a * r + 2 * b * r) + 16
    assert size("apollo", rank=r, growth_limit=None) == 4 * 2 * b * r + 12
    assert size("apollo_mini") == 4 * 2 * b + 16


@every
def test_learns_and_is_deterministic(name, options):
    finals = []
    for _ in range(2):
        model = tiny()
        rate = RATES.get(f"{name}-scaled" if options.get("scale_parameter") else name, 1.0)
        built = build(name, model, lr=2e-2 * rate, **options)
        first = loss_of(model, 0).item()
        for _ in range(15):
            built.zero_grad()
            loss_of(model, 0).backward()
            built.step()
        last = loss_of(model, 0).item()
        assert last < 0.8 * first
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [3, 6])
def test_resume_is_bit_exact_inside_a_refresh_interval(name, options, dtype, at):
    params = parameters(dtype)
    names = {p: f"layer.{i}.weight" for i, p in enumerate(params)}
    built = build(name, params, **options)
    set_learning_rates(built, 0.5)
    run(built, params, at)
    tensors, header = optimizer_state_tensors(built, names)
    data, text = save(tensors), json.dumps(header)
    weights = [p.detach().clone() for p in params]
    run(built, params, 6, first=at)

    resumed = [nn.Parameter(w.clone()) for w in weights]
    again = build(name, resumed, lr=1.0, **options)
    load_optimizer_state(again, load(data), json.loads(text), {p: names[q] for p, q in zip(resumed, params)})
    run(again, resumed, 6, first=at)
    for p, q in zip(params, resumed):
        assert torch.equal(p, q)
        assert built.state[p].keys() == again.state[q].keys()
        assert all(torch.equal(built.state[p][k], again.state[q][k]) for k in built.state[p])


@every
def test_torch_state_dict_is_bit_exact_too(name, options):
    params = parameters(torch.bfloat16)
    built = build(name, params, **options)
    run(built, params, 6)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    again = build(name, resumed, lr=1.0, **options)
    again.load_state_dict(built.state_dict())
    run(built, params, 6, first=6)
    run(again, resumed, 6, first=6)
    for p, q in zip(params, resumed):
        assert torch.equal(p, q) and all(built.state[p][k].dtype == again.state[q][k].dtype for k in built.state[p])


@every
def test_loading_refuses_what_differs(name, options):
    params = parameters()
    names = {p: f"p{i}" for i, p in enumerate(params)}
    built = build(name, params, **options)
    run(built, params, 1)
    tensors, header = optimizer_state_tensors(built, names)
    wrong = dict(tensors)
    wrong["p0.exp_avg"] = torch.zeros(2, 2)
    renamed = {k.replace("p1.step", "p1.steps"): v for k, v in tensors.items()}
    before = {k: v.clone() for k, v in tensors.items()}
    for bad, match in ((wrong, "p0.exp_avg'"), (renamed, "p1.step'"), ({**tensors, "q.step": torch.zeros(())}, "'q.step'")):
        with pytest.raises(ArtifactError, match=match):
            load_optimizer_state(built, bad, header, names)
    with pytest.raises(ArtifactError, match="other"):
        load_optimizer_state(built, tensors, {**header, "method": "other"}, names)
    with pytest.raises(ArtifactError, match="groups"):
        load_optimizer_state(built, tensors, {**header, "groups": []}, names)
    with pytest.raises(UsageError, match="no name"):
        optimizer_state_tensors(built, {})
    after, _ = optimizer_state_tensors(built, names)
    assert all(torch.equal(before[k], after[k]) for k in before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_updates_equal_the_step(name, options, dtype):
    finals = []
    for fused in (False, True):
        model = tiny(dtype)
        built = build(name, model, fused=fused, weight_decay=0.1, **options)
        for step in range(6):
            set_learning_rates(built, 1.0 - step / 10)
            loss_of(model, step).backward()
            if fused:
                assert all(p.grad is None for p in model.parameters())
                before = [p.detach().clone() for p in model.parameters()]
                built.step()
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
            built.step()
            built.zero_grad()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


def test_fused_holds_one_gradient_at_a_time_and_no_reference_cycle():
    model = tiny()
    built = build("adamw", model, fused=True)
    held = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: held.append(sum(q.grad is not None for q in model.parameters())))
    loss_of(model, 0).backward()
    assert max(held) == 0  # our hook came first and freed the gradient already
    reference = weakref.ref(built)
    del built
    assert reference() is None
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())  # without the optimizer, gradients stay


def test_fused_reaches_layers_that_were_frozen_at_first():
    model = tiny()
    model.layers[0].requires_grad_(False)
    built = optimizer("adamw", model, lr=0.1, trainable=list(model.parameters()), fused=True)
    assert not any(p.requires_grad for p in model.layers[0].parameters())
    weight = model.layers[0][0].weight
    before = weight.detach().clone()
    loss_of(model, 0).backward()
    assert torch.equal(weight, before) and weight not in built.state
    weight.requires_grad_(True)
    loss_of(model, 0).backward()
    assert not torch.equal(weight, before)


def test_fused_conflicts_give_reasons():
    cls = lookup("optimizer", "galore").cls
    assert cls.fused_conflicts(1, None, False) == []
    reasons = cls.fused_conflicts(4, 1.0, True)
    assert len(reasons) == 3 and "4 accumulated" in reasons[0] and "clipping" in reasons[1] and "selection" in reasons[2]


@every
def test_drop_frees_and_restarts(name, options):
    params = parameters()
    built = build(name, params, **options)
    run(built, params, 6)
    assert params[0] in built.state
    for p in params:
        built.drop(p)
        p.grad = None
    built.step()
    assert not any(built.state.get(p) for p in params)  # nothing is allocated without a gradient
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    run(built, params, 5)
    run(build(name, fresh, **options), fresh, 5)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh))
    with pytest.raises(UsageError, match="no such parameter"):
        built.drop(nn.Parameter(torch.zeros(1)))


@every
@pytest.mark.parametrize("fused", [False, True])
def test_replace(name, options, fused):
    params = parameters()
    built = build(name, params, fused=fused, **options)

    def go(current, steps, first):
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in current).backward()
            built.step()
            built.zero_grad()

    go(params, 3, 0)
    old, state = params[0], built.state[params[0]]
    same = nn.Parameter(old.detach().clone())
    larger = nn.Parameter(torch.zeros(32, 16))
    built.replace(old, same)
    built.replace(params[1], larger)
    assert built.state[same] is state and old not in built.state and params[1] not in built.state
    current = [same, larger, *params[2:]]
    assert [p for group in built.param_groups for p in group["params"]] == current
    go(current, 2, 3)
    assert built.state[same]["step"] == 5 and built.state[larger]["step"] == 2
    assert larger.detach().abs().max() > 0
    before = old.detach().clone()
    (old.sum() * 1.0).backward()
    built.step()
    assert torch.equal(old, before)


@pytest.mark.parametrize("name, options", [("apollo", {}), ("apollo_mini", {}), ("galore", {"svd": "randomized", "rank": 1})])
def test_reseed_changes_the_projection_and_survives_saving(name, options):
    shapes = [(40, 30)]
    finals = []
    for seed in (None, 7, 7):
        params = parameters(shapes=shapes)
        built = build(name, params, **options)
        run(built, params, 2)
        if seed is None:
            built.drop(params[0])
        else:
            built.reseed(params[0], seed)
            tensors, header = optimizer_state_tensors(built, {params[0]: "w"})
            assert set(tensors) == {"w.seed"}
            load_optimizer_state(built, {k: v.clone() for k, v in tensors.items()}, header, {params[0]: "w"})
        run(built, params, 3)
        finals.append(params[0].detach())
    assert torch.equal(finals[1], finals[2]) and not torch.equal(finals[0], finals[1])


@every
def test_runs_on_fake_tensors_with_the_same_state(name, options):
    def layout():
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        built = build(name, params, **options)
        for _ in range(6):
            for p in params:
                p.grad = torch.ones_like(p)
            built.step()
        return {k: (tuple(t.shape), t.dtype) for i, p in enumerate(params) for k, t in
                ((f"{i}.{k}", t) for k, t in built.state[p].items())}

    with FakeTensorMode():
        fake = layout()
    assert fake == layout()


def test_groups_of_a_model():
    model = tiny()
    groups = parameter_groups(model, weight_decay=0.1)
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    assert where[id(model.layers[0][0].weight)]["role"] == "linear"
    assert where[id(model.embed.weight)]["role"] == "other" and where[id(model.embed.weight)]["weight_decay"] == 0.1
    for p in (model.layers[0][0].bias, model.layers[1][3].weight):
        assert where[id(p)]["role"] == "other" and where[id(p)]["weight_decay"] == 0.0
    model.layers.requires_grad_(False)
    assert all(group["role"] == "other" for group in parameter_groups(model))
    assert len(parameter_groups(model, trainable=model.parameters())) == 3
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable"):
        parameter_groups(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_of_transformers_models(family):
    import transformers
    if family == "llama":
        config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    else:
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {id(p) for group in parameter_groups(model) if group["role"] == "linear" for p in group["params"]}
    found = {name for name, p in model.named_parameters() if id(p) in linear}
    per_layer = 7 if family == "llama" else 4
    assert len(found) == 2 * per_layer and not any("embed" in n or "head" in n or "wte" in n for n in found)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES])
def test_group_options_reach_the_update(name):
    """lr_scale multiplies the move; a group of role other is not projected; a frozen rate moves nothing."""
    moves, small = [], 0.1 if name == "gradnormlorp" else 1.0  # rows of fixed length move along an arc: a short one is a line
    for group in ({"lr_scale": 1.0}, {"lr_scale": 4.0}, {"lr": 2e-2}, {"lr_scale": 0.0, "weight_decay": 0.5}):
        (p,) = parameters(shapes=[(24, 16)])
        before = p.detach().clone()
        built = build(name, [{"params": [p], **{k: v * (small if k == "lr" else 1) for k, v in group.items()}}], lr=1e-2 * small)
        set_learning_rates(built, 0.5)
        run(built, [p], 1)
        moves.append(before - p.detach())
    torch.testing.assert_close(4 * moves[0], moves[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(2 * moves[0], moves[2], rtol=1e-3, atol=1e-5)
    assert moves[3].abs().max() == 0


def test_a_foreign_scheduler_keeps_lr_scale():
    (p,) = parameters(shapes=[(5,)])
    built = build("adamw", [{"params": [p], "lr_scale": 16.0}], lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(built, lambda step: 0.5)
    assert built.param_groups[0]["lr"] == pytest.approx(8e-3)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in PROJECTING])
def test_only_matrices_of_linear_role_are_projected(name):
    params = parameters(shapes=[(24, 16), (24, 16), (12, 1), (1, 12), (5,), (2, 4, 4)])
    built = build(name, [{"params": params[:1] + params[2:]}, {"params": params[1:2], "role": "other"}])
    run(built, params, 1)
    assert built.state[params[0]]["exp_avg"].numel() < params[0].numel()
    assert all(built.state[p]["exp_avg"].shape == p.shape for p in params[1:])


def test_projecting_the_others_is_plain_adam():
    """Tensors that are not projected move as under torch's Adam (up to where eps is added)."""
    for name in PROJECTING:
        p, q = parameters(shapes=[(6, 5), (5,)]), parameters(shapes=[(6, 5), (5,)])
        built = build(name, [{"params": p, "role": "other"}], eps=1e-12)
        reference = torch.optim.Adam(q, lr=1e-2, eps=1e-12)
        for step in range(5):
            run(built, p, 1, first=step)
            run(reference, q, 1, first=step)
        for a, b in zip(p, q):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES])
def test_closure_and_config_object(name):
    (p,) = parameters(shapes=[(8, 6)])
    config = lookup("optimizer", name).config(lr=0.5)
    built = optimizer(config, [p], lr=0.1, weight_decay=0.25)
    assert built.config.lr == 0.1 and built.config.weight_decay == 0.25 and config.lr == 0.5
    assert built.param_groups[0]["lr"] == 0.1 and built.param_groups[0]["weight_decay"] == 0.25

    def closure():
        built.zero_grad()
        loss = p.pow(2).sum()
        loss.backward()
        return loss

    before = p.detach().pow(2).sum()
    assert torch.equal(built.step(closure), before) and p.detach().pow(2).sum() < before


def test_wrong_requests():
    (p,) = parameters(shapes=[(8, 6)])
    with pytest.raises(UsageError, match="galore"):
        optimizer("galor", [p])
    with pytest.raises(UsageError, match="betas"):
        optimizer("adamw", [p], betas=(0.9, 1.0))
    for nothing in ([], [1, 2]):
        with pytest.raises(UsageError, match="expected a model"):
            optimizer("adamw", nothing)
    with pytest.raises(UsageError, match="goes with a model"):
        optimizer("adamw", [p], trainable=[p])
    cls = lookup("optimizer", "adamw").cls
    with pytest.raises(UsageError, match="not both"):
        cls([p], cls.config_class(), lr=0.1)
