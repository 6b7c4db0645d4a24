"""The tests of the kernels on a GPU, also under compute-sanitizer: `cats measure checks`.

Memcheck and racecheck run the odd shapes, the given masks and the attention: they slow a kernel down a lot.
Without a GPU (--quick) the tests run in Triton's interpreter. Writes a record checks, a row for each test.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from argparse import Namespace
from pathlib import Path

import torch

from cats import paths
from cats.benchmarking import workload
from cats.errors import CatsError

FILES = ["tests/interpreted", "tests/kernels/test_gpu.py"]
OPS = ("one_row", "few_rows", "batch", "decoding")  # that they test
TOOLS = ("plain", "memcheck", "racecheck")
UNDER_SANITIZER = "odd_and_even or given_masks or attention_equals"


def measure(options: Namespace) -> None:
    """Run the tests under every tool and print what failed; write one record."""
    options.tools = workload.chosen("tool", options.tools, TOOLS)
    workload.device_or_quick(options.quick)
    started = time.time()
    rows = [test for tool in options.tools for test in checked(tool, options)]
    for tool in options.tools:
        here = [test for test in rows if test["tool"] == tool]
        passed = sum(test["outcome"] == "passed" for test in here)
        print(f"{tool:<10} {passed} of {len(here)} passed; findings of the tool: {here[0]['findings']}")
        for test in here:
            if test["outcome"] == "failed":
                print(f"  {test['test']}: {test['message']}")
    workload.record("checks", options, rows, {"id": "the tests of the kernels"}, {}, started, ops=OPS)


def checked(tool: str, options: Namespace) -> list[dict]:
    """A row for each test under one tool; `findings` is what the tool itself counted, over all tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *FILES]
        select = options.select
        if tool != "plain":
            command = [sanitizer(), "--tool", tool, *command]
            select = select or UNDER_SANITIZER
        elif options.jobs > 1:
            command += ["-n", str(options.jobs)]
        environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
        done = subprocess.run(
            [*command, *(["-k", select] if select else [])],
            cwd=paths.ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if not report.exists():
            raise CatsError(
                f"{tool}: the tests did not run to their end:\n{done.stdout[-800:]}{done.stderr[-800:]}"
            )
        cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - of our own pytest
    labels = {"tool": tool, "findings": findings(done.stdout + done.stderr) if tool != "plain" else None}
    return [{**labels, **row(case)} for case in cases]


def row(case: ET.Element) -> dict:
    """The columns of one test in pytest's report; `outcome` is pytest's word: passed, failed or skipped."""
    state, message = "passed", None
    for name, tag in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            state, message = name, found.get("message", "").split("\n")[0][:200]
    file = case.get("classname", "").rsplit(".", 1)[-1]
    seconds = round(float(case.get("time", 0)), 2)
    return {"file": file, "test": case.get("name"), "outcome": state, "seconds": seconds, "message": message}


def findings(output: str) -> int:
    """What compute-sanitizer counted: errors, or hazards. CatsError where it did not say."""
    counts = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) ", output)
    if not counts:
        raise CatsError(f"compute-sanitizer printed no summary: {output[-400:]}")
    return sum(map(int, counts))


def sanitizer() -> str:
    """The path of compute-sanitizer; CatsError where the CUDA toolkit is not installed."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        raise CatsError(
            "compute-sanitizer is not on the PATH: install the CUDA toolkit, or choose --tools plain."
        )
    return found
