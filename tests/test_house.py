r"""The layout: short files and classes, imports in one direction, private names of other libraries in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "deepinv_deq"
# from the bottom to the top, along the data flow: states, maps, solvers, implicit, iterations, models, their certificate, training
LAYERS = [
    {"_versions", "compat", "autocast", "states", "_digest"},
    {"maps", "files", "group_norm", "datasets", "_sparse_matrices", "_sparse_parts", "_sparse_products", "physics"},
    {"solvers"},
    {"implicit"},
    {"iterations"},
    {"denoiser_settings", "denoisers", "spectra", "checks", "course", "warm_starts", "callbacks", "pretrained"},
    {"certificate"},
    {"reconstructor"},
    {"metrics", "equivariance", "contraction", "losses", "training"},
    {"deepinv_deq", "distributed", "from_optim"},  # the public names, and two paths of 0.1
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MODULES = {
    ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")
}


def nodes(source):
    r"""All nodes but those for type checkers only."""
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        else:
            yield node
            waiting += ast.iter_child_nodes(node)


def imports(source, modules):
    r"""Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.partition(".")[0] == "deepinv_deq"}


def part_of(module):
    return (module.split(".") + [""])[1] or "deepinv_deq"


def upward(edges):
    return [(a, b) for a, found in edges.items() for b in found if LEVEL[part_of(b)] > LEVEL[part_of(a)]]


def cycles(edges):
    r"""Modules that are left when those that import none of the others are removed again and again."""
    left = {a: set(found) for a, found in edges.items()}
    while leaves := {a for a, found in left.items() if not found & left.keys()}:
        left = {a: found for a, found in left.items() if a not in leaves}
    return set(left)


def long_classes(source, most=150):
    classes = [node for node in nodes(source) if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if node.end_lineno - node.lineno + 1 > most]


EDGES = {name: imports(path.read_text(), MODULES) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_classes_are_short(name):
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= 250 and not long_classes(source)


def test_files_of_tests_are_short():
    lines = {p: len(p.read_text().splitlines()) for p in (ROOT.parent / "tests").rglob("*.py")}
    assert len(lines) > 100 and not [(p.name, n) for p, n in lines.items() if n > 250]


def test_every_module_has_a_layer():
    assert {part_of(name) for name in MODULES} == LEVEL.keys()


def test_imports_go_one_way():
    assert not upward(EDGES) and not cycles(EDGES)


def test_the_checks_find_what_they_look_for():
    known = {"deepinv_deq.a", "deepinv_deq.b", "deepinv_deq"}
    source = (
        "from deepinv_deq import a\ndef f():\n    import deepinv_deq.b\nif TYPE_CHECKING:\n    import deepinv_deq.c\n"
    )
    assert imports(source, known) == {"deepinv_deq.a", "deepinv_deq.b"}
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
    assert not cycles({"a": {"b"}, "b": set()})
    assert upward({"deepinv_deq.states": {"deepinv_deq.maps"}, "deepinv_deq.maps": {"deepinv_deq.states"}}) == [
        ("deepinv_deq.states", "deepinv_deq.maps")
    ]
    assert long_classes("class A:\n    a = 1\n    b = 2\n", most=2) == ["A"]


def private_names(source):
    r"""Imports and attributes of PyTorch, TorchDEQ and deepinv whose path has a part that begins with one underscore."""
    paths = set()
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom):
            paths |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            paths |= {a.name for a in node.names}
        elif isinstance(node, ast.Attribute):
            paths.add(ast.unparse(node))
    parts = [
        path.split(".") for path in paths if path.partition(".")[0] in ("torch", "nn", "dinv", "deepinv", "torchdeq")
    ]
    return [".".join(p) for p in parts if any(name.startswith("_") and not name.startswith("__") for name in p)]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("deepinv_deq.compat")))
def test_private_names_of_other_libraries_are_in_compat_only(name):
    assert not private_names(MODULES[name].read_text())


def test_private_names_are_found():
    source = "import torch._dynamo\nfrom torch.nn.modules.batchnorm import _NormBase\nx = nn.modules.dropout._DropoutNd.__name__\n"
    found = ["nn.modules.dropout._DropoutNd", "torch._dynamo", "torch.nn.modules.batchnorm._NormBase"]
    assert set(found) <= set(private_names(source)) and not private_names("torch.nn.__name__")
