"""Holds the package's shape: imports go down, settings have readers, the command starts light.

Read from the source with `ast`, so nothing is imported and a local import counts like any other.
"""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mainrun"

# Lowest first; a module imports only what stands in a lower row. One name is a module or a package;
# names joined by "+" are one concept in several files, which see each other as a package's do.
LAYERS = [
    ["errors"],
    [
        "yaml12",
        "complaints",
        "promoted",
        "environment",
        "gpu",
        "locks",
        "stop",
        "huge_pages",
        "snapshot",
        "probe",
        "user",
    ],
    ["config"],
    [
        "host",
        "child",
        "tracking + wandb_run + record + console + result + summary + plots + chart + markdown"
        " + run_config + fingerprint",
    ],
    ["containers", "sweep_details"],
    ["request", "ending"],
    ["launch", "dispatch", "images + builder", "machine + machine_report + runners", "job_summary"],
    ["doctor", "artifact"],
    ["jobs"],
    # above this line JAX may be imported
    ["model", "data"],
    ["training"],
    ["parts", "folder", "origin"],
    ["trained", "memory"],
    ["compilation"],
    ["opening + live_run", "learning_rate"],
    ["run", "population"],
    ["sweep", "export"],
    ["analysis", "sota", "profile"],
    ["cli"],
    ["__main__"],
]
HOST_LAYERS = 9
LAYER = {
    name: (row, unit)
    for row, units in enumerate(LAYERS)
    for unit in units
    for name in unit.split(" + ")
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

JAX = {"jax", "jaxlib", "jaxtyping", "flax", "optax", "orbax"}
CLOCKS_AND_FILES = {"datetime", "io", "os", "pathlib", "shutil", "tempfile", "time"}


def place(path: Path) -> tuple[int, str]:
    """Row and unit of a module; above all rows when it has none, which a test of its own says."""
    return LAYER.get(path.relative_to(PACKAGE).with_suffix("").parts[0], (len(LAYERS), ""))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of all modules, and of what is taken from them: `from mainrun import config`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """The parts of this package among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("mainrun.")} & set(LAYER)


def foreign(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"mainrun"}


def test_every_module_has_a_place_in_the_layers():
    missing = [label(path) for path in SOURCES if not place(path)[1]]
    assert not missing, f"give each a row in LAYERS, and in the design: {missing}"


def test_imports_go_down_only():
    upward = [
        (label(path), name)
        for path in SOURCES
        for name in sorted(ours(imported(ast.walk(tree(path)))))
        if LAYER[name][0] >= place(path)[0] and LAYER[name][1] != place(path)[1]
    ]
    assert not upward, f"imports that are not below: {upward}"


@pytest.mark.parametrize("folder", ["mainrun", "benchmarks", "tools"])
def test_package_imports_no_tool_and_no_tool_a_test(folder: str):
    """`mainrun/` stands alone; what measures or draws stands on it, and tests on everything."""
    above = {"tests", "benchmarks", "tools"} if folder == "mainrun" else {"tests"}
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    for path in sources:
        assert not foreign(imported(ast.walk(tree(path)))) & above, label(path)


HOST_SOURCES = [path for path in SOURCES if place(path)[0] < HOST_LAYERS]


def test_host_side_never_imports_jax():
    modules = {label(path): foreign(imported(ast.walk(tree(path)))) & JAX for path in HOST_SOURCES}
    assert not any(modules.values()), {name: jax for name, jax in modules.items() if jax}


def test_host_side_starts_with_the_base_dependencies_alone():
    """W&B, say, is imported where it is used: what the extra `train` brings may not be there."""
    base = {"pydantic", "pydantic_core", "yaml", "rich", "structlog", "typing_extensions"}
    base |= {"docker", "requests", "pynvml", *sys.stdlib_module_names}
    modules = {
        label(path): foreign(imported(iter(tree(path).body))) - base for path in HOST_SOURCES
    }
    assert not any(modules.values()), {name: more for name, more in modules.items() if more}


PURE_SOURCES = [
    path
    for path in SOURCES
    if path.is_relative_to(PACKAGE / "model") or path == PACKAGE / "training" / "step.py"
]


def test_model_and_step_see_no_tracker_file_or_clock(subtests: pytest.Subtests):
    for path in PURE_SOURCES:
        with subtests.test(label(path)):
            parsed = tree(path)
            names = imported(ast.walk(parsed))
            assert not foreign(names) & CLOCKS_AND_FILES
            assert all(LAYER[name][1] != LAYER["tracking"][1] for name in ours(names))
            calls = {
                node.func.id
                for node in ast.walk(parsed)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not calls & {"open", "print", "input"}


def dataclasses() -> list[ast.ClassDef]:
    """Those of mainrun/config/ that are settings."""
    return [
        node
        for path in SOURCES
        if path.is_relative_to(PACKAGE / "config")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def fields_read(source: ast.AST) -> set[str]:
    """As `x.field`, or as `case Class(field=...)`."""
    read = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        elif isinstance(node, ast.MatchClass):
            read.update(node.kwd_attrs)
    return read


def test_every_setting_has_a_reader():
    """Outside mainrun/config/, or in a public method there: checking a value is not using it.

    A `kind` is read by the match on its class.
    """
    users: list[ast.AST] = [
        tree(path) for path in SOURCES if not path.is_relative_to(PACKAGE / "config")
    ]
    settings = []
    for owner in dataclasses():
        for part in owner.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                users.append(part)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                settings.append(f"{owner.name}.{part.target.id}")
    read = {"kind"}.union(*map(fields_read, users))
    assert len(settings) > 100
    assert [name for name in settings if name.split(".")[1] not in read] == []


def test_help_imports_nothing_heavy():
    program = """
import contextlib, io, sys
from mainrun.cli import main
sys.argv = ["mainrun", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main()
assert "train" in shown.getvalue(), shown.getvalue()
print(sorted(sys.modules.keys() & {"jax", "flax", "numpy", "wandb", "structlog", "tokenizers"}))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_version_stands_once():
    """`mainrun.__version__`, if written out, is the one of pyproject.toml."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    written = [
        node.value.value
        for node in tree(PACKAGE / "__init__.py").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]  # fmt: skip
    assert written in ([], [stated])
