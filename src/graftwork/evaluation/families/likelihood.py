"""Metrics of the likelihood of the trained tokens: loss, perplexity, bits per byte.

With a row r of tokens x_1 .. x_T of which the set A_r is trained (the answer; of plain text everything that has a token before it):

    loss       = sum_r sum_{t in A_r} -log p(x_t | x_<t) / sum_r |A_r|          nats per token
    perplexity = exp(loss)
    bits_per_byte   = sum_r sum_t -log2 p / bytes of the text of these tokens   comparable between tokenizers
    byte_perplexity = 2^bits_per_byte

The end token is among the trained tokens where training appends it; it has no bytes. For a run whose objective judges rows, not tokens
(classification by label words), a term of the loss is a row; of a regression head it is the squared error of a row.
"""

from __future__ import annotations

import numpy as np

from .base import Metric, metric, ratio


@metric("loss", needs=("likelihood",), summary="nats per trained token (per row for classifiers), perplexity, share of tokens right")
class Loss(Metric):
    real = True

    def fit(self, rows):
        self.words = not any(row.get("classified") for row in rows)

    def usable(self, row):
        return row.get("terms") is not None

    def statistics(self, rows):
        return np.array([[row["squared_error"] if "squared_error" in row else row["nll"], row["terms"], row.get("terms_right", 0)]
                         for row in rows], dtype=np.float64)

    def scores(self, sums):
        loss = ratio(sums[..., 0], sums[..., 1])
        if not self.words:
            return {"loss": loss}
        return {"loss": loss, "perplexity": np.exp(np.minimum(loss, 50.0)), "token_accuracy": ratio(sums[..., 2], sums[..., 1])}


@metric("bits_per_byte", needs=("likelihood",), summary="likelihood per byte of text, comparable between tokenizers; byte_perplexity")
class BitsPerByte(Metric):
    def usable(self, row):
        return row.get("bytes") is not None

    def statistics(self, rows):
        return np.array([[row["nll"], row["bytes"]] for row in rows], dtype=np.float64)

    def scores(self, sums):
        bits = ratio(sums[..., 0], sums[..., 1]) / np.log(2)
        return {"bits_per_byte": bits, "byte_perplexity": np.exp2(np.minimum(bits, 72.0))}

    def also(self, rows):
        return {"bytes": int(sum(row["bytes"] for row in rows if self.usable(row)))}
