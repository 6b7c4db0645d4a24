#!/usr/bin/env bash
# The second command of the README: lint, then pytest, whose summary comes last and whose exit status is this one's.
. "$(dirname "$0")/common.sh"

bash scripts/environment.sh || exit 1
.venv/bin/ruff check . || die "ruff found the faults above: mend them first."
# Two at once: the interpreter's checks of the kernels, on one core, take as long as all other files together.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
