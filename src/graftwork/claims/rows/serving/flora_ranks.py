"""FLoRA (batched): the rank up to which element-wise adapters are quicker than batched products."""

CLAIM = {
    "system": "FLoRA (batched)",
    "statement": "more than 3x the throughput of batched LoRA at rank 1, about 2.5x at rank 2, level at rank 8; a cost model tells"
                 " which is quicker",
    "number": "3x, 2.5x, crossover at 8",
    "source": "arXiv 2312.05677",
    "first": 12,
    "kind": "serving",
    "setting": "the maps of a block of SmolLM2-135M in fp32 (576 to 576, 576 to 1536, 1536 to 576), one token of 32 rows on 32 "
               "adapters; FLoRA with its r-fold product against W x and two batched products with every row's own factors, and "
               "against the kernel that the engine picks; middle processor time; lines through ranks 1 and 4 predict ranks 2 and"
               " 8 (wrong: winners missed by over 20 %)",
    "baseline": "bmm",
    "holds": "bmm.seconds1 >= 3 * flora.seconds1 and bmm.seconds2 >= 2.5 * flora.seconds2 and max(flora.wrong, 0) == 0",
    "holds_here": "bmm.seconds1 > flora.seconds1 and max(flora.wrong, 0) == 0",
    "refuted_by": "slower at rank 1, or a wrong prediction",
    "minutes": 4,
}

SHAPES, RANKS = ((576, 576), (576, 1536), (1536, 576)), (1, 2, 4, 8)


def measure(seed: int, quick: bool) -> dict:
    import torch
    import torch.nn.functional as F

    from graftwork.adapters.batched import Bank, change_of_rows, gathered, row_index
    from graftwork.adapters.flora import gather, spread
    from graftwork.claims import serving_runs as serving

    found = {arm: {} for arm in ("flora", "bmm", "lora")}
    draw = torch.Generator().manual_seed(seed)
    index = row_index(torch.randperm(32, generator=draw).tolist(), torch.device("cpu"))
    for r in RANKS:
        sites = []
        for wide, out in SHAPES:
            W, x = torch.randn(out, wide, generator=draw), torch.randn(32, 1, wide, generator=draw)
            pairs = [(torch.randn(out, r, generator=draw), torch.randn(r, wide, generator=draw)) for _ in range(32)]
            masks = torch.randn(r, 32, 1, out, generator=draw), torch.randn(r, 32, 1, wide, generator=draw)
            sites.append((W, x, Bank.of(pairs, (out, wide), torch.float32), *masks))

        def flora(sites=sites):
            for W, x, _, A, B in sites:
                gather(F.linear(spread(x, B), W), A)

        def bmm(kernel, sites=sites):
            for W, x, bank, _, _ in sites:
                F.linear(x, W).add_(kernel(x, index, bank))

        calls = {"flora": flora, "bmm": lambda bmm=bmm: bmm(gathered), "lora": lambda bmm=bmm: bmm(change_of_rows)}
        with torch.no_grad():
            for arm, seconds in serving.times(calls, 5 if quick else 101).items():
                found[arm][f"seconds{r}"] = seconds
    found["flora"]["wrong"] = sum(wrong(found["flora"], found["bmm"], r) for r in (2, 8))
    return found


def wrong(flora: dict, bmm: dict, r: int) -> int:
    """Whether lines through ranks 1 and 4 name the loser at rank r, where the winner is ahead by over 20 %."""
    def line(times):
        return times["seconds1"] + (times["seconds4"] - times["seconds1"]) * (r - 1) / 3

    ratio = bmm[f"seconds{r}"] / flora[f"seconds{r}"]
    return int(max(ratio, 1 / ratio) > 1.2 and (line(bmm) > line(flora)) != (ratio > 1))
