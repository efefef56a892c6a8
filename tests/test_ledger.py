"""The ledger against hand counts, against fake tensors, and against the profiler; the measuring tools themselves."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import time
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from graftwork.errors import UsageError
from graftwork.planning import measure
from graftwork.planning.ledger import CATEGORIES, Ledger
from graftwork.planning.measure import MIB, PeakMeter, RssWatch, expected_device_bytes, format_bytes, measure_peak, parse_bytes

F32 = 4


@pytest.fixture(params=["real", "fake"])
def mode(request):
    """Hand counts must hold on real and on fake tensors alike."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield request.param


def held(ledger: Ledger) -> dict[str, int]:
    return {name: n for name, n in ledger.live_categories.items() if n}


# ---- hand counts ---------------------------------------------------------------------------------------------------


def test_linear_layer_to_the_byte(mode):
    rows, fan_in, fan_out = 7, 12, 20
    layer, x = nn.Linear(fan_in, fan_out), torch.zeros(rows, fan_in)
    ledger = Ledger()
    ledger.track(layer)
    weights = (fan_in + 1) * fan_out * F32
    assert held(ledger) == {"weights": weights}
    with ledger:
        y = layer(x)
        batch, out = rows * fan_in * F32, rows * fan_out * F32
        assert held(ledger) == {"weights": weights, "other": batch, "activations": out}
        loss = y.sum()
        del y
        assert held(ledger) == {"weights": weights, "other": batch, "activations": F32}  # the sum saves nothing
        loss.backward()
        del loss
    assert held(ledger) == {"weights": weights, "other": batch, "gradients": weights}
    assert ledger.peak_bytes == sum(ledger.peak_categories.values()) >= 2 * weights + batch
    layer.zero_grad()
    assert held(ledger) == {"weights": weights, "other": batch}


def test_views_and_in_place_results_count_once(mode):
    with Ledger() as ledger:
        x = torch.zeros(8, 16)
        one = 8 * 16 * F32
        views = [x.t(), x[2:5], x.view(-1), x.detach(), x.unsqueeze(0).expand(9, 8, 16)]
        x.add_(1).mul_(2)
        torch._foreach_add_([x], 1.0)
        assert ledger.live_bytes == ledger.peak_bytes == one
        del x
        assert ledger.live_bytes == one  # the views hold it
        views.clear()
        assert ledger.live_bytes == 0 and ledger.peak_bytes == one


def test_out_arguments_and_resizes(mode):
    with Ledger() as ledger:
        a, out = torch.zeros(100), torch.empty(0)
        torch.add(a, a, out=out)
        assert ledger.live_bytes == 2 * 400
        out.resize_(300)
        assert ledger.live_bytes == 400 + 1200
        assert ledger.peak_bytes == 1600
        if mode == "real":  # on fake tensors PyTorch itself grows such a storage again at its next use
            out.untyped_storage().resize_(0)  # not an operation: noticed when the tensor is next used
            out.detach()
            assert ledger.live_bytes == 400 and ledger.peak_bytes == 1600


def test_a_sparse_tensor_counts_its_indices_and_values():
    with Ledger() as ledger:
        dense = torch.zeros(1000)
        dense[3] = 1.0
        sparse = dense.to_sparse()
        del dense
        gc.collect()
        assert ledger.live_bytes == 8 + 4, sparse


def test_tensors_saved_by_autograd_count_until_the_graph_dies(mode):
    with Ledger() as ledger:
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp()
        z = y.sum()
        del y
        assert ledger.live_bytes == 4000 + 4000 + 4
        z.backward()
        assert ledger.live_bytes == 4000 + 4 + 4000  # x, z, x.grad; exp's saved output is gone


def test_a_saved_tensor_of_10_mib_moves_the_peak_by_10_mib():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, extra):
            if extra:
                ctx.save_for_backward(torch.empty(extra, dtype=torch.uint8, device=x.device))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    def peak(extra):
        with FakeTensorMode(), Ledger() as ledger:
            w = torch.zeros(64, 64, requires_grad=True)
            Keep.apply((torch.zeros(32, 64) @ w).tanh(), extra).exp().sum().backward()
        return ledger.peak_bytes

    assert peak(10 * MIB) - peak(0) == 10 * MIB


