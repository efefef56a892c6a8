"""The gradients of whole weights, for the starts that follow them.

    G = mean over `batches` batches of dL/dW  (out, in), fp32, at the pretrained weights

The gradient of a site is taken from its input and the gradient of its output, G += g^T x, in one backward pass a batch; so it
is the same on quantized storage (at the dequantized weight), and no weight needs a `.grad`. The pass keeps the activations of a
whole batch and one fp32 matrix a site in CPU memory; dropout is off in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from ..modeling.state import state_of
from .base import Initializer


class GradientPass(Initializer):
    """Base of these initializers. The config has `batches`, the number of batches to look at."""

    needs = "gradients"

    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if any(s.expert is not None for s in sites):
            raise UsageError(f"{self.method} reads the inputs and gradients of modules; fused experts have none of their own",
                             remedy="exclude the experts: adapter.target_modules: attention")

    def statistics(self, model, sites, config, batches):
        """{module name: G (out, in) fp32 on the CPU}."""
        super().statistics(model, sites, config, batches)
        names = dict.fromkeys(s.module_name for s in sites)
        sums: dict[str, Tensor] = {}
        seen, was_training, holder = 0, model.training, state_of(model)
        model.eval()
        try:
            for _, batch in zip(range(self.config.batches), batches):
                # the pretrained point: whatever else is attached is off
                with holder.scope(disabled=holder.current.disabled | set(holder.grafts)), torch.enable_grad():
                    self._look(model, names, sums, batch)
                seen += 1
        finally:
            model.train(was_training)
        if not seen:
            raise UsageError(f"{self.method} got no batch to look at", remedy="give data with at least one batch")
        missing = [n for n in names if n not in sums]
        if missing:
            raise UsageError(f"{self.method} saw no gradient at '{missing[0]}': the loss does not depend on it",
                             remedy="exclude it: adapter.exclude_modules")
        return {name: total / seen for name, total in sums.items()}

    def _look(self, model, names, sums, batch) -> None:
        leaf: list[Tensor] = []

        def begin(module, args, output):
            leaf.append(output.detach().requires_grad_())
            return leaf[-1].clone()  # a leaf must not be changed in place, which a model may do to its embeddings

        def watch(name):
            def hook(module, args, output):
                x = args[0].detach()

                def add(grad):
                    G = (grad.reshape(-1, grad.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()).cpu()
                    sums[name] = sums[name].add_(G) if name in sums else G

                if output.requires_grad:  # else the loss cannot depend on it through the tokens, which is reported
                    output.register_hook(add)
            return hook

        handles = [model.get_input_embeddings().register_forward_hook(begin)]
        handles += [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
        try:
            loss = model(**{k: v for k, v in batch.items() if isinstance(v, Tensor) or k == "use_cache"}).loss
            if loss is None or not bool(torch.isfinite(loss)):
                raise UsageError(f"{self.method}: a batch has no finite loss", remedy="each batch needs labels with a trained token")
            torch.autograd.grad(loss, leaf)  # the hooks take what they want on the way; no parameter gets a .grad
        finally:
            for handle in handles:
                handle.remove()
