"""Multiple choice by likelihood: the choice that the model finds most likely behind the prompt.

With L_c = log p(choice c | prompt), the sum over its tokens (without an end token), c is right by

    choice_accuracy        argmax L_c
    choice_accuracy_norm   argmax L_c / bytes of the choice           no advantage of short choices
    choice_accuracy_pmi    argmax L_c - log p(choice c | "Answer:")   no advantage of common ones (Holtzman et al., arXiv 2104.08315)

The last one costs a second pass and is a metric of its own. Of equal scores the first choice is taken.
"""

from __future__ import annotations

from .answers import Mean
from .base import metric


@metric("multiple_choice", needs=("choices",), summary="share of rows whose most likely choice is right, raw and per byte")
class MultipleChoice(Mean):
    keys = ("choice_accuracy", "choice_accuracy_norm")


@metric("multiple_choice_pmi", needs=("choices", "unconditional"), summary="the same by likelihood over that without the prompt")
class MultipleChoicePmi(Mean):
    keys = ("choice_accuracy_pmi",)
