"""Memory before it is given: the bound of admission with shared pages, and how adapters are packed, both against brute force."""

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.serving.engine.pool import ALIGN, LayerShape, Pool
from graftwork.serving.engine.scheduler import worst_pages
from test_scheduling import state

pytestmark = pytest.mark.slow

SIZE = 4
# (which of two common beginnings, pages of it that are adopted, own tokens behind them, tokens left to write)
SHARER = st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(1, 9), st.integers(1, 5))


def sharing(shapes, origin=None):
    """Requests that adopted pages of common beginnings; the origin computed one of them itself and adopted nothing."""
    made, fresh = [], iter(range(1000, 100_000))
    for which, pages, own, left in shapes:
        r = state(pages * SIZE + own, left)
        r.pages = [100 * which + i for i in range(pages)] + [next(fresh) for _ in range(-(-own // SIZE))]
        r.cached = pages * SIZE
        made.append(r)
    if origin is not None:
        made[origin].cached = 0
    return made


def held(requests, written):
    """Distinct pages of these requests when each has written so much more (None: it has ended)."""
    pages = set()
    for number, (r, more) in enumerate(zip(requests, written)):
        if more is not None:
            needed = -(-(r.length + more) // SIZE)
            pages.update(r.pages)
            pages.update((number, i) for i in range(len(r.pages), needed))
    return len(pages)


@given(st.lists(SHARER, min_size=1, max_size=6), st.none() | st.just(0))
def test_shared_pages_of_requests_that_write(shapes, origin):
    requests = sharing(shapes, origin)
    bound, most_pages, most = worst_pages(requests, SIZE), 0, 0
    for step in range(max(r.remaining for r in requests) + 1):
        live = [r for r in requests if r.remaining >= step]
        most_pages = max(most_pages, held(requests, [step if r in live else None for r in requests]))
        adopted = [page for r in live for page in r.pages[: r.cached // SIZE]]
        twice = len(adopted) - len(set(adopted))
        most = max(most, sum(r.length + step for r in live) - twice * SIZE + len(live) * (SIZE - 1))
    assert most_pages <= bound <= most / SIZE


@settings(max_examples=60)
@given(st.lists(SHARER, max_size=3), st.lists(SHARER, min_size=1, max_size=3), st.none() | st.just(0))
def test_shared_pages_whenever_prompts_get_through(writing, reading, origin):
    """All orders: each request whose prompt is not through begins to write at any step, or after all others have ended."""
    requests = sharing([*writing, *reading], origin)
    bound = worst_pages(requests[: len(writing)], SIZE, requests[len(writing):])
    last = sum(r.remaining for r in requests) + 1
    starts = sorted({0, 1, 2, 4, last // 2, last})
    for begin in product(starts, repeat=len(reading)):
        first = [0] * len(writing) + list(begin)
        for step in range(last + 6):
            written = [None if r.remaining < step - at else max(step - at, 0) for r, at in zip(requests, first)]
            assert held(requests, written) <= bound, (begin, step)


# -- packing ------------------------------------------------------------------------------------------------------------------------
LAYERS = st.lists(st.builds(LayerShape, st.integers(1, 3), st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3)


@settings(max_examples=50)
@given(LAYERS, st.lists(st.integers(1, 700), max_size=24), st.sampled_from([8, 16]))
def test_tensors_of_an_adapter_lie_apart_and_inside(layers, sizes, page_tokens):
    pool = Pool(layers, 120, page_tokens=page_tokens)
    packing = pool.pack(sizes)
    assert len(packing.places) == len(sizes) and (packing.pages > 0) == bool(sizes)
    lanes = {}
    for size, (lane, offset) in zip(sizes, packing.places):
        assert offset % ALIGN == 0 and offset + size <= packing.pages * page_tokens * pool.cell_bytes[lane]
        lanes.setdefault(lane, []).append((offset, offset + size))
    for spans in lanes.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    start = pool.take_run(packing.pages, "x")
    if start is None:
        assert packing.pages > pool.pages
        return
    pieces = [pool.piece(start, place, (size,), torch.uint8) for place, size in zip(packing.places, sizes)]
    for number, piece in enumerate(pieces):  # written one by one, read afterwards
        piece.fill_(number + 1)
    assert all(bool((piece == number + 1).all()) for number, piece in enumerate(pieces))
    own = sum(int((pool.buffer == number + 1).sum()) for number in range(len(sizes)))
    assert own == sum(sizes)


def fewest(pool, sizes):
    """By trying every way to put the tensors into lanes; in a lane the one with most padding lies last."""
    padded = [-(-size // ALIGN) * ALIGN for size in sizes]
    choices = list(product(range(len(pool.cell_bytes)), repeat=len(sizes)))
    pages = 1
    while True:
        room = [pages * pool.page_tokens * size for size in pool.cell_bytes]
        for choice in choices:
            inside = [[i for i, lane in enumerate(choice) if lane == k] for k in range(len(room))]
            if all(sum(padded[i] for i in tensors) - max((padded[i] - sizes[i] for i in tensors), default=0) <= space
                   for tensors, space in zip(inside, room)):
                return pages
        pages += 1


def test_packing_takes_few_pages():
    draw, more = random.Random(0), 0
    for _ in range(150):
        layers = [LayerShape(draw.randint(1, 2), draw.randint(2, 8), draw.randint(2, 8)) for _ in range(draw.randint(1, 2))]
        pool = Pool(layers, 64, page_tokens=8, device="meta")
        sizes = [draw.choice([draw.randint(1, 400), 64 * draw.randint(1, 6)]) for _ in range(draw.randint(1, 4))]
        best = fewest(pool, sizes)
        assert best <= pool.pack(sizes).pages <= best + 1, (pool.cell_bytes, sizes)
        more += pool.pack(sizes).pages > best
    assert more < 15
