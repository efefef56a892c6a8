"""PEQA: training moves the scales and leaves every integer as it is."""

CLAIM = {
    "system": "PEQA",
    "statement": "only scales are tuned; the integers never change",
    "number": "exact",
    "source": "arXiv 2305.14152",
    "kind": "exactness",
    "setting": "small Llama in 4 bits, groups of 16, 20 AdamW steps; codes before and after training and after "
               "the merge, bit for bit",
    "baseline": "start",
    "holds": "peqa.changed == 0 and peqa.loss < start.loss",
    "refuted_by": "a code that changed, or nothing learned",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes
    from graftwork.registry import make_config
    from graftwork.storage.base import apply_storage

    model = apply_storage(probes.model(seed), make_config("storage", "int4", group_size=16))
    kept = {n: m.leaves()["codes"].clone() for n, m in model.named_modules() if hasattr(m, "leaves")}
    graft = graftwork.attach(model, "peqa", seed=seed)
    batch = next(probes.batches(1, seed))
    optimizer = torch.optim.AdamW(graft.parameters(), lr=1e-3)
    start = float(model(**batch).loss.detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    graft.merge()
    now = {n: m.leaves()["codes"] for n, m in model.named_modules() if hasattr(m, "leaves") and n in kept}
    changed = sum(int((kept[n] != codes).sum()) for n, codes in now.items())
    return {"peqa": {"changed": changed, "loss": float(loss.detach())}, "start": {"loss": start}}