def test_a_chunked_loop_peaks_at_one_chunk(mode):
    def peak(chunks):
        with torch.no_grad(), Ledger() as ledger:
            x, head = torch.zeros(64, 8), torch.zeros(8, 1000)
            total = torch.zeros(())
            for part in x.split(64 // chunks):
                total += (part @ head).logsumexp(-1).sum()
        return ledger.peak_bytes

    whole, eighth = peak(1), peak(8)
    assert whole - eighth >= 64 * 1000 * F32 * 7 // 8
    assert eighth >= (64 * 8 + 8 * 1000 + 8 * 1000) * F32


def test_checkpointing_keeps_block_inputs_only(mode):
    rows, width, blocks = 32, 16, 3

    def after_forward(use):
        weights = [torch.zeros(width, width, requires_grad=True) for _ in range(3 * blocks)]
        with Ledger() as ledger:
            ledger.track(weights, "weights")
            h = torch.zeros(rows, width)
            for b in range(blocks):
                def block(h, group=weights[3 * b:3 * b + 3]):
                    for w in group:
                        h = (h @ w).tanh()
                    return h
                h = checkpoint(block, h, use_reentrant=False, preserve_rng_state=False) if use else block(h)
            loss = h.sum()
            del h
            kept = ledger.live_categories["activations"] - F32
            ledger.reset_peak()
            loss.backward()
        return kept, ledger.peak_bytes, [w.grad for w in weights]

    kept, peak, plain = after_forward(False)
    kept_checkpointed, peak_checkpointed, recomputed = after_forward(True)
    one = rows * width * F32
    assert kept == (3 * blocks + 1) * one  # the input and each tanh; products die at once
    assert kept_checkpointed == blocks * one  # inputs of blocks; the last output is dropped with its name
    assert peak_checkpointed < peak
    assert [g.shape for g in plain] == [g.shape for g in recomputed]


@pytest.mark.parametrize("kind", ["foreach", "loop", "fused"])
def test_optimizer_state_is_recognized_also_in_the_peak(kind, mode):
    if mode == "fake" and kind == "fused":
        pytest.skip("fused AdamW checks for real devices")
    layer = nn.Linear(64, 48)
    numel = 65 * 48
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=kind == "foreach", fused=kind == "fused")
    ledger = Ledger()
    ledger.track(layer)
    ledger.track(optimizer)
    with ledger:
        layer(torch.zeros(2, 64)).sum().backward()
        optimizer.step()
    expected = 2 * numel * F32 + 2 * F32  # two moments and one step counter a parameter
    assert ledger.live_categories["optimizer_state"] == expected
    assert ledger.peak_phase == "optimizer"
    assert ledger.peak_categories["gradients"] == numel * F32
    assert ledger.peak_categories["optimizer_state"] == expected
    assert ledger.peak_bytes == sum(ledger.peak_categories.values())
    state = sum(t.numel() * F32 for s in optimizer.state.values() for t in s.values())
    assert state == expected


def test_a_parameter_unfrozen_between_steps_gets_its_gradient_counted():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False).requires_grad_(False)
    model = nn.Sequential(a, b)
    with Ledger() as ledger:
        ledger.track(model)
        model(torch.ones(2, 8)).sum().backward()
        assert ledger.live_categories["gradients"] == 256
        b.requires_grad_(True)
        model(torch.ones(2, 8)).sum().backward()
        assert ledger.live_categories["gradients"] == 512
    assert not a.weight._backward_hooks and not a.weight._post_accumulate_grad_hooks


