"""LoRA: no latency once merged."""

CLAIM = {
    "system": "LoRA",
    "statement": "no additional inference latency, unlike bottleneck adapters, because the change is merged",
    "number": "0 ms",
    "source": "arXiv 2106.09685",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, one row of one token after 32: the bare base, LoRA r=8 on all linear maps merged, "
               "the same unmerged, and bottleneck adapters of 64; by turns, middle processor time; logits of merged and unmerged",
    "baseline": "bare",
    "holds": "merged.seconds <= 1.03 * bare.seconds and bottleneck.seconds > 1.05 * bare.seconds and merged.difference <= 1e-4",
    "refuted_by": "a merged model that is slower than its base",
    "minutes": 3,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import serving_runs as serving

    model, _ = serving.base(quick)
    arms = {"bare": serving.twin(model), "unmerged": serving.with_grafts(model, 1, r=8, target_modules="all-linear"),
            "bottleneck": serving.with_grafts(model, 1, "bottleneck", r=64)}
    own = serving.twin(model)
    for module in own.modules():
        if isinstance(module, torch.nn.Linear) and module is not own.get_output_embeddings():
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    serving.fill(graftwork.attach(own, "lora", name="a0", r=8, target_modules="all-linear", seed=0), 0).merge()
    arms["merged"] = own
    prompt, token = torch.tensor(serving.prompts(model, [32], seed)), torch.tensor([[5]])
    with torch.no_grad():
        caches = {name: arm(prompt, use_cache=True).past_key_values for name, arm in arms.items()}
        logits = {name: arms[name](prompt).logits for name in ("merged", "unmerged")}

        def step(name):
            arms[name](token, past_key_values=caches[name], use_cache=True)
            caches[name].crop(-1)

        seconds = serving.times({name: lambda name=name: step(name) for name in arms}, 3 if quick else 25)
    found = {name: {"seconds": each} for name, each in seconds.items()}
    found["merged"]["difference"] = float((logits["merged"] - logits["unmerged"]).abs().max() / logits["unmerged"].abs().max())
    return found
