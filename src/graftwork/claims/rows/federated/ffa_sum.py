"""FFA-LoRA: with A frozen and shared, the mean of B is the mean of the changes, and half of the factors travels."""

CLAIM = {
    "system": "FFA-LoRA",
    "statement": "freezing A halves the communication and makes the aggregation exact",
    "number": "1/2",
    "source": "arXiv 2403.12313",
    "kind": "exactness",
    "setting": "6 clients of rank 4 on a small Llama's seven maps with one A; bytes sent are those of B; half "
               "only where the map is square",
    "baseline": "lora",
    "holds": "ffa.error <= 1e-6 and lora.error >= 0.1 and abs(ffa.sent_square - 0.5) <= 1e-9",
    "refuted_by": "a sum that differs",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import graftwork
    from graftwork.claims import probes

    model = probes.model(seed, blocks=1)
    found = {}
    for arm, shared in (("ffa", True), ("lora", False)):
        clients = []
        for i in range(6):
            graft = graftwork.attach(model, "lora", name=f"{arm}{i}", r=4, seed=0)
            kept = {name: a.lora_A.detach().clone() for name, a in graft.adapters.items()}
            probes.scatter(graft, 10 * seed + i)
            for name, adapter in graft.adapters.items() if shared else ():
                adapter.lora_A.data.copy_(kept[name])
            clients.append(graft)
        wanted = {name: sum(c.delta_weights()[name].double() for c in clients) / 6 for name in clients[0].adapters}
        server = clients[0]
        for name, adapter in server.adapters.items():
            for part in ("lora_A", "lora_B"):
                getattr(adapter, part).data.copy_(sum(getattr(c.adapters[name], part).detach().double() for c in clients) / 6)
        square = next(a for n, a in server.adapters.items() if n.endswith("q_proj"))
        sent = square.lora_B.numel() / (square.lora_A.numel() + square.lora_B.numel())
        found[arm] = {"error": max(probes.relative(server.delta_weights()[name], wanted[name]) for name in wanted),
                      "sent_square": sent if shared else 1.0}
        for client in clients:
            client.detach()
    return found