def test_updates_inside_backward_hold_one_gradient_at_a_time():
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])

    def update(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    with Ledger() as ledger:
        ledger.track(model)
        model(torch.ones(1, 32)).sum().backward()
    assert max(point["gradients"] for _, _, point in ledger.timeline) <= 32 * 32 * F32
    assert ledger.live_categories["gradients"] == 0


def test_micro_batches_accumulate_into_one_gradient(mode):
    w = nn.Parameter(torch.zeros(50, 50))
    holder = nn.ParameterList([w])
    with Ledger() as ledger:
        ledger.track(holder)
        for _ in range(3):
            (torch.zeros(4, 50) @ w).sum().backward()
        assert ledger.live_categories["gradients"] == 50 * 50 * F32


# ---- categories ----------------------------------------------------------------------------------------------------


def test_categories_by_name_by_width_and_by_later_declaration(mode):
    with Ledger(logits_width=500) as ledger:
        logits = torch.zeros(4, 500)
        tokens = torch.zeros(4, 500, dtype=torch.long)
        with ledger.category("kv"):
            cache = torch.zeros(2, 500)
            with ledger.category("other"):
                inner = torch.zeros(10)
        pool = torch.zeros(30)
        assert held(ledger) == {"logits": 8000, "activations": 16000 + 120, "kv": 4000, "other": 40}
        ledger.track({"pool": [pool]}, "adapters")
        ledger.track((t for t in [tokens]), "other")
        assert held(ledger) == {"logits": 8000, "adapters": 120, "kv": 4000, "other": 16040}
        assert ledger.peak_categories == ledger.live_categories  # the snapshot learns what the tensors were
        assert ledger.categories == ledger.peak_categories
    del logits, cache, inner
    with Ledger() as plain:
        torch.zeros(4, 500)
    assert plain.peak_categories["logits"] == 0


def test_snapshots_before_a_birth_keep_their_categories():
    with Ledger() as ledger:
        big = torch.zeros(1000)
        del big
        small = torch.zeros(10)
        ledger.track([small], "kv")
    assert ledger.peak_categories["activations"] == 4000 and ledger.peak_categories["kv"] == 0
    assert ledger.live_categories["kv"] == 40


def test_adapters_inside_a_tracked_model_can_be_named(mode):
    model = nn.ModuleDict({"base": nn.Linear(16, 16, bias=False), "lora": nn.Linear(16, 2, bias=False)})
    model["base"].requires_grad_(False)
    optimizer = torch.optim.SGD([model["lora"].weight], momentum=0.9)
    with Ledger() as ledger:
        ledger.track(model)
        ledger.track(model["lora"], "adapters")
        ledger.track(optimizer)
        x = torch.zeros(3, 16)
        (model["base"](x).sum() + model["lora"](x).sum()).backward()
        optimizer.step()
        model["base"].weight.data = torch.zeros(8, 16)  # replaced behind the dispatcher's back
        ledger.refresh()
    assert held(ledger) == {"weights": 8 * 16 * F32, "adapters": 128, "gradients": 128, "optimizer_state": 128,
                            "activations": x.numel() * F32}


def test_refreshing_moves_no_bytes_of_what_two_modules_hold():
    """Each move would go through all points of a trace, which are as many as operations."""
    class Watched(list):
        def __setitem__(self, index, value):
            raise AssertionError(f"{CATEGORIES[index]} moved")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Ledger() as ledger:
        ledger.track(model, "weights")
        ledger.track(model[1], "adapters")
        ledger._by_category = Watched(ledger._by_category)
        ledger.refresh()
        assert ledger._by_category[CATEGORIES.index("adapters")] == 20 * F32
        ledger._by_category = list(ledger._by_category)


def test_only_one_device_type_counts_when_asked():
    with Ledger(device="meta") as ledger:
        torch.zeros(100)
        kept = torch.zeros(50, device="meta")
    assert ledger.peak_bytes == kept.numel() * F32


def test_wrapper_subclasses_count_what_they_wrap():
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(torch.ones(100), torch.ones(100))
    with Ledger() as ledger:
        ledger.track([two], "weights")
        assert held(ledger) == {"weights": 800}
        out = two * 2
        assert held(ledger) == {"weights": 800, "activations": 800}, out


def test_wrong_requests_are_usage_errors():
    ledger = Ledger()
    with pytest.raises(UsageError, match="did you mean 'activations'"), ledger.category("activation"):
        pass
    with pytest.raises(UsageError, match="need a category"):
        ledger.track([torch.zeros(1)])
    with pytest.raises(UsageError, match="optimizer_state"):
        ledger.track(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), "weights")
    with pytest.raises(UsageError, match="timeline_points"):
        Ledger(timeline_points=1)


