"""Who may import whom, as DESIGN says: a plugin sees the public names and the core, an edge never the kernel."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUNDATION = {"gateway.types", "gateway.errors", "gateway.clock"}
PURE = FOUNDATION | {"gateway.policy", "gateway.run_types", "gateway.program.model"}
OURS = {"gateway", "plugins", "workers", "nearloop"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` as a.b where that is a module of ours; those for type checking alone left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                as_path = ROOT / name.replace(".", "/")
                found.add(name if as_path.with_suffix(".py").exists() or as_path.is_dir() else node.module)
    return found


def files(pattern: str) -> list[Path]:
    return sorted(path for path in ROOT.glob(pattern) if "models" not in path.parts)


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.split(".")[0] in OURS}


@pytest.mark.parametrize("name", ["types", "errors", "clock", "subjects"])
def test_the_foundation_imports_the_standard_library_only(name: str) -> None:
    modules = imports(ROOT / f"gateway/{name}.py")
    assert {module.split(".")[0] for module in modules - FOUNDATION} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", files("gateway/core/*.py"), ids=lambda path: path.stem)
def test_core_imports_types_and_policy_only(path: Path) -> None:
    modules = imports(path)
    assert {m for m in ours(modules) if not m.startswith("gateway.core")} <= PURE
    others = {module.split(".")[0] for module in modules - ours(modules)}
    assert others <= set(sys.stdlib_module_names) - {"asyncio", "time", "random", "logging", "socket", "threading"}


@pytest.mark.parametrize("path", files("gateway/program/*.py"), ids=lambda path: path.stem)
def test_programs_import_types_and_errors_only(path: Path) -> None:
    """The language stands on the libraries for CEL and YAML; cel_evaluator silences the log of the one, which quotes values."""
    modules = imports(path)
    assert {m for m in ours(modules) if not m.startswith("gateway.program")} <= {"gateway.types", "gateway.errors", "gateway.subjects"}
    others = {module.split(".")[0] for module in modules - ours(modules)}
    allowed = {"celpy", "lark", "re2", "yaml"} | ({"logging", "threading"} if path.stem == "cel_evaluator" else set())
    assert others - allowed <= set(sys.stdlib_module_names) - {"asyncio", "time", "random", "logging", "socket", "threading"}


@pytest.mark.parametrize("path", files("plugins/*.py"), ids=lambda path: path.stem)
def test_a_plugin_imports_public_names_and_core_only(path: Path) -> None:
    assert {m for m in ours(imports(path)) if not m.startswith("gateway.core")} <= {"gateway"}


@pytest.mark.parametrize("path", files("gateway/scaffold/*.py.txt"), ids=lambda path: path.name)
def test_what_a_new_plugin_starts_from_imports_public_names_only(path: Path) -> None:
    is_test = path.name.removesuffix(".py.txt").endswith("test")
    assert ours(imports(path)) <= ({"gateway", "gateway.conformance"} if is_test else {"gateway"})


@pytest.mark.parametrize("path", files("gateway/edge/*.py"), ids=lambda path: path.stem)
def test_an_edge_never_imports_the_kernel(path: Path) -> None:
    forbidden = {"gateway.kernel", "gateway.permits", "gateway.jobs", "gateway.feed", "gateway.serve", "gateway.cli", "gateway.up"}
    assert not imports(path) & forbidden
    assert not {module for module in imports(path) if module.startswith("plugins")}


def test_only_edges_and_composition_roots_import_the_transport_libraries() -> None:
    allowed = {"gateway/client.py", "gateway/doctor.py", "gateway/tensors.py"}
    for path in files("gateway/*.py") + files("gateway/core/*.py") + files("plugins/*.py"):
        used = {module.split(".")[0] for module in imports(path)} & {"grpc", "nats", "tritonclient", "opentelemetry"}
        assert not used or str(path.relative_to(ROOT)) in allowed, f"{path.name} imports {used}"


def test_only_the_clock_imports_time() -> None:
    data_path = [ROOT / f"gateway/{name}.py" for name in ("kernel", "permits", "jobs", "feed", "loader", "policy", "types", "subjects")]
    for path in [*data_path, *files("gateway/core/*.py"), *files("plugins/*.py")]:
        assert "time" not in imports(path), f"{path.name} reads time by itself"
