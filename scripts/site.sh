#!/usr/bin/env bash
# scripts/site.sh [BOOK]: build the site into a fresh folder, check it, and only then put it in place of the old one,
# so that an interrupted build leaves the old site whole and the next build begins anew.
. "$(dirname "$0")/common.sh"

book="${1:-book}"
mkdir -p _build || die "the folder _build cannot be made: check the rights and the space of $PWD."
# Two builds at once would put each other's site in place: the second waits.
exec 9<requirements.lock
command -v flock >/dev/null 2>&1 && flock 9
rm -rf _build/site.* # what a killed build left
fresh="$(mktemp -d _build/site.XXXXXX)" || die "the folder _build cannot be written: check the rights and the space of $PWD."
trap 'rm -rf "$fresh"' EXIT
trap 'exit 130' INT TERM

.venv/bin/jupyter-book build -q -W --keep-going --path-output "$fresh" "$book" >/dev/null ||
    die "the site could not be built, for the reasons above: mend the page named and run this again."
.venv/bin/python scripts/check_site.py "$fresh/_build/html" || exit 1
rm -rf _build/html
mv "$fresh/_build/html" _build/html || die "the site could not be put into _build: check the rights and the space of $PWD."