def test_timeline_is_bounded_and_keeps_the_peak():
    with Ledger(timeline_points=16) as ledger:
        for i in range(500):
            x = torch.zeros(1000 if i == 321 else 10)
            with ledger.phase("late") if i > 400 else contextlib.nullcontext():
                x = x + 1
    timeline = ledger.timeline
    assert 8 <= len(timeline) <= 16
    assert max(sum(point.values()) for _, _, point in timeline) == ledger.peak_bytes == 8000
    assert [event for event, _, _ in timeline] == sorted({event for event, _, _ in timeline})
    assert timeline[-1][1] == "late" and timeline[0][1] == "forward"
    saved = json.loads(ledger.to_json())
    assert saved["peak_bytes"] == 8000 and list(saved["categories"]) == list(CATEGORIES)
    assert len(saved["timeline"]) == len(timeline) and saved["peak_blocks"] == 2


def test_pools_follow_the_cuda_allocators_rounding():
    with Ledger() as ledger:
        keep = [torch.empty(n, dtype=torch.uint8) for n in (1, 513, MIB + 1, 10 * MIB + 1)]
    assert ledger.peak_pools == {"small": 512 + 1024, "medium": MIB + 512, "large": 12 * MIB}
    assert ledger.peak_blocks == len(keep)


def test_the_ledger_keeps_nothing_alive_and_changes_no_number():
    def gradients(context):
        generator = torch.Generator().manual_seed(3)
        w = nn.Parameter(torch.randn(9, 9, generator=generator))
        with context:
            h = torch.randn(4, 9, generator=generator) @ w
            for _ in range(3):
                h = h + (h.tanh() @ w) + h.sin()
            h.sum().backward()
        return w.grad

    assert torch.equal(gradients(contextlib.nullcontext()), gradients(Ledger()))
    ledger = Ledger()
    with ledger:
        module = nn.Linear(3, 3)
        ledger.track(module)
        optimizer = torch.optim.SGD(module.parameters())
        ledger.track(optimizer)
    gone = [weakref.ref(module), weakref.ref(optimizer)]
    del module, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None] and ledger.live_bytes == 0


# ---- a real model: fake against real, ledger against profiler ------------------------------------------------------


def build(method: str, vocabulary: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=vocabulary, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    if method == "lora":
        model.requires_grad_(False)
        for layer in model.model.layers:
            for name in ("q_proj", "v_proj"):
                base = getattr(layer.self_attn, name)
                a = nn.Linear(base.in_features, 8, bias=False)
                b = nn.Linear(8, base.out_features, bias=False)
                base.graft = nn.Sequential(a, b)
                base.register_forward_hook(lambda module, args, y: y + module.graft(args[0]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD if method == "sgd" else torch.optim.AdamW)(trained, lr=1e-3)
    tokens = torch.zeros((1, 16) if method == "sgd" else (2, 128), dtype=torch.long)

    def step():
        if method == "checkpointed":
            h = model.model.embed_tokens(tokens)
            rotary = model.model.rotary_emb(h, torch.arange(128).unsqueeze(0))
            for layer in model.model.layers:
                h = checkpoint(layer, h, position_embeddings=rotary, use_reentrant=False, preserve_rng_state=False)
            model.lm_head(model.model.norm(h)).logsumexp(-1).mean().backward()
        else:
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def count(method: str, vocabulary: int, fake: bool, steps: int) -> Ledger:
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model, optimizer, step = build(method, vocabulary)
        ledger = Ledger(logits_width=vocabulary)
        ledger.track(model)
        for name, module in model.named_modules():
            if name.endswith("graft"):
                ledger.track(module, "adapters")
        ledger.track(optimizer)
        with ledger:
            for _ in range(steps):
                step()
        return ledger


METHODS = ["adamw", "sgd", "lora", "checkpointed"]


@pytest.mark.parametrize("method", METHODS)
def test_fake_and_real_agree_to_the_byte(method):
    real, fake = count(method, 400, False, 2), count(method, 400, True, 2)
    assert real.peak_bytes == fake.peak_bytes
    assert real.peak_categories == fake.peak_categories
    assert real.peak_phase == fake.peak_phase and real.peak_pools == fake.peak_pools
    assert real.live_bytes == fake.live_bytes and real.events == fake.events
    for (event, phase, seen), (event_fake, phase_fake, planned) in zip(real.timeline, fake.timeline, strict=True):
        assert (event, phase) == (event_fake, phase_fake)
        # the scalars that fake tensors keep as constants live an operation longer or shorter
        assert all(abs(seen[name] - planned[name]) <= 16 for name in CATEGORIES), (event, phase, seen, planned)
    assert (real.peak_categories["adapters"] > 0) == (method == "lora")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "lora" else pytest.mark.slow) for m in METHODS])
