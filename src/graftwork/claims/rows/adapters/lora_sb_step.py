"""LoRA-SB: one SGD step on R is the best copy of the full step in the span of B and A, whatever the scale."""

CLAIM = {
    "system": "LoRA-SB",
    "statement": "optimal scaling: the step in R is the projected full gradient, without a scale to tune",
    "number": "exact",
    "source": "arXiv 2411.19557",
    "kind": "exactness",
    "setting": "small Llama in float64, r=6, one SGD step against B B^T G A^T A by autograd on the whole "
               "weights; LoRA's own step beside it",
    "baseline": "lora",
    "holds": "sb.error <= 1e-5 and sb.best_gap <= 1e-5 and lora.error >= 0.1",
    "refuted_by": "a step that is not the projection",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found = {}
    for arm, method in (("sb", "lora_sb"), ("lora", "lora")):
        model, merged = probes.model(seed, double=True), probes.model(seed, double=True)
        graft = graftwork.attach(model, method, r=6, seed=seed, target_modules=["q_proj", "down_proj"])
        probes.scatter(graft, seed, 0.01)
        for name, adapter in graft.adapters.items():
            adapter.double()
            merged.get_submodule(name).weight.data += _change(adapter, arm)
        gradients = probes.full_gradients(merged, list(graft.adapters), 2)
        probes.mean_loss(model, 2).backward()
        error = gap = 0.0
        for name, adapter in graft.adapters.items():
            G = gradients[name]
            B, A = ((adapter.B, adapter.A) if arm == "sb" else (adapter.lora_B, adapter.lora_A))
            with torch.no_grad():  # of a small rate, per unit of rate
                step = B @ adapter.M.grad @ A if arm == "sb" else adapter.scale * (B.grad @ A + B @ A.grad)
            Q, P = torch.linalg.qr(B.detach()).Q, torch.linalg.qr(A.detach().T).Q
            nearest = Q @ Q.T @ G @ P @ P.T
            error = max(error, probes.relative(step, nearest))
            gap = max(gap, float((G - step).norm() / (G - nearest).norm()) - 1)
        found[arm] = {"error": error, "best_gap": gap}
    return found


def _change(adapter, arm: str):
    if arm == "sb":
        return (adapter.B @ adapter.M @ adapter.A).detach()
    return (adapter.scale * adapter.lora_B @ adapter.lora_A).detach()
