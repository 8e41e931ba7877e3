"""Holds the design by the syntax tree: the order of imports, and concerns of single files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "swin_moe"
# A folder or file imports only from lines above its own, and from itself.
FLOORS = [
    {"common"},
    {"config", "ops"},
    {"distributed"},
    {"checkpoint", "data", "moe"},
    {"launch", "models"},
    {"weights"},
    {"factory"},
    {"tasks"},
    {"reporting"},
    {"training"},
    {"planner", "preflight"},
    {"train", "evaluate"},
    {"inspection"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# What only certain files may name.
ONLY_IN = {
    "deepspeed": {"training/engine.py"},
    "tutel": {"moe/tutel.py"},
    "RecordWriter": {"reporting/metric_log.py"},
    "environ": {
        "common/cache_folder.py",
        "common/fork_server.py",
        "common/host.py",
        "common/ranks.py",
        "distributed/stores.py",
        "distributed/world.py",
        "launch/elastic.py",
        "launch/rendezvous.py",
        "launch/torchrun.py",
    },
    "getenv": set(),
    "argparse": {f"cli/{path.name}" for path in (PACKAGE / "cli").glob("*.py")},
    "yaml": {"config/yaml_core.py"},
    "pickle": {"weights/safe_pickle.py", "launch/rendezvous.py"},
    "torch.load": {"weights/safe_pickle.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative_imports(path: Path):
    """Top-level modules of swin_moe that a file imports."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            climbed = node.level - 1
            if climbed < depth:
                continue  # within its own package
            if node.module:
                yield node.module.split(".")[0]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swin_moe."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("swin_moe.")]
            yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    mine = top(path)
    for other in relative_imports(path):
        if other == mine or other == "__version__":
            continue
        assert other in LEVEL, f"{path.name}: {other} has no place in the order"
        assert LEVEL[other] < LEVEL[mine], f"{path.name} ({mine}) must not import {other}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def imported_files(path: Path, modules: set[str]):
    """Modules that a file imports when it runs, those inside functions included."""
    own = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = ".".join((*own[: len(own) - node.level], *filter(None, [node.module])))
            for alias in node.names:
                name = f"{package}.{alias.name}"
                yield name if name in modules else package


def test_no_file_imports_itself_through_others():
    names = {module_name(path): path for path in FILES}
    graph = {
        name: set(imported_files(path, set(names))) & set(names) for name, path in names.items()
    }
    for name, found in graph.items():
        found.discard(name)
    while leaves := [name for name, found in graph.items() if not found]:
        for leaf in leaves:
            del graph[leaf]
        for found in graph.values():
            found.difference_update(leaves)
    assert not graph, f"a circle among {sorted(graph)}"


def names_used(path: Path) -> set[str]:
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
            if not node.level and node.module:
                used.add(node.module.split(".")[0])
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.value, ast.Name):
                used.add(f"{node.value.id}.{node.attr}")
    return used


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_concerns_live_in_one_place(path):
    name = str(path.relative_to(PACKAGE))
    used = names_used(path)
    for word, homes in ONLY_IN.items():
        assert word not in used or name in homes, f"{name} uses {word}; it belongs in {homes}"


def test_compiled_ops_are_called_in_ops_only():
    for path in FILES:
        if top(path) != "ops":
            assert "ops.swin_moe" not in path.read_text(), path.name


def test_torch_headers_stay_in_the_bindings():
    for path in (PACKAGE / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and "bind" not in path.name:
            assert "torch/" not in path.read_text(), path.name
