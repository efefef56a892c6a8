"""The house keeps its shape: imports point down, no stray prints, every method documented."""

import ast
from pathlib import Path

import graftwork
from graftwork.registry import AXES, methods

ROOT = Path(graftwork.__file__).parent
LAYERS = [
    {"errors", "registry", "files"}, {"cache"}, {"modeling"},
    {"storage", "adapters", "initializers", "optim", "estimators", "selection", "objectives"},
    {"recipe", "recipe_rules", "artifact", "data"},
    {"training", "serving", "interchange", "compression"}, {"planning", "evaluation", "api"},
    {"claims", "report", "demo"}, {"cli"},
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def module_level_imports(path: Path):
    """Dotted graftwork modules imported when `path` is imported (function bodies and TYPE_CHECKING blocks are lazy)."""
    package = ["graftwork", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join([*base, node.module] if node.module else base), [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graftwork"):
            yield node.module, [a.name for a in node.names]


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module, names in module_level_imports(path):
            parts = module.split(".")
            for target in [parts[1]] if len(parts) > 1 else names:
                if target == own or target not in LEVEL:
                    continue
                if LEVEL[target] > LEVEL[own] or (LEVEL[target] == LEVEL[own] == 3):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_every_package_has_a_level():
    found = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} <= set(LEVEL), found - set(LEVEL)


def test_every_method_is_documented():
    for info in methods():
        doc = __import__(info.cls.__module__, fromlist=["x"]).__doc__
        assert doc and len(doc) > 100, f"{info.axis} {info.name}: the module docstring states the method"
        assert info.title and info.summary
        if info.paper:
            assert info.paper in doc, f"{info.name}: its docstring cites arXiv {info.paper}"
    assert {m.axis for m in methods()} <= set(AXES)
