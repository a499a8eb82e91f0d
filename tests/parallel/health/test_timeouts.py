"""All waits of the ranks stand in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "parallel").rglob("*.py") if path.name != "timeouts.py")
WAITS = {"sleep", "wait", "join", "close", "wait_for"}
LIMITS = {"timeout", "grace", "patience", "seconds", "flush"}
SHARES = {"_AT_ONCE"}  # constants that are no times


def number(node):
    values = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(isinstance(one, ast.Constant) and type(one.value) in (int, float) and one.value for one in values)


def waits(tree):
    """Line and reason of every literal that is waited for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = [one.value for one in node.keywords if one.arg in LIMITS]
            if getattr(node.func, "attr", getattr(node.func, "id", "")) in WAITS:
                named += node.args
            yield from ((node.lineno, "a call") for one in named if number(one))
        elif isinstance(node, ast.arguments):
            places = [*zip(reversed(node.args), reversed(node.defaults)), *zip(node.kwonlyargs, node.kw_defaults)]
            yield from ((one.lineno, "a default") for one, value in places if one.arg in LIMITS and number(value))
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = {getattr(one, "id", "") for one in node.targets}
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            times = any(isinstance(one, ast.Constant) and isinstance(one.value, float) for one in values)
            if times and not names & SHARES:
                yield node.lineno, "a constant"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_wait_is_a_literal_elsewhere(path):
    assert list(waits(ast.parse(path.read_text()))) == []
