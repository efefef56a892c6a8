"""LoRAT: LoRA on the fused qkv map is three LoRAs, one a slice, and merges exactly."""

CLAIM = {
    "system": "LoRAT",
    "statement": "a ViT tracker tuned by LoRA trains in 25.8 GB and merges without cost at inference",
    "number": "25.8 GB",
    "source": "arXiv 2403.05231",
    "headline": "no tracking data and no DINOv2",
    "kind": "exactness",
    "setting": "a small GPT-2, whose q, k and v are one map: the adapters of the slices against a dense change "
               "put together by hand, and the merged model",
    "baseline": "hand",
    "holds": "fused.difference <= 1e-5 and fused.merged <= 1e-5 and hand.changed >= 0.01",
    "refuted_by": "another function",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import copy

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import graftwork
    from graftwork.claims import probes

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
                                           attn_pdrop=0.0, initializer_range=0.1)).eval()
    hand, ids = copy.deepcopy(model), next(probes.batches(1, seed))["input_ids"]
    graft = graftwork.attach(model, "lora", r=4, seed=seed, target_modules=["q", "k", "v"])
    probes.scatter(graft, seed, 0.3)
    with torch.no_grad():
        bare = hand(ids).logits
        for name, adapter in graft.adapters.items():
            site = graft.sites[name]
            change = adapter.scale * adapter.lora_B @ adapter.lora_A
            hand.get_submodule(site.module_name).weight[:, site.rows] += change.T  # GPT-2 keeps (in, out)
        wanted, found = hand(ids).logits, model(ids).logits
        graft.merge()
        merged = model(ids).logits
    return {"fused": {"difference": float((found - wanted).abs().max()), "merged": float((merged - wanted).abs().max())},
            "hand": {"changed": float((wanted - bare).abs().max())}}
