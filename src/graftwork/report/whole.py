"""Singular values of what full tuning changed: W_after - W_before, one matrix at a time.

W_after is read from the run's `model/` folder, W_before from the base's own files, rounded once to the precision that was trained in (as
training began with it); neither model is loaded. First the two are compared tensor by tensor, then the difference of each chosen matrix is
decomposed in float64. At no time is there more than the two stored tensors of one weight and its difference. Of fused experts each is a
matrix of its own, a convolution is (out, the rest).

Which: every matrix that changed, or, where they are more than asked for, those of evenly spaced layers. A head that the base lacks and a
weight of another shape have nothing to be compared with, and are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import GraftworkError, ModelError
from .spectra import evenly, summary


class Matrix(NamedTuple):
    """One matrix of a model: the parameter, the expert of a fused one, whether it is stored as (in, out)."""

    name: str
    expert: int | None
    transposed: bool

    @property
    def site(self) -> str:
        owner = self.name.removesuffix(".weight")
        return owner if self.expert is None else f"{owner}.{self.expert}"


class Change:
    """The weights of a tuned model folder beside those of its base. task: as in `load_model`. without: matrices of the tuned model that
    the base lacks or has in another shape. Raises ModelError where files are missing or damaged, or the base's are codes."""

    def __init__(self, tuned: str | Path, base: str | Path, *, task: str = "causal_lm"):
        from ..modeling.models import hollow_model, load_config, model_folder
        from ..modeling.source import build_source

        if getattr(load_config(base), "quantization_config", None):
            raise ModelError(f"{base} holds codes, and the dense weights that training began with are not in it",
                             remedy="leave --spectra out for this run")
        config = load_config(tuned)
        skeleton = hollow_model(config, task=task, dtype=getattr(config, "dtype", None))
        self.after = build_source(skeleton, model_folder(tuned), ref=str(tuned))
        self.before = build_source(skeleton, model_folder(base), ref=str(base))
        self.matrices: list[Matrix] = []
        self.without: list[str] = []
        for name in self.after.names():
            if len(self.after.shape(name)) < 2:
                continue
            if name in self.before and self.before.shape(name) == self.after.shape(name):
                self.matrices += _matrices(skeleton, name, self.after.shape(name))
            else:
                self.without.append(name)

    def pair(self, matrix: Matrix) -> tuple[Any, Any]:
        """(after, before) of one matrix, both in the dtype that was trained."""
        after = self.after.read(matrix.name, expert=matrix.expert)
        return after, self.before.read(matrix.name, dtype=after.dtype, expert=matrix.expert)

    def changed(self) -> list[Matrix]:
        """The matrices that differ."""
        import torch

        return [matrix for matrix in self.matrices if not torch.equal(*self.pair(matrix))]

    def spectrum(self, matrix: Matrix) -> dict[str, Any]:
        """The numbers that are kept of one matrix's change, with its shape (out, in)."""
        import torch

        after, before = self.pair(matrix)
        change = after.double().sub_(before).flatten(1)
        del after, before
        shape = list(change.shape)
        return {"shape": shape[::-1] if matrix.transposed else shape, **summary(torch.linalg.svdvals(change))}


def _matrices(skeleton: Any, name: str, shape: tuple[int, ...]) -> list[Matrix]:
    """Of a parameter: one, or one for each of its fused experts."""
    from torch.nn.modules.conv import _ConvNd

    from ..modeling.protocols import is_conv1d

    owner = skeleton.get_submodule(name.rpartition(".")[0])
    if len(shape) == 3 and not isinstance(owner, _ConvNd):
        return [Matrix(name, expert, False) for expert in range(shape[0])]
    return [Matrix(name, None, is_conv1d(owner))]


def write_changes(folder: Path, tuned: str | Path, base: str | Path, *, task: str, sites: int, stored: bool = False,
                  say: Callable[[str], None] = lambda text: None) -> None:
    """spectra.json of a run that trained the whole model. stored: the weights trained as codes. Raises GraftworkError naming the run."""
    from ..files import atomic_write_text
    from ..modeling.sites import layer_of

    try:
        change = Change(tuned, base, task=task)
        say(f"spectra: comparing {len(change.matrices)} matrices with those of {base}")
        changed = {matrix.site: matrix for matrix in change.changed()}
        names = evenly(list(changed), sites, layer_of)
        found = {}
        for i, name in enumerate(names, 1):
            found[name] = change.spectrum(changed[name])
            if i == len(names) or i % 8 == 0:
                say(f"spectra: {i} of {len(names)} matrices")
    except GraftworkError as error:
        raise type(error)(f"{folder}: {error.message}", remedy=error.remedy) from None
    same = len(change.matrices) - len(changed)
    notes = [f"W after training less W of {base}."]
    notes += [f"{same} of {len(change.matrices)} matrices are as they were."] if same else []
    notes += [f"Without {', '.join(change.without[:4])}{' ...' if len(change.without) > 4 else ''}, which the base lacks or has in another "
              "shape."] if change.without else []
    notes += ["The weights trained as codes: what the first rounding changed is in it."] if stored else []
    document = {"sites": found, "of": len(changed), "note": " ".join(notes)}
    if not found:
        document["left_out"] = f"no matrix differs from that of {base}"
    atomic_write_text(folder / "spectra.json", json.dumps(document))
