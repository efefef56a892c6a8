"""S2-LoRA: one pair of factors for all matrices of a shape, and r coefficients for each of them."""

CLAIM = {
    "system": "S2-LoRA",
    "statement": "in-domain quality like AdaLoRA's with 0.02 % of Whisper-small's parameters",
    "number": "0.02 %",
    "source": "arXiv 2309.11756",
    "headline": "no Whisper and too little children's speech for the word error rates",
    "kind": "parameter_count",
    "check": {"seeds": 1},
    "setting": "Whisper-small's 144 attention matrices of 768 x 768 (here as 36 blocks of a Llama, on fake tensors), "
               "r=32, against 244M; LoRA r=32",
    "baseline": "lora",
    "holds": "s2.trained == 53760 and s2.trained <= 0.00025 * 244000000 and s2.trained <= lora.trained / 100",
    "refuted_by": "any other count",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    import graftwork

    config = LlamaConfig(vocab_size=64, hidden_size=768, intermediate_size=64, num_hidden_layers=36, num_attention_heads=12,
                         num_key_value_heads=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(config)
        for arm, method in (("s2", "s2_lora"), ("lora", "lora")):
            graft = graftwork.attach(model, method, name=arm, r=32, target_modules="attention")
            found[arm] = {"trained": graft.parameter_count(), "sites": len(graft.adapters)}
            graft.detach()
    return found
