"""How far predicted numbers are from the true ones. With predictions y_r and labels t_r of n rows

    mse = sum_r (y_r - t_r)^2 / n,    rmse = sqrt(mse),    mae = sum_r |y_r - t_r| / n.

Numbers come from where those of the correlations come from; answers that are none are left out and counted (`not_numbers`).
"""

from __future__ import annotations

import numpy as np

from .base import metric, ratio
from .correlation import Numbers


@metric("mse", summary="mean squared error of predicted numbers; rmse, its root")
class SquaredError(Numbers):
    def statistics(self, rows):
        gap = np.subtract(*super().statistics(rows).T)
        return np.stack([np.ones_like(gap), gap**2], 1)

    def scores(self, sums):
        mse = ratio(sums[..., 1], sums[..., 0])
        return {"mse": mse, "rmse": np.sqrt(mse)}


@metric("mae", summary="mean absolute error of predicted numbers")
class AbsoluteError(Numbers):
    def statistics(self, rows):
        gap = np.subtract(*super().statistics(rows).T)
        return np.stack([np.ones_like(gap), np.abs(gap)], 1)

    def scores(self, sums):
        return {"mae": ratio(sums[..., 1], sums[..., 0])}
