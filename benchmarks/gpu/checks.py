"""Is it right on this device: all golden files, and the tests that need a GPU."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common import ROOT, Row
from benchmarks.gpu.bench import TINY, Bench, problem
from launch.conformance.command import check_file
from models.errors import InputError

_GOLDENS, _TESTS = ROOT / "tests" / "data" / "goldens", ROOT / "tests"
_SMALL = 130_000  # bytes of a golden file that is quick on a CPU


def conformance(bench: Bench) -> Iterator[Row]:
    """Figures of every golden file, made again on the device."""
    found = sorted(_GOLDENS.glob("*.safetensors") if bench.preset == TINY else _GOLDENS.rglob("*.safetensors"))
    for path in found:
        if path.name.startswith("weights") or (bench.preset == TINY and path.stat().st_size > _SMALL):
            continue
        row: Row = {"file": str(path.relative_to(_GOLDENS).with_suffix(""))}
        began = time.monotonic()
        try:
            verdict = check_file(path, device=bench.device.type)
            row |= {"passed": verdict.passed, "error": verdict.error, "allowed": verdict.tolerance}
            row["said"] = verdict.detail
        except InputError as error:  # of a kind that is not known
            row |= {"passed": None, "said": problem(InputError(str(error).removeprefix(f"{path} ")))}
        except RuntimeError as error:
            row |= {"passed": False, "said": problem(error)}
        yield row | {"seconds": time.monotonic() - began}


def gpu_tests(bench: Bench) -> Iterator[Row]:
    """The tests that are marked `gpu`, in a process of their own."""
    if not bench.cuda:
        yield {"tests": "left out", "problem": "they need a GPU"}
        return
    if importlib.util.find_spec("pytest") is None:
        yield {"tests": "left out", "problem": "pytest is not installed"}
        return
    files = [str(path) for path in sorted(_TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        options = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--junitxml", report.name]
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=max(30.0, bench.left), check=False)
        except subprocess.TimeoutExpired:
            yield {"tests": "stopped", "passed": False, "problem": "no time left"}
            return
        text = Path(report.name).read_text()
    if not text:
        yield {"tests": "none", "passed": False, "problem": f"pytest ended with status {done.returncode}"}
        return
    yield from _counts(ElementTree.fromstring(text))


def _counts(report: ElementTree.Element) -> Iterator[Row]:
    """A line of counts from pytest's own report, then one for each test that did not pass."""
    suite = next(report.iter("testsuite"))
    failed, errors, skipped = (int(suite.get(name, 0)) for name in ("failures", "errors", "skipped"))
    passed = int(suite.get("tests", 0)) - failed - errors - skipped
    said = f"{passed} passed, {failed} failed, {errors} errors, {skipped} skipped"
    yield {"tests": said, "passed": not failed + errors, "problem": "", "seconds": float(suite.get("time", 0))}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error", "skipped"):
            for found in case.iter(kind):
                why = (found.get("message") or "").strip() or kind
                name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
                yield {"tests": name, "passed": None if kind == "skipped" else False, "problem": why.splitlines()[0]}