def test_ledger_agrees_with_the_profiler(method):
    # few tokens and a vocabulary of 8000 put the peak of plain SGD where two gradients of the tied embedding meet
    vocabulary = 8000 if method == "sgd" else 1000
    planned = count(method, vocabulary, True, 2)
    model, optimizer, step = build(method, vocabulary)
    with PeakMeter() as meter:
        step()
        step()
    # other tensors of this process (of earlier tests, of imported libraries) are in the baseline, not in the ledger
    own = measure._live_cpu_storages()
    strangers = sum(s.nbytes() for s in own.values())
    del model, optimizer, step, own
    gc.collect()
    strangers = sum(s.nbytes() for s in measure._live_cpu_storages().values())
    measured = meter.peak.peak_bytes - strangers
    assert abs(planned.peak_bytes - measured) <= 0.02 * measured
    assert meter.peak.peak_bytes > meter.peak.baseline_bytes > strangers


@pytest.mark.slow
def test_engine_additions_count_in_place_only_when_the_engine_adds_in_place():
    """Two gradients of 4 MB meet at one tensor: the profiler, without a dispatch mode, decides what is right."""
    def run(keep: bool):
        x = torch.zeros(1000, 1000, requires_grad=True)
        hidden = x.view(1000, 1000)
        kept = []
        doubled, tripled = hidden * 2, hidden * 3
        if keep:  # somebody else holds both operands: the engine has to add out of place
            for operand in (doubled, tripled):
                operand.grad_fn.register_hook(lambda inputs, outputs: kept.append(inputs[0]))
        (doubled.sum() + tripled.sum()).backward()

    for keep in (False, True):
        base = sum(s.nbytes() for s in measure._live_cpu_storages().values())
        measured = measure_peak(partial(run, keep)).peak_bytes - base
        with Ledger() as ledger:
            run(keep)
        assert abs(ledger.peak_bytes - measured) <= 64, (keep, ledger.peak_bytes, measured)


# ---- the measuring tools -------------------------------------------------------------------------------------------


def test_measured_peak_of_known_allocations_and_deaths():
    holder = [torch.ones(3, 1000)]

    def work():
        a = torch.ones(5000)
        del a
        holder.clear()  # was in the baseline: its release must count
        b = torch.ones(6000)
        return b.view(2, 3000)

    peak = measure_peak(work)
    assert peak.result.shape == (2, 3000) and peak.allocations == 2
    assert peak.peak_bytes - peak.baseline_bytes == max(20000, 24000 - 12000)
    assert "profiler" in peak.source and peak.seconds > 0
    assert "result" not in peak.to_dict() and json.dumps(peak.to_dict())


@pytest.mark.slow
def test_baseline_counts_storages_once_with_gradients_unseen_by_python():
    before = measure_peak(lambda: None).baseline_bytes
    w = nn.Parameter(torch.ones(1000))
    w.exp().sum().backward()
    views = [w.detach()[:10], w.detach().view(10, 100)]
    assert measure_peak(lambda: None).baseline_bytes - before == 8000, views


@pytest.mark.slow
def test_an_exception_stops_the_meter_and_passes_through():
    with pytest.raises(KeyError):
        measure_peak(lambda: {}["x"])
    assert measure_peak(lambda: torch.ones(10)).allocations == 1


