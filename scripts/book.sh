#!/usr/bin/env bash
# The first command of the README: environment, model, chapters run live, site; with the time that each took.
. "$(dirname "$0")/common.sh"

fetch_model() {
    .venv/bin/python - <<'PYTHON'
import sys

from cats import CatsError
from cats.models import embedded, load

try:
    embedded.model_folder(load.DEFAULT)
except CatsError as error:
    sys.exit(f"make: {error}")
PYTHON
}

step environment bash scripts/environment.sh
step model fetch_model
step chapters .venv/bin/cats reproduce
step site bash scripts/site.sh _build/live/book # from the executed copies

printf '\n%sSite: %s\n' "$report" "$PWD/_build/html/index.html"
