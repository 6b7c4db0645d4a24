#!/usr/bin/env bash
# scripts/measure.sh PARAMS [CHAPTER...]: run chapters through papermill under a params file and gather anew in
# _build/measured the executed notebooks and the records and thresholds that they wrote: what the GPU workflow keeps.
. "$(dirname "$0")/common.sh"

params="${1:-}"
[ -n "$params" ] || die "name a params file first: scripts/measure.sh gpu 02_calibration"
shift
chapters=()
for chapter in "$@"; do
    [ -n "$chapter" ] && chapters+=("$chapter")
done

bash scripts/environment.sh || exit 1
new_files() { git ls-files --others --exclude-standard -- data/records data/thresholds; }
before="$(new_files)"
measured=_build/measured
rm -rf "$measured" && mkdir -p "$measured/records" || die "the folder $measured cannot be made: check the rights and the space of $PWD."
.venv/bin/cats reproduce "${chapters[@]}" --profile "$params" --output "$measured" --force
status=$?

new_files | while IFS= read -r file; do
    grep -qxF -- "$file" <<<"$before" || cp -- "$file" "$measured/records/"
done
find "$measured" -type f | sort
exit "$status"
