#!/usr/bin/env bash
# All cases of tests/slow, of which the test command keeps a tenth; how they came out is counted at the end.
# CATS_HARDEN=0.1 takes a tenth of the cases, CATS_HARDEN=10 ten times as many.
. "$(dirname "$0")/common.sh"

bash scripts/environment.sh || exit 1
failed=0
.venv/bin/python -m pytest -n 2 --dist worksteal -m "" -v tests/slow || failed=$?
# Triton's interpreter is chosen before Triton is imported, so its cases are a call of their own.
TRITON_INTERPRET=1 .venv/bin/python -m pytest -n 2 --dist worksteal -m "" -v tests/slow/test_kernel_cases.py || failed=$?
exit "$failed"
