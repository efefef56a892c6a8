"""Small seeded models and tensors for identities; the global random state is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

VOCABULARY = 64


def model(seed: int = 0, *, width: int = 48, blocks: int = 2, double: bool = False) -> Any:
    """A small Llama with random weights."""
    from .bases import small_llama

    made = small_llama(VOCABULARY, seed, width=width, blocks=blocks).requires_grad_(False)
    return made.double() if double else made


def batches(count: int, seed: int = 0, rows: int = 3, length: int = 12) -> Iterator[dict[str, Any]]:
    """Model inputs with labels, random tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def mean_loss(made: Any, count: int, seed: int = 0) -> Any:
    import torch

    return torch.stack([made(**batch).loss for batch in batches(count, seed)]).mean()


def full_gradients(made: Any, names: Sequence[str], count: int, seed: int = 0) -> dict[str, Any]:
    """{module: gradient (out, in) of its whole weight} of the mean loss, by autograd."""
    import torch

    weights = [made.get_submodule(name).weight.requires_grad_() for name in names]
    found = torch.autograd.grad(mean_loss(made, count, seed), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(names, found))


def normal(seed: int, *shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scatter(graft: Any, seed: int, size: float = 0.1) -> None:
    """Random values in everything that a graft trains."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in graft.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def changes(graft: Any) -> list[Any]:
    """The change (out, in) of each site's whole map, in the model's dtype, from its outputs on the unit inputs."""
    import torch

    found = []
    with torch.no_grad():
        for site in graft.sites.values():
            unit = torch.eye(site.in_features, dtype=next(graft.model.parameters()).dtype)
            with graft.disabled():
                base = site.module(unit)
            found.append((site.module(unit) - base).T)
    return found


def stored(weight: Any, method: str, **options: Any) -> Any:
    """A weight in a storage."""
    from ..registry import make_config
    from ..storage.base import make_storage

    return make_storage(weight, method, make_config("storage", method, **options))


def relative(found: Any, wanted: Any) -> float:
    """Frobenius norm of the difference over that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def smollm_weight(name: str) -> Any:
    """One weight of SmolLM2-135M-Instruct, without loading the model."""
    from safetensors import safe_open

    from ..modeling.checkpoint import stored_tensors
    from ..modeling.references import model_folder

    folder = model_folder("smollm2-135m-instruct")
    with safe_open(stored_tensors(folder)[name].file, framework="pt") as file:
        return file.get_tensor(name).float()
