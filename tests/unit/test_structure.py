"""What import-linter and ruff cannot say about the tree."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("api", "worker", "engine", "kernels")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TOP_LEVEL = {
    "api", "worker", "engine", "kernels", "docker", "migrations", "tests", "benchmarks", "docs",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_stays_within_its_budget(path):
    budget = 400 if path.is_relative_to(ROOT / "kernels") else 250

    assert len(path.read_text().splitlines()) <= budget


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_stays_within_its_budget(path):
    budget = 120 if path.is_relative_to(ROOT / "kernels") else 40
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]

    too_long = [f.name for f in functions if f.end_lineno - f.body[0].lineno + 1 > budget]
    assert too_long == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_log_lines_are_event_names_and_never_f_strings(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    logged = [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in {"log", "logger"}
    ]

    assert [c.lineno for c in logged if c.args and isinstance(c.args[0], ast.JoinedStr)] == []


def test_the_tree_has_no_other_top_level_folder():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    folders = {line.split("/")[0] for line in listed if "/" in line}

    assert {name for name in folders if not name.startswith(".")} <= TOP_LEVEL


def test_the_kernels_package_imports_nothing_and_has_no_version():
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())

    assert all(isinstance(node, ast.Expr) for node in tree.body)


def test_the_distribution_named_kernels_is_not_installed():
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("kernels")


@pytest.mark.parametrize("module", ["api.app", "api.cli.main", "worker.tasks", "worker.supervise"])
def test_api_command_line_and_celery_side_never_load_torch(module):
    program = (
        f"import sys, {module}; print({{'torch', 'transformers', 'triton'}} & {{*sys.modules}})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert loaded.stdout.strip() == "set()"
