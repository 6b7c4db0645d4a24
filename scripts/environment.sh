#!/usr/bin/env bash
# Make .venv and install the lock and this project into it; does nothing when it is already as the lock says.
. "$(dirname "$0")/common.sh"
minimum_mb=3000 # a CPU build of PyTorch needs 2.4 GB, a CUDA build about 8 GB
versions="Python 3.11, 3.12, 3.13 or 3.14"

is_suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local candidate found="" without_venv=""
    local candidates=(python3 python3.12 python3.13 python3.11 python3.14)
    [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        found="${found:-$("$candidate" --version 2>&1 | tail -n 1)}"
        is_suitable "$candidate" || continue
        if has_venv "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
        without_venv="${without_venv:-$candidate}"
    done
    [ -n "$without_venv" ] && die "$without_venv has no venv module: install it (Debian and Ubuntu: apt install python3-venv) and run this again."
    [ -n "$found" ] && die "$versions is needed, found only $found: install one or name it with PYTHON=/path/to/python3.12."
    die "$versions is needed and ${PYTHON:-python3} was not found: install one or name it with PYTHON=/path/to/python3.12."
}

explain_failure() {
    # The log holds pip's own words; here the usual causes, each as one sentence.
    local end
    end="$(tail -n 60 "$log")"
    if grep -qiE 'no space left|errno 28|disk quota' <<<"$end"; then
        die "the disk is full: free $((minimum_mb / 1000)) GB (10 GB for a CUDA build) and run this again, it goes on from here."
    elif grep -qiE 'connection broken|connection(pool|error)|max retries|name resolution|timed out|unreachable|proxyerror|sslerror' <<<"$end"; then
        die "pip cannot reach the package index: check the network or the proxy and run this again (details: $log)."
    fi
    if grep -qi 'do not match the hashes' <<<"$end"; then
        die "a package is not the file that requirements.lock names: do not use it, and report it (details: $log)."
    fi
    die "pip could not install requirements.lock: $(grep -iE '^error' <<<"$end" | tail -n 1) (details: $log)."
}

install() {
    # Quiet but alive: pip's lines go to the log, one dot on the terminal for each 10 packages.
    # --no-compile halves the time: of 2.4 GB only what is imported is compiled, when it is imported.
    .venv/bin/python -m pip install --no-compile --progress-bar off --no-input --disable-pip-version-check --retries 3 "$@" 2>&1 |
        tee -a "$log" | awk '/^ *Collecting /{ if (++n % 10 == 0) { printf "."; fflush() } }'
    [ "${PIPESTATUS[0]}" -eq 0 ] || { echo; explain_failure; }
}

needs_cuda() {
    # The CUDA build of PyTorch names the packages that it needs besides.
    .venv/bin/python - <<'PYTHON'
import sys
from importlib import metadata

sys.exit(not any(name.startswith(("nvidia-", "cuda-")) for name in metadata.requires("torch") or []))
PYTHON
}

identity() {
    printf '%s %s %s\n' "$PWD" "$(cat requirements.lock requirements-cuda.lock pyproject.toml | sha256sum | cut -d' ' -f1)" "$(.venv/bin/python --version 2>&1)"
}

stamp=.venv/installed.txt
log=.venv/install.log
is_current() { [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(identity)" ]; }
is_current && exit 0

# Two commands at once must not fill one folder: the second waits on this file, opened only to be locked.
exec 9<requirements.lock
if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    echo "Waiting for another make that is installing here."
    flock 9
    is_current && exit 0
fi

python="$(find_python)" || exit 1
free_mb="$(df -Pm . | awk 'NR == 2 { print $4 }')"
[ "${free_mb:-$minimum_mb}" -ge "$minimum_mb" ] ||
    die "only $free_mb MB of disk are free here: the environment needs $minimum_mb MB, 10 GB for a CUDA build."

# Making it anew through a link would empty the folder of another clone.
[ -L .venv ] && die ".venv is a link to $(readlink .venv): remove the link and run this again."
# An environment that was moved or whose Python is gone is made anew; one that is only out of date is brought up to date.
clear=""
case "$(cat "$stamp" 2>/dev/null)" in "" | "$PWD "*) ;; *) clear=--clear ;; esac
.venv/bin/python -m pip --version >/dev/null 2>&1 || clear=--clear
message="$("$python" -m venv $clear .venv 2>&1)" ||
    die "$python could not make .venv here: $(grep -v '^ *$' <<<"$message" | tail -n 1)"
rm -f "$stamp"
mkdir -p .venv/tmp && : >"$log" || die ".venv cannot be written: check the rights and the space of $PWD."
# pip unpacks gigabytes on the way: beside .venv, whose disk was looked at, not in a small /tmp.
export TMPDIR="$PWD/.venv/tmp" PIP_USER=0
printf 'Installing %s packages into .venv (log: %s) ' "$(grep -c '==' requirements.lock)" "$log"
install --require-hashes --no-deps -r requirements.lock
! needs_cuda || install --require-hashes --no-deps -r requirements-cuda.lock
install --no-deps --no-build-isolation -e .
rm -rf .venv/tmp
echo " done"
identity >"$stamp" || die "the disk is full: free some space and run this again, it goes on from here."
