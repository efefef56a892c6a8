"""Several short examples in one row of `max_length` tokens, computed exactly as if each stood alone.

A packed row carries `position_ids` that restart at 0 with each example. Transformers builds a block-diagonal mask from
them (`masking_utils.find_packed_sequence_indices`) for eager, sdpa, flex and flash attention and for sliding windows,
on two conditions: no `attention_mask` is given and no cache exists. `model_inputs` (collate.py) sees to both; with
`use_cache=True`, the default of every model config, the examples would silently see each other. An explicit 4-D mask
is not the better way: a boolean one is *added* by eager attention, and either kind replaces the sliding window.
Models that ignore position_ids (ALiBi, recurrent layers) cannot be packed: `assert_packable` measures it.
"""

from __future__ import annotations

import torch

from ..errors import IncompatibleError


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices with sum of lengths <= capacity: longest first (ties by index), each into the first bin with room.

    Indices within a bin and bins by their first index are in ascending order, so the result is a pure function of the
    lengths. O(n log n) with a tree of the room left in each bin. Every length must be <= capacity.
    """
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * size)  # room[k] = max(room[2k], room[2k+1]); leaves are bins
    bins: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < lengths[index])
        bins[node - size].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(each) for each in bins if each)


@torch.no_grad()
def assert_packable(model) -> None:
    """Compares packed with separate rows on the model itself (24 tokens).

    Raises IncompatibleError if the logits differ by more than 1e-4 (fp32) or 5e-2 (16 bit) of their largest value.
    Leaves training mode as it was and draws no random number.
    """
    from .collate import Collator, model_inputs

    lengths, device = (7, 5, 9), next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[(17 * k + 31 * i + 3) % vocabulary for i in range(n)] for k, n in enumerate(lengths)]
    packed = [{"input_ids": rows[0] + rows[1], "labels": rows[0] + rows[1], "position_ids": [*range(7), *range(5)]},
              {"input_ids": rows[2], "labels": rows[2], "position_ids": [*range(9)]}]
    training = model.training
    model.eval()
    try:
        together = model(**{k: v.to(device) if torch.is_tensor(v) else v
                            for k, v in model_inputs(Collator(0)(packed)).items()}).logits
        apart = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
    finally:
        model.train(training)
    pieces = (together[0, :7], together[0, 7:12], together[1, :9])
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in zip(pieces, apart))
    largest = max(float(b.float().abs().max()) for b in apart)
    if not difference <= (1e-4 if together.dtype == torch.float32 else 5e-2) * largest:
        raise IncompatibleError(f"{type(model).__name__} does not keep packed examples apart: logits differ by"
                                f" {difference:.1e} of {largest:.1e}", remedy="set data.packing: false")