@pytest.mark.parametrize("kernel", [True, False])
def test_resident_size_sees_a_touched_buffer(kernel, monkeypatch):
    if measure._status("VmRSS") is None:
        pytest.skip("no /proc")
    if not kernel:
        real = open

        def refuse(path, *args, **kwargs):
            if path == "/proc/self/clear_refs":
                raise PermissionError(path)
            return real(path, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refuse)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what earlier tests freed is resident still, and would be the buffer
    with RssWatch() as watch:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        for _ in range(8 if not kernel else 1):
            time.sleep(0.01)
        del block
    assert watch.peak - watch.before >= 48 * MIB
    assert ("VmHWM" in watch.source) == kernel


def test_cuda_is_read_from_its_allocator(monkeypatch):
    with pytest.raises(UsageError, match="mps"):
        PeakMeter("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        measure_peak(lambda: None, device="cuda")
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    peak = measure_peak(lambda: calls.append("work"), device="cuda")
    assert (peak.baseline_bytes, peak.peak_bytes) == (100, 700) and "CUDA" in peak.source
    assert calls == ["synchronize", "reset", "work", "synchronize"]


def test_expected_device_bytes_adds_up_and_states_its_basis():
    plain = expected_device_bytes(10**9)
    assert plain["total_bytes"] == sum(plain[k] for k in ("tensor_bytes", "allocator_bytes", "reserve_bytes",
                                                          "context_bytes")) > 10**9 + measure.CUDA_CONTEXT
    assert plain["measured"] == "not measured on a GPU"
    assert all(word in plain["basis"] for word in ("allocator", "reserve", "context", "assumed"))
    pools = {"small": 3 * MIB, "medium": 21 * MIB, "large": 12 * MIB}
    exact = expected_device_bytes(35 * MIB, pools=pools)
    assert exact["allocator_bytes"] == (4 + 40 + 12 - 35) * MIB
    assert expected_device_bytes(0, blocks=10)["allocator_bytes"] - expected_device_bytes(0)["allocator_bytes"] == 5120
    cpu = expected_device_bytes(10**9, "cpu", blocks=3)
    assert cpu["allocator_bytes"] == 3 * 4096 and "interpreter" in cpu["basis"]
    with pytest.raises(UsageError, match="did you mean 'cuda'"):
        expected_device_bytes(1, "cudo")
    with pytest.raises(UsageError, match="negative"):
        expected_device_bytes(-1)


@pytest.mark.parametrize("text, nbytes", [
    ("16GiB", 16 * 2**30), ("24GB", 24 * 10**9), ("512 MiB", 512 * MIB), (" 1.5gib ", 3 * 2**29), ("1e3kB", 10**6),
    ("4096", 4096), (4096, 4096), (".5 TiB", 2**39), ("7b", 7)])
def test_parse_bytes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text, says", [
    ("16G", "unknown unit 'G'"), ("16GiBs", "did you mean 'GiB'"), ("lots", "not an amount"), ("-1GB", "not an amount"),
    ("0", "not a positive"), ("", "not an amount"), ("1e999GB", "not a positive"), (True, "not an amount"),
    (-5, "not an amount"), ("nan", "not an amount")])
def test_parse_bytes_says_what_is_wrong(text, says):
    with pytest.raises(UsageError, match=says) as error:
        parse_bytes(text)
    assert "GiB" in error.value.remedy


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**46))
def test_format_and_parse_are_inverse_to_two_decimals(nbytes):
    text = format_bytes(nbytes)
    assert abs(parse_bytes(text) - nbytes) <= 0.5 + 0.005001 * parse_bytes("1 " + text.split()[1])
    assert not text.startswith("1024.00") or text.endswith("TiB")


def test_format_seconds_examples():
    assert [measure.format_seconds(s) for s in (0.02134, 98.13, 119.6, 120, 3050, 7199, 7632)] == [
        "0.0213 s", "98.1 s", "120 s", "2 min", "50.8 min", "120 min", "2.12 h"]


def test_format_bytes_examples():
    assert [format_bytes(n) for n in (0, 1023, 1024, 946677514, 3 * 2**29, -2048)] == [
        "0 B", "1023 B", "1.00 KiB", "902.82 MiB", "1.50 GiB", "-2.00 KiB"]
