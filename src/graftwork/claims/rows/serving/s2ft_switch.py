"""S2FT: adapters that fuse by adding, and switch without a product."""

CLAIM = {
    "system": "S2FT",
    "statement": "weight updates decouple into adapters: they fuse, switch fast and are served together",
    "source": "arXiv 2412.06289",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32: merging and unmerging an S2FT adapter (3 % of the channels of down) against LoRA "
               "r=16 on down, by turns, middle processor time; two S2FT adapters on other channels, fused into one, against the "
               "sum of their changes",
    "baseline": "lora",
    "holds": "s2ft.seconds <= 0.5 * lora.seconds and max(s2ft.difference, 0) == 0",
    "refuted_by": "slower than half of LoRA's merge, or a difference",
    "minutes": 3,
}


def measure(seed: int, quick: bool) -> dict:
    import graftwork
    from graftwork.claims import serving_runs as serving
    from graftwork.interchange.combine import combine

    model, _ = serving.base(quick)
    seconds = serving.times({name: switch(model, name, options) for name, options in (
        ("s2ft", {"ratio": 0.03}), ("lora", {"r": 16, "target_modules": ["down_proj"]}))}, 2 if quick else 7)
    small, _ = serving.base(quick=True)
    grafts = [serving.fill(graftwork.attach(small, "s2ft", name=which, ratio=0.05, selection=f"weight_{which}"), 10 * seed + k)
              for k, which in enumerate(("large", "small"))]
    first, second = (graft.delta_weights() for graft in grafts)
    fused = combine(grafts, "linear", weights=[1.0, 1.0])[0].delta_weights()
    wrong = max(float((fused[n] - first.get(n, 0) - second.get(n, 0)).abs().max()) for n in fused)
    return {"s2ft": {"seconds": seconds["s2ft"], "difference": wrong}, "lora": {"seconds": seconds["lora"]}}


def switch(model, method: str, options: dict):
    import graftwork
    from graftwork.claims import serving_runs as serving

    own = serving.twin(model)
    for name, module in own.named_modules():
        if name.endswith("down_proj"):
            module.weight = type(module.weight)(module.weight.detach().clone(), requires_grad=False)
    graft = serving.fill(graftwork.attach(own, method, name=method, **options), 0)

    def there_and_back():
        graft.merge()
        graft.unmerge()

    return there_and_back
