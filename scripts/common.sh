# shellcheck shell=bash
# Sourced by the scripts behind the make targets: project root, sane surroundings, one-sentence errors, timed steps.
set -u
unset CDPATH PYTHONHOME PYTHONPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

die() {
    printf 'make: %s\n' "$*" >&2
    exit 1
}

# Caches of pip, Jupyter and the model live below the home folder; one that cannot be written is replaced.
home="${HOME:-}"
if ! { [ -d "$home" ] && mkdir -p "$home/.cache" && [ -w "$home" ] && [ -w "$home/.cache" ]; } 2>/dev/null; then
    export HOME="$PWD/.cache/home"
    mkdir -p "$HOME" || die "neither the home folder nor $PWD can be written: clone the project to a folder of yours."
    printf 'make: the home folder cannot be written, so caches go to %s.\n' "$HOME" >&2
fi

report=""
step() {
    # step NAME COMMAND...: run it under a heading and note its time; a failure has said its reason already.
    local name="$1" start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || exit 1
    report="$report$(printf '  %-12s %4d s' "$name" $((SECONDS - start)))"$'\n'
}
