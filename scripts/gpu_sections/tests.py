"""Section 3: the tests marked gpu, and the figures that they record."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from gpu_sections.frame import Bench, Case, Cases, Figures, Skipped

ROOT = Path(__file__).resolve().parent.parent.parent


def cases(bench: Bench) -> Cases:
    """A run of pytest for each file, then each of its tests that recorded something, or why it failed."""
    # Files whose tests are all marked so; to import the others would need all that they need.
    marked = re.compile(r"^pytestmark = .*(mark\.gpu|MARKS)", re.MULTILINE)
    for file in (path for path in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(path.read_text(encoding="utf-8"))):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            yield Case(f"tests of {file.name}", functools.partial(_run, bench, file, report))
            if not report.exists():
                continue
            for test in ElementTree.parse(report).getroot().iter("testcase"):
                if len(test):  # else it passed, and recorded nothing
                    yield Case(str(test.get("name")), functools.partial(_figures_of, test))


def _run(bench: Bench, file: Path, report: Path) -> Figures:
    """How many passed, failed and were skipped."""
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    environment = os.environ | ({"DISTILL_REHEARSE": "1"} if bench.rehearse else {})
    # Its own process: a kernel that fails leaves the device of this one as it is.
    command, seconds = [sys.executable, "-m", "pytest", *options, str(file)], max(bench.allowance.left_s, 30)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    if not report.exists():
        raise RuntimeError((done.stdout + done.stderr)[-400:])
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: float(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"], **counts}


def _figures_of(test: ElementTree.Element) -> Figures:
    """What a test recorded, in its own words; failures and skips are told as what they are."""
    found = {str(each.get("name")): float(str(each.get("value"))) for each in test.iter("property")}
    for outcome in ("failure", "error", "skipped"):
        problem = test.find(outcome)
        if problem is not None:
            recorded = ", ".join(f"{name} {value:g}" for name, value in found.items())
            if outcome == "skipped":
                raise Skipped(problem.get("message"))
            raise AssertionError(f"{outcome}: {problem.get('message')}" + (f" ({recorded})" if recorded else ""))
    return found
