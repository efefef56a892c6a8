"""LQ-LoRA: alternating between codes and factors loses less than codes alone and than LoftQ's five rounds."""

CLAIM = {
    "system": "LQ-LoRA",
    "statement": "the alternation reduces the error below the starts of QLoRA and LoftQ",
    "source": "arXiv 2311.12023",
    "kind": "exactness",
    "setting": "a 192 x 576 weight of SmolLM2-135M, NF4 in blocks of 64, r=16: codes alone, LoftQ with 5 rounds, this initializer with 12; "
               "SVDs and errors in float64",
    "baseline": "nf4",
    "check": {"seeds": 1},
    "holds": "lq.error < loftq.error and loftq.error < nf4.error",
    "refuted_by": "another order",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    from types import SimpleNamespace

    import torch

    from graftwork.claims import probes
    from graftwork.initializers.lq_lora import LQLoRAInitializer
    from graftwork.registry import make_config

    W = probes.smollm_weight("model.layers.15.self_attn.k_proj.weight")

    def codes(weight):
        return probes.stored(weight, "nf4", double_quant=False)

    low = torch.zeros_like(W)
    for _ in range(5):  # LoftQ: quantize what the factors leave, fit the factors to what the codes lose
        kept = codes(W - low).dequantize()
        U, S, Vh = torch.linalg.svd((W - kept).double(), full_matrices=False)
        low = (U[:, :16] * S[:16] @ Vh[:16]).float()
    start = LQLoRAInitializer(make_config("initializer", "lq_lora", iterations=12))
    start.pristine, start.quantize = lambda site: W, lambda site, weight: codes(weight)
    found: dict[str, torch.Tensor] = {}
    adapter = SimpleNamespace(r=16, scale=1.0, lora_B=torch.zeros(192, 16), lora_A=torch.zeros(16, 576),
                              set_pair=lambda B, A, in_storage: found.update(low=B @ A))
    edited = start.build(None, None, adapter, None, torch.Generator())
    return {"nf4": {"error": probes.relative(codes(W).dequantize(), W)}, "loftq": {"error": probes.relative(kept + low, W)},
            "lq": {"error": probes.relative(edited.dequantize() + found["low"], W)}}
