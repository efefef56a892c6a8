"""Which linear maps a model runs by calling them, and of which it reads the weight instead: a graft changes calls only.

Recurrent blocks do both. Mamba and Jamba compute `self.dt_proj.weight @ x` and never call dt_proj: an adapter there would have
no effect, so such a map is no site. Mamba2 and its relatives hand `self.out_proj.weight` to a fused kernel while training
and call the map elsewhere: such a map is a site, and its owner takes the plain path while a graft sits on it.

The source of the owner's class tells: reads of `self.CHILD.weight` outside set-up code, and the `if` tests around them. A
test on `self.training` makes a read "training"; one that the owner's attributes and config decide as false makes it dead
(BLOOM's sliced products); where a test depends on more than that, a map that is called elsewhere counts as called. A class
without source is taken to call its maps. Nothing is imported or run but tests made of attributes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

#: what is asked of a weight without using its values
_FACTS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "dim", "size", "numel", "element_size", "is_floating_point"}
_QUESTIONS = {"isinstance": isinstance, "hasattr": hasattr, "getattr": getattr, "len": len}


def reads(owner: nn.Module) -> dict[str, str]:
    """{child: "always" or "training"} of the children of which the owner's forward reads the weight instead of calling them."""
    found: dict[str, str] = {}
    for child, tests in _reads_of(type(owner))[0]:
        when = _when(owner, child, tests)
        if when is not None and found.get(child) != "always":
            found[child] = when
    return found


def _when(owner: nn.Module, child: str, tests: tuple[tuple[ast.expr, bool], ...]) -> str | None:
    training = open_test = False
    for test, wanted in tests:
        if any(isinstance(node, ast.Attribute) and node.attr == "training" for node in ast.walk(test)):
            training = True
            continue
        answer = _answer(test, owner)
        if answer is None:
            open_test = True
        elif answer != wanted:
            return None
    if training:
        return "training"
    return None if open_test and child in _reads_of(type(owner))[1] else "always"


def _answer(test: ast.expr, owner: nn.Module) -> bool | None:
    """The value of a test on attributes of the owner; None when it asks for anything else."""
    for node in ast.walk(test):
        if isinstance(node, ast.Name) and node.id != "self" and node.id not in _QUESTIONS:
            return None
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS):
            return None
    try:
        return bool(eval(compile(ast.Expression(test), "<test>", "eval"), {"__builtins__": {}, **_QUESTIONS}, {"self": owner}))
    except Exception:  # an attribute that this instance lacks
        return None


@cache
def _reads_of(cls: type) -> tuple[tuple[tuple[str, tuple], ...], frozenset[str]]:
    """((child, ((test, wanted), ...)), ...) of every read of a child's weight, and the names of the children that are called."""
    trees = [_tree(function) for function in _functions(cls) if "weight" in function.__code__.co_names]
    found = tuple(read for tree in trees if tree is not None for read in _walk(tree, ()))
    if not found:
        return (), frozenset()
    called = {node.func.attr for function in _functions(cls) if (tree := _tree(function)) is not None for node in ast.walk(tree)
              if isinstance(node, ast.Call) and _of_self(node.func)}
    return found, frozenset(called)


def _functions(cls: type) -> Iterator[Any]:
    """The functions of a class and its bases, up to those that all models have, that may run in a forward."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            return
        if base is PlainPath:
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if name in seen or not hasattr(function, "__code__"):
                continue
            seen.add(name)
            if name != "__init__" and "init_" not in name and "reset" not in name:
                yield function


def _tree(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _walk(node: ast.AST, tests: tuple) -> Iterator[tuple[str, tuple]]:
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _walk(node.test, tests)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            for child in branch if isinstance(branch, list) else [branch]:
                yield from _walk(child, (*tests, (node.test, wanted)))
        return
    if isinstance(node, ast.Attribute) and node.attr in _FACTS:
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS:
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight" and _of_self(node.value):
        yield node.value.attr, tests
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, tests)


# -- the plain path ------------------------------------------------------------------------------------------------------
class PlainPath:
    """Mixed into the class of an owner: its forward runs as outside training, so that it calls all of its maps. Its children
    keep their mode."""

    plain_class: type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, self.training = self.training, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training


_PLAIN: dict[type, type] = {}


def keep_calls(owner: nn.Module, child: str) -> None:
    """Makes the owner call this child in training too (idempotent); nothing happens where it does so anyway."""
    if not isinstance(owner, PlainPath) and reads(owner).get(child) == "training":
        plain = type(owner)
        if plain not in _PLAIN:
            _PLAIN[plain] = type(plain.__name__, (PlainPath, plain), {"plain_class": plain})
        owner.__class__ = _PLAIN[plain]


def release_calls(owner: nn.Module) -> None:
    """The inverse, when no child has a graft or a storage any more."""
    from .protocols import StoredWeight

    if isinstance(owner, PlainPath) and not any("graft" in child._modules or isinstance(child, StoredWeight)
                                               for child in owner.children()):
        owner.__class__ = type(owner).plain_class


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the module called `name`."""
    return model.get_submodule(name.rpartition(".")[0])
