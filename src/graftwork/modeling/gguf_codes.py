"""A .gguf file as the source of a model whose linear weights keep the file's blocks: read tensor by tensor, never dense as a whole.

Names, and what the file holds otherwise than Transformers does, are Transformers' own (`modeling_gguf_pytorch_utils`): rows of q and k of
Llama-type models in another order, Conv1D weights transposed, norms of Gemma plus one. A change of the order of rows keeps blocks
whole, so it is done to the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from .checkpoint import Stored
from .gguf_blocks import BLOCK_TYPES, decode_rows
from .gguf_import import _parsed_once, gguf_config, open_gguf, quiet_transformers
from .source import ModelSource, Origin, _fake_mode, _tied_aliases

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Transformers' processors of architectures whose linear weights lie in the file as they are, but for the order of rows
_KNOWN = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor", "GPT2TensorProcessor")
_FLOATS = ("F32", "F16", "BF16")
#: weights decoded at a time
TILE = 1 << 20


@dataclass(frozen=True)
class GgufSource(ModelSource):
    """`stored` goes by the file's names; weights are read in fp32."""

    file: Path = None
    processor: Any = field(repr=False, default=None)

    def files(self) -> list[Path]:
        return [self.file]

    def _tensor(self, name: str) -> Any:
        [[key]] = self._origin(name).keys.values()
        return next(each for each in open_gguf(self.file).tensors if each.name == key)

    def _mended(self, array: Any, key: str) -> Any:
        """An array (out, ...) of the file as Transformers has it."""
        return self.processor.process(weights=array, name=key, tensor_key_mapping={}, parsed_parameters={"tensors": {}}).weights

    def kind(self, name: str) -> str | None:
        """The block type of a weight (q4_k, ...); None for one that the file keeps in floats. Raises UsageError for other types."""
        kind = self._tensor(name).tensor_type.name
        if kind in _FLOATS:
            return None
        if kind.lower() not in BLOCK_TYPES:
            raise UsageError(f"'{name}' is kept as {kind.lower()} in {self.file}, which no storage reads",
                             remedy=f"choose a file of {', '.join(BLOCK_TYPES)}, or another storage, which quantises the decoded weights")
        return kind.lower()

    def blocks(self, name: str) -> torch.Tensor:
        """The blocks of a weight (out, bytes of a row) uint8, rows in Transformers' order; a fake tensor under FakeTensorMode.
        Raises ModelError for blocks of no finite value."""
        import numpy
        import torch

        tensor, kind = self._tensor(name), self.kind(name)
        if _fake_mode() is not None:
            return torch.empty(tuple(tensor.data.shape), dtype=torch.uint8)
        data = tensor.data if type(self.processor).__name__ == "GPT2TensorProcessor" else self._mended(tensor.data, tensor.name)
        found = torch.from_numpy(numpy.array(data))  # a copy: the mapped file is let go
        columns = int(tensor.shape[0])
        for part in found.split(max(1, TILE // columns)):
            if not torch.isfinite(decode_rows(part, kind, columns)).all():
                raise ModelError(f"{self.file} is damaged: '{name}' holds values that are not finite", remedy="get the file again")
        return found

    def read(self, name, dtype=None, rows=None, expert=None):
        import gguf
        import numpy
        import torch

        if _fake_mode() is not None:
            return super().read(name, dtype, rows, expert)
        tensor, kind = self._tensor(name), self._tensor(name).tensor_type.name
        if tensor.data.ndim == 2 and kind.lower() in BLOCK_TYPES and type(self.processor).__name__ != "GPT2TensorProcessor":
            blocks = torch.from_numpy(numpy.array(self._mended(tensor.data, tensor.name)))
            blocks = blocks if rows is None else blocks[rows]  # rows are chosen before they are decoded
            columns = int(tensor.shape[0])
            found, step = torch.empty(len(blocks), columns, dtype=dtype or torch.float32), max(1, TILE // columns)
            for start in range(0, len(blocks), step):
                found[start:start + step] = decode_rows(blocks[start:start + step], kind.lower(), columns)
        else:
            array = self._mended(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)
            found = torch.from_numpy(numpy.array(array, dtype=numpy.float32, order="C"))
            found = found if rows is None else found[rows].contiguous()
        return found if dtype is None else found.to(dtype)


def gguf_source(path: Path, folder: Path, model: nn.Module, *, ref: str | None = None) -> GgufSource:
    """The source of `model` (on meta, fake or filled) in a .gguf file; folder: its config, tokenizer and licences.
    Raises UsageError for an architecture whose weights would have to be taken apart."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader = open_gguf(path)
    architecture = reader.fields["general.architecture"].contents()
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=model.config.to_dict())
    if type(processor).__name__ not in _KNOWN:
        raise UsageError(f"the weights of a '{architecture}' file cannot be kept as they are: Transformers has them in another form",
                         remedy="storage: {method: gguf, type: q4_k} quantises the decoded weights again")
    live = model.state_dict()
    whole = model
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        with torch.device("meta"), quiet_transformers():
            whole = AutoModelForCausalLM.from_config(model.config)
    with _parsed_once(path):
        names = theirs.get_gguf_hf_weights_map(whole, processor)
    stored, origins, prefix = {}, {}, model.base_model_prefix
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is not None and name not in live:  # a bare trunk
            name = name.removeprefix(f"{prefix}.")
        if name in live:
            shape = tuple(live[name].shape)
            if sorted(shape) != sorted(int(n) for n in tensor.shape):
                continue
            stored[tensor.name] = Stored(path, shape, "F32")
            origins[name] = Origin({tensor.name: [tensor.name]}, shape)
    aliases = _tied_aliases(model, live, origins)
    return GgufSource(folder, stored, {n: o for n, o in origins.items() if n not in aliases}, aliases,
                      prefix if hasattr(model, prefix) else "", model.config, ref, None, file=path, processor=processor)


def load_coded(ref: Any, keep: Callable[[nn.Module, GgufSource], None], *, task: str = "causal_lm", dtype: Any = None,
               num_labels: int | None = None, fake: bool = False, attn_implementation: str = "sdpa", trust_remote_code: bool = False,
               seed: int = 0) -> tuple[nn.Module, Any]:
    """`load_model` of a .gguf reference without its conversion. keep(model, source) puts modules with the file's codes in place of
    linear maps whose weights are on meta (fake, under `fake`); what is on meta after it is read dense, tensor by tensor."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn

    from .models import _check_missing, _draw, _model_errors, _set_labels, empty_model, load_model, load_tokenizer, parse_dtype
    from .references import model_folder

    if fake:
        model, tokenizer = load_model(ref, task=task, dtype=dtype, num_labels=num_labels, fake=True,
                                      attn_implementation=attn_implementation)
        weight = next(model.parameters())
        with weight.fake_mode:
            keep(model, gguf_source(ref.path, ref.path.parent, model, ref=ref.ref))
        return model, tokenizer
    folder = model_folder(ref, weights=False)
    config, tokenizer = gguf_config(ref.path), load_tokenizer(replace(ref, kind="config", path=folder))
    _set_labels(config, num_labels, tokenizer, task)
    with _model_errors(ref.ref, task=task), torch.random.fork_rng(devices=[]):
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model = empty_model(config, task=task, dtype=parse_dtype(dtype), attn_implementation=attn_implementation)
        model.tie_weights()  # every parameter was made anew on meta
        source = gguf_source(ref.path, folder, model, ref=ref.ref)
        keep(model, source)
        new = []
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                known = name in source
                value = source.read(name, parameter.dtype) if known else torch.empty_like(parameter, device="cpu")
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                new += [] if known else [name]
        _check_missing(model, new, task, ref)
        _draw(model, new, seed)
        model.tie_weights()
    model.graft_new_weights, model.graft_source, model.graft_tokenizer = new, source, tokenizer
    return model.eval(), tokenizer
