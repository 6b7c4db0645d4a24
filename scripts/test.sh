#!/usr/bin/env bash
# The second command of the README: lint, then the tests in two calls of pytest, whose closing lines come last.
# The exit status is that of the first call that failed.
. "$(dirname "$0")/common.sh"

bash scripts/environment.sh || exit 1
.venv/bin/ruff check . || die "ruff found the faults above: mend them first."

log="$(mktemp)" || die "no temporary file can be made: free some space and run this again."
trap 'rm -f "$log"' EXIT
closing="" failed=0
call() {
    # call ARGUMENT...: pytest on both cores; its closing line is kept, and its exit status where none failed before.
    .venv/bin/python -m pytest -n 2 "$@" 2>&1 | tee "$log"
    local status=${PIPESTATUS[0]}
    [ "$failed" -ne 0 ] || failed=$status
    closing="$closing$(tail -n 1 "$log")"$'\n'
}

# The kernels run on the GPU where there is one, in Triton's interpreter everywhere else.
interpret="$(.venv/bin/python -c 'import torch; print(int(not torch.cuda.is_available()))')" || exit 1
TRITON_INTERPRET="$interpret" call --dist worksteal -W ignore::RuntimeWarning tests/interpreted tests/slow/test_kernel_cases.py
call --dist loadfile --ignore=tests/interpreted
printf '\n%s' "$closing"
exit "$failed"
