#!/usr/bin/env bash
# The second command of the README: lint, then pytest, whose summary comes last and whose exit status is this one's.
. "$(dirname "$0")/common.sh"

bash scripts/environment.sh || exit 1
.venv/bin/ruff check . || die "ruff found the faults above: mend them first."
.venv/bin/python -m pytest "$@"
