#!/usr/bin/env bash
# The first command of the README: environment, model, chapters run live, site; with the time that each took.
. "$(dirname "$0")/common.sh"

fetch_model() {
    .venv/bin/python - <<'PYTHON'
import sys

from cats import CatsError, embedded, models

try:
    embedded.model_folder(models.DEFAULT)
except CatsError as error:
    sys.exit(f"make: {error}")
PYTHON
}

build_site() {
    # From the executed copies, into the usual place.
    .venv/bin/jupyter-book build -q -W --keep-going --path-output . _build/live/book && [ -f _build/html/index.html ] ||
        die "the site could not be built, for the reasons above: mend the page named, or run make clean and this again."
}

step environment bash scripts/environment.sh
step model fetch_model
step chapters .venv/bin/cats reproduce
step site build_site

printf '\n%sSite: %s\n' "$report" "$PWD/_build/html/index.html"
