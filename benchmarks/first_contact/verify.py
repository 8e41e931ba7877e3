"""Runs the tests of an op on this card.

    python -m benchmarks.first_contact.verify OP [--device cuda]

Fails if no test ran, so that what skips tests cannot pass for success.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from benchmarks.first_contact import options as common

FILES = {
    "window_attention": [
        "test_window_attention.py", "test_window_attention_values.py",
        "test_window_attention_api.py",
    ],
    "moe_route": ["test_moe_route.py"],
    "moe_dispatch": ["test_moe_dispatch.py"],  # and moe_combine
    "moe_experts": ["test_moe_experts.py"],
    "adamw_": ["test_adamw.py"],
}  # fmt: skip
# A handful that takes a second, for a rehearsal.
TOY = {
    "window_attention": "cpu and (clamp or 2x6x5)",
    "moe_route": "cpu and (equal_scores or row_maps or finite)",
    "moe_dispatch": "cpu",
    "moe_experts": "cpu and (expanded or dropout_drops)",
    "adamw_": "cpu and (strided or none_do)",
}
NO_GPU = "no GPU"  # how the reason begins for which the CUDA tests are skipped


class Count(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skipped_for_no_gpu: int = 0

    @property
    def problem(self) -> str:
        """Return why these tests do not verify an op, or nothing."""
        if self.failed:
            return f"{self.failed} tests failed"
        if self.skipped_for_no_gpu:
            return f"{self.skipped_for_no_gpu} CUDA tests were skipped: no GPU, or no CUDA kernels"
        return "" if self.passed else "no test ran"


def count(report: str, device: str) -> Count:
    """Return the tests in a JUnit report whose parameters name a device."""
    passed = failed = skipped = no_gpu = 0
    for case in ET.fromstring(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1  # under any name: a file that does not import has no parameters
        elif not re.search(rf"\b{device}\b", case.get("name", "")):
            continue
        elif (skip := case.find("skipped")) is not None:
            skipped += 1
            no_gpu += skip.get("message", "").startswith(NO_GPU)
        else:
            passed += 1
    return Count(passed, failed, skipped, no_gpu)


def run_tests(op: str, device: str, toy: bool) -> Count:
    """Run the tests of an op on a device, in other processes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail=30"]
        command += ["--confcutdir=tests/ops"]  # what other tests set up may need packages
        command += [f"tests/ops/{name}" for name in FILES[op]]
        command += ["-k", TOY[op] if toy else device, f"--junitxml={report}", "--tb=short"]
        code = subprocess.run(command, env=common.environment(), check=False).returncode
        if not report.exists():
            raise SystemExit(f"pytest ended with {code} and no report")
        found = count(report.read_text(), device)
    if code and not found.failed:
        return found._replace(failed=1)  # it ended before all tests had run
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("op", choices=list(FILES))
    options = parser.parse_args()
    tests = run_tests(options.op, options.device, options.quick)
    common.write(options, tests=tests._asdict())
    print(f"{tests.passed} tests passed, {tests.skipped} were skipped", flush=True)
    if tests.problem:
        raise SystemExit(tests.problem)


if __name__ == "__main__":
    main()
