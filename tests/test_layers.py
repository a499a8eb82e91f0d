"""Imports point down only, and heavy or distributed packages stay where they belong."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["models", "engine", "parallel", "launch"]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(layer):
    found = sorted((ROOT / layer).rglob("*.py"))
    assert found, f"no files in {layer}"
    return found


@pytest.mark.parametrize("layer", ORDER)
def test_imports_point_down_only(layer):
    above = set(ORDER[ORDER.index(layer) + 1 :]) | {"benchmarks", "tests"}
    for path in files(layer):
        for module in imported_modules(path):
            assert module.split(".")[0] not in above, f"{path} imports {module}"


@pytest.mark.parametrize("layer", ["models", "engine"])
def test_no_distributed_code_below_parallel(layer):
    for path in files(layer):
        for module in imported_modules(path):
            assert module.split(".")[0] != "ray", f"{path} imports {module}"
            assert not module.startswith("torch.distributed"), f"{path} imports {module}"


def test_the_schedule_is_plain_python():
    assert not any(module.startswith("torch") for module in imported_modules(ROOT / "engine" / "schedule.py"))
    assert not any(module.startswith("torch") for module in imported_modules(ROOT / "engine" / "kv" / "layout.py"))


def test_importing_the_engine_does_not_import_ray():
    code = "import sys, engine.engine, models.magi.pipeline; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


RUNS_WHAT_IT_READS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
OF_SOCKETS = {"Connection", "send_bytes", "recv_bytes", "deliver_challenge", "answer_challenge"}
"""All that is used of `multiprocessing`: blocks of bytes and the proof of a secret; its `send` and `recv` pickle."""


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("layer", ORDER)
def test_nothing_that_is_read_or_received_is_run(layer):
    """Neither files nor messages are unpickled, by whichever name; Ray's own calls are Ray's."""
    for path in files(layer):
        imported = set(imported_modules(path))
        if "pickle.UnpicklingError" in imported:  # what PyTorch raises where `weights_only` finds more than weights
            imported -= {"pickle", "pickle.UnpicklingError"}
        for module in imported:
            assert module.split(".")[0] not in RUNS_WHAT_IT_READS, f"{path} imports {module}"
            if module.split(".")[0] == "multiprocessing":
                assert path.name == "sockets.py", f"{path} imports {module}"
        for name, words in calls(path):
            last = name.rpartition(".")[2]
            assert name not in ("eval", "exec", "compile"), f"{path} calls {name}"
            assert "object" not in last or "dist." not in name, f"{path} calls {name}, which pickles"
            assert words.get("allow_pickle", "False") == "False", f"{path} lets {name} unpickle"
            assert name != "torch.load" or words.get("weights_only") == "True", f"{path} lets {name} unpickle"


def test_of_multiprocessing_only_bytes_and_proofs_are_used():
    tree = ast.parse((ROOT / "parallel" / "comm" / "sockets.py").read_text())
    of_blocks = {"mp", "blocks"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in of_blocks
    }
    assert used == OF_SOCKETS


# ---- what says what a method does


def methods(node):
    return {one.name: ast.get_docstring(one) for one in node.body if isinstance(one, ast.FunctionDef)}


def linked(node):
    """The classes that a class is based on, and those that its docstring says it is one of."""
    yield from (ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases)
    yield from re.findall(r"`(?:[\w.]+\.)?(\w+)`", ast.get_docstring(node) or "")


def test_each_public_method_says_what_it_does_or_its_class_names_where_that_is_said():
    """A method that does what a protocol or a base says it does needs no docstring of its own."""
    every = defaultdict(list)
    for layer in (*ORDER, "benchmarks"):
        for path in files(layer):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    every[node.name].append((path, node))

    def said(node, name, seen):
        others = [(place, one) for link in linked(node) if link not in seen for place, one in every[link]]
        return any(methods(one).get(name) or said(one, name, {*seen, one.name}) for _, one in others if one is not node)

    missing = [
        f"{path}: {node.name}.{name}"
        for entries in list(every.values())
        for path, node in entries
        for name, doc in methods(node).items()
        if not node.name.startswith("_") and not name.startswith("_") and not doc and not said(node, name, set())
    ]
    assert not missing
