"""VTC: what two tenants with requests waiting have got never differs by more than a bound."""

CLAIM = {
    "system": "VTC (fair serving)",
    "statement": "the service of two backlogged tenants differs by a bounded amount, whatever they send; first come first served "
                 "has no such bound",
    "number": "2 max(w_p L_input, w_q M)",
    "source": "arXiv 2401.00588",
    "kind": "exactness",
    "setting": "the engine's own scheduler on a virtual clock: one tenant sends 2 and one 8 requests a second, both more than "
               "their share, for 100 s; service is prompt tokens and twice the written ones, counted from 10 s on; M the tokens "
               "that may run at once",
    "baseline": "fcfs",
    "holds": "fair.gap <= fair.bound and fcfs.gap > fair.bound",
    "refuted_by": "a greater difference than the bound",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import numpy as np

    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine import Limits
    from graftwork.serving.simulate import simulate
    from graftwork.serving.workload import Trace

    draw, running = np.random.RandomState(seed), 8
    rows = sorted((at, tenant, int(draw.randint(8, 33)), int(draw.randint(8, 33)))
                  for tenant, rate in ((0, 2), (1, 8)) for at in draw.uniform(0, 100, 100 * rate))
    traffic = Trace(*(np.array(column) for column in zip(*rows)), ranks=(8,), rate=10.0)
    longest = traffic.prompts.max() + traffic.answers.max()
    bound, found = 2.0 * max(traffic.prompts.max(), 2 * running * longest), {}
    for arm, policy in (("fair", "fair"), ("fcfs", "fcfs")):
        done = simulate(traffic, serving.machine(), policy=policy, limits=Limits(max_running=running), slo=1e9).requests
        lead = [service(done, "a1", at) - service(done, "a0", at) for at in np.linspace(10, 100, 91)]
        found[arm] = {"gap": float(max(lead) - min(lead)), "bound": float(bound)}
    return found


def service(requests, tenant: str, at: float) -> float:
    """What a tenant has got until then; an answer is written evenly between its first and its last token."""
    got = 0.0
    for request in requests:
        if request.tenant == tenant and request.first_token <= at:
            share = min(1.0, (at - request.first_token) / max(request.ended - request.first_token, 1e-9))
            got += len(request.prompt) + 2 * len(request.output) * share
    return got
