"""Fed-SB: the clients' R matrices between shared B and A average exactly."""

CLAIM = {
    "system": "Fed-SB",
    "statement": "averaging the r x r matrices aggregates the clients exactly",
    "number": "exact",
    "source": "arXiv 2502.15436",
    "kind": "exactness",
    "setting": "5 clients of rank 8 on a small Llama's seven maps, unequal weights; against the weighted sum of "
               "the dense changes in float64",
    "baseline": "lora",
    "holds": "fed_sb.error <= 1e-6 and lora.error >= 0.1",
    "refuted_by": "a sum that differs",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    model = probes.model(seed, blocks=1)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights, found = weights / weights.sum(), {}
    for arm, method, averaged in (("fed_sb", "lora_sb", ("M",)), ("lora", "lora", ("lora_A", "lora_B"))):
        clients = []
        for i in range(5):
            graft = graftwork.attach(model, method, name=f"{arm}{i}", r=8, seed=0)  # one seed: the frozen directions are shared
            probes.scatter(graft, 10 * seed + i)
            clients.append(graft)
        wanted = {name: sum(w * c.delta_weights()[name].double() for w, c in zip(weights, clients)) for name in clients[0].adapters}
        server = clients[0]
        for name, adapter in server.adapters.items():
            for part in averaged:
                mean = sum(w * getattr(c.adapters[name], part).detach().double() for w, c in zip(weights, clients))
                getattr(adapter, part).data.copy_(mean)
        found[arm] = {"error": max(probes.relative(server.delta_weights()[name], wanted[name]) for name in wanted)}
        for client in clients:
            client.detach()
    return found
