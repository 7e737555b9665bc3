"""What holds for every route, read from the interface itself."""

import ast
import json
from pathlib import Path

import pytest

from api.routes.interface import Interface

ROOT = Path(__file__).parents[3]
PUBLIC = {"/health", "/healthz", "/readyz", "/metrics", "/problems/{code}"}
HANDLER_LINES = 12
DOCUMENT = Interface().openapi()
OPERATIONS = [
    (method, path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
every_operation = pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[f"{m} {p}" for m, p, _ in OPERATIONS]
)


def test_the_committed_document_is_the_interface():
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text())

    assert committed == DOCUMENT, "write it again: python -m api openapi > docs/openapi.json"


def test_operation_ids_are_words_and_unique():
    names = [operation["operationId"] for _, _, operation in OPERATIONS]

    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name.islower() for name in names)


@every_operation
def test_an_operation_names_its_scope_its_refusals_and_what_it_does(method, path, operation):
    if path in PUBLIC:
        assert "security" not in operation
    else:
        scopes = [each for given in operation["security"] for each in given["api_key"]]
        assert len(scopes) == 1
    assert operation["tags"]
    assert operation["description"].endswith(".")
    assert list(operation["responses"]["4XX"]["content"])


@every_operation
def test_no_answer_is_a_bare_object(method, path, operation):
    for status, response in operation["responses"].items():
        for media_type, content in response.get("content", {}).items():
            if "json" in media_type:
                assert content["schema"] != {}, (status, media_type)


def test_handlers_hold_no_logic():
    long = {}
    for module in (ROOT / "api" / "routes").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_handler = any("router." in ast.unparse(each) for each in node.decorator_list)
            lines = node.end_lineno - node.body[1 if is_handler else 0].lineno + 1
            if is_handler and lines > HANDLER_LINES:
                long[node.name] = lines

    assert long == {}
