"""MixLLM: which tenth of the output features gets 8 bits matters, and the choice over the whole model beats the choice in each matrix."""

CLAIM = {
    "system": "MixLLM",
    "statement": "the global choice of 10 % of the output features in 8 bits cuts the rise of perplexity from 0.5 to 0.2 (Llama-3.1-70B)",
    "number": "0.5 to 0.2",
    "source": "arXiv 2412.14590",
    "first": 13,
    "kind": "quality_scaled",
    "check": {"tasks": ["wikitext2"], "seeds": 1},
    "setting": "SmolLM2-135M-Instruct, 3 bits in groups of 64, rows ranked by gradients on 16 texts of c4; loss on 32 windows of 256 "
               "tokens of wikitext2; a tenth of the rows drawn at random, the best of each matrix, and the best of the model",
    "baseline": "layer",
    "holds": "globally.loss < layer.loss and layer.loss < random.loss",
    "refuted_by": "a choice in each matrix that is as good",
    "minutes": 8,
}


def measure(seed: int, quick: bool) -> dict:
    import torch
    import torch.nn.functional as F

    import graftwork
    from graftwork.claims.tasks import Task, read_rows
    from graftwork.registry import make_config
    from graftwork.storage.calibration.sensitivity import places, row_salience, top_rows
    from graftwork.storage.mixllm import quantizer

    model, tokenizer = graftwork.load("smollm2-135m-instruct", dtype="fp32")
    model.requires_grad_(False)
    config = make_config("storage", "mixllm", bits=3, group_size=64)

    def windows(task, split, length, count):
        text = "\n\n".join(row["text"] for row in read_rows(task, split, 2000)[: 12 * count])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: length * count]
        return torch.tensor(ids).view(-1, length)

    def as_is(row):
        return row

    held_out = windows(Task("lm/wikitext2_raw", "text", as_is), "test", 256, 4 if quick else 32)
    seen = windows(Task("lm/c4_sample", "text", as_is), "calibration", 256, 2 if quick else 16)
    batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in seen]

    def losses():
        with torch.no_grad():
            return [float(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])) for ids in held_out]

    own = places(model, config)
    scores = row_salience(model, own, batches, lambda w: quantizer(config, w.shape[1], False).nearest(w))
    draw = torch.Generator().manual_seed(seed)
    chosen = {
        "random": {name: torch.rand(len(s), generator=draw) < 0.1 for name, s in scores.items()},
        "layer": {name: s >= s.sort(descending=True).values[max(0, round(0.1 * len(s)) - 1)] for name, s in scores.items()},
        "globally": top_rows(scores, 0.1),
        "none": {name: torch.zeros(len(s), dtype=torch.bool) for name, s in scores.items()},
    }
    found = {"dense": {"loss": losses()}}
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in scores}
    formats = {wide: {name: quantizer(config, w.shape[1], wide).nearest(w) for name, w in kept.items()} for wide in (True, False)}
    for arm, masks in chosen.items():
        for name, mask in masks.items():
            model.get_submodule(name).weight.data.copy_(torch.where(mask[:, None], formats[True][name], formats[False][name]))
        found[arm] = {"loss": losses(), "wide": sum(int(m.sum()) for m in masks.values()) / sum(len(m) for m in masks.values())}
    return found
