"""S-LoRA: rows of many adapters in one batch against PEFT's way to the same batch."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "up to 4x the throughput of PEFT and of vLLM with adapters packed",
    "number": "4x",
    "source": "arXiv 2311.03285",
    "headline": "vLLM and its GPU are absent; the side of PEFT is checked",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, 32 rows that decode, LoRA r=8 on all linear maps, 16 and 32 adapters; PEFT answers "
               "the same rows by adapter_names in one forward a step; a step each by turns, middle processor time",
    "baseline": "peft",
    "holds": "peft.seconds16 >= 4 * engine.seconds16 and peft.seconds32 >= 4 * engine.seconds32",
    "refuted_by": "less than 2x with 16 adapters or more",
    "minutes": 12,
}


def measure(seed: int, quick: bool) -> dict:
    import statistics
    import time

    from graftwork.claims import serving_runs as serving

    model, tokenizer = serving.base(quick)
    steps, found = (3 if quick else 12), {"engine": {}, "peft": {}}
    for count in (16, 32):
        ids = serving.prompts(model, [8] * 32, seed + 1)
        names = [f"a{i % count}" for i in range(32)]
        ours = serving.with_grafts(model, count, r=8, target_modules="all-linear")
        other = PeftRows(serving.twin(model), ours, ids, names)
        run = serving.Run(ours, tokenizer, ids, names, steps + 8)
        for _ in range(6):  # the prompt, and until the adapters lie side by side
            run.step()
        own, theirs = [], []
        for _ in range(steps):
            run.step()
            own.append(run.seconds[-1])
            start = time.process_time()
            other.step()
            theirs.append(time.process_time() - start)
        run.engine.close()
        found["engine"][f"seconds{count}"], found["peft"][f"seconds{count}"] = statistics.median(own), statistics.median(theirs)
    return found


class PeftRows:
    """PEFT's layers with the factors of our grafts, decoding with a cache; the prompt is read at once."""

    def __init__(self, model, ours, ids, names):
        import torch

        from graftwork.claims.kinds.base import NotCheckable

        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise NotCheckable("PEFT is not installed") from None
        wrapped = None
        config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        for name, graft in ours.graft_state.grafts.items():
            if wrapped is None:
                wrapped = get_peft_model(model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            with torch.no_grad():
                for site, (B, A) in graft.to_lora()[0].items():
                    layer = model.get_submodule(site)
                    layer.lora_A[name].weight.copy_(A)
                    layer.lora_B[name].weight.copy_(B)
        self.model, self.names = wrapped.eval(), names
        self.next, self.cache = torch.tensor(ids), None
        self.step()

    def step(self):
        import torch

        with torch.no_grad():
            out = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True, adapter_names=self.names, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1:].argmax(-1)
