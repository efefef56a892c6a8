"""AdamW: weight decay that does not pass through the moments."""

CLAIM = {
    "system": "AdamW",
    "statement": "decoupled weight decay shrinks all weights at the same rate, where L2 in the gradient of Adam shrinks those with large "
                 "gradients less",
    "number": "exact",
    "source": "arXiv 1711.05101",
    "kind": "exactness",
    "setting": "20 steps of a 64 x 64 matrix by gradients whose columns differ a thousandfold, float64; weights against those that shrink "
               "by lr x decay a step and move as without decay, as a share of what the decay does; torch.optim.Adam with L2 beside it",
    "baseline": "adam",
    "holds": "adamw.error <= 1e-6 and adam.error >= 0.1",
    "refuted_by": "a rate that depends on the gradient",
    "minutes": 1,
}

LR, DECAY, STEPS = 1e-3, 0.1, 20


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims import probes
    from graftwork.optim import optimizer as build

    start = probes.normal(seed, 64, 64).double()
    size = torch.logspace(-3, 0, 64, dtype=torch.float64)

    def ours(weights, decay):
        return build("adamw", [weights], LR, weight_decay=decay)

    def coupled(weights, decay):
        return torch.optim.Adam([weights], lr=LR, weight_decay=decay)

    found = {}
    for arm, made in (("adamw", ours), ("adam", coupled)):
        plain, decayed = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers, wanted = (made(plain, 0.0), made(decayed, DECAY)), start.clone()
        for step in range(STEPS):
            before = plain.detach().clone()
            plain.grad = probes.normal(1000 * (seed + 1) + step, 64, 64).double() * size
            decayed.grad = plain.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            wanted = (1 - LR * DECAY) * wanted + (plain.detach() - before)
        found[arm] = {"error": float((decayed.detach() - wanted).norm() / (plain.detach() - wanted).norm())}
    return found
