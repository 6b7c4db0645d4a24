#!/usr/bin/env bash
# The first command of the README: environment, model, chapters run live, site; with the time that each took.
set -u
cd "$(dirname "$0")/.."
report=""

step() {
    local name="$1" start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || { printf 'make: the step "%s" failed.\n' "$name" >&2; exit 1; }
    report="$report$(printf '  %-12s %4d s' "$name" $((SECONDS - start)))"$'\n'
}

build_site() {
    # Built beside the committed chapters' site settings, from the executed copies, into the usual place.
    .venv/bin/jupyter-book build -q -W --keep-going --path-output . _build/live/book && [ -f _build/html/index.html ]
}

step environment bash scripts/environment.sh
step model .venv/bin/python -c 'from cats import embedded, models; embedded.model_folder(models.DEFAULT)'
step chapters .venv/bin/cats reproduce
step site build_site

printf '\n%sSite: %s\n' "$report" "$PWD/_build/html/index.html"
