"""The workflows: no fault that zizmor finds, and what only this project can know of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cats import paths

FILES = sorted((paths.ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES}
JOBS = [(f"{name}:{job}", flow["jobs"][job]) for name, flow in WORKFLOWS.items() for job in flow["jobs"]]
STEPS = [
    (f"{where}:{number}", step) for where, job in JOBS for number, step in enumerate(job["steps"], start=1)
]
named = {"ids": lambda value: value if isinstance(value, str) else ""}


def test_the_four_workflows_are_there():
    assert set(WORKFLOWS) == {"test.yml", "site.yml", "gpu.yml", "harden.yml"}


def zizmor(folder: Path) -> subprocess.CompletedProcess:
    """Pins, rights, credentials, what of a user's reaches a shell: all that zizmor looks for offline."""
    program = Path(sys.executable).with_name("zizmor")
    return subprocess.run([program, "--offline", "--no-progress", folder], capture_output=True, text=True)


def test_zizmor_finds_no_fault():
    found = zizmor(paths.ROOT / ".github")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ('"$PARAMS" "$CHAPTER"', '"$PARAMS" ${{ inputs.chapter }}', "template-injection"),
        ("persist-credentials: false", "fetch-depth: 1", "artipacked"),
        ("@de0fac2e4500dabe0009e67214ff5f5447ce83dd", "@v6", "unpinned-uses"),
    ],
)
def test_zizmor_finds_what_is_wrong(tmp_path, right, wrong, fault):
    workflow = tmp_path / ".github" / "workflows" / "gpu.yml"
    workflow.parent.mkdir(parents=True)
    text = (paths.ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
    assert right in text
    workflow.write_text(text.replace(right, wrong), encoding="utf-8")
    found = zizmor(tmp_path)
    assert found.returncode != 0 and fault in found.stdout


@pytest.mark.parametrize(("where", "step"), STEPS, **named)
def test_scripts_parse(where, step):
    checked = subprocess.run(["bash", "-n"], input=step.get("run", ""), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_action_is_pinned_to_a_commit_of_a_version(file):
    for line in file.read_text(encoding="utf-8").splitlines():
        if "uses:" in line:
            assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize(("where", "step"), STEPS, **named)
def test_scripts_that_steps_call_exist(where, step):
    for script in re.findall(r"\bbash (\S+)", step.get("run", "")):
        assert (paths.ROOT / script).is_file()
    targets = re.findall(r"\bmake (\S+)", step.get("run", ""))
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(("where", "job"), JOBS, **named)
def test_jobs_end_by_themselves_and_run_on_a_named_machine(where, job):
    assert 0 < job["timeout-minutes"] <= 600
    assert "latest" not in str(job["runs-on"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_rights_are_read_only_unless_a_job_needs_more(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for where, job in JOBS:
        extra = set(job.get("permissions", {})) - {"contents"}
        assert extra <= ({"pages", "id-token"} if where == "site.yml:publish" else set()), where


def test_the_gpu_workflow_is_started_by_hand_with_a_chapter_and_a_params_file():
    flow = WORKFLOWS["gpu.yml"]
    triggers = flow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert set(triggers) == {"workflow_dispatch"}
    inputs = triggers["workflow_dispatch"]["inputs"]
    assert set(inputs) == {"chapter", "params"}
    [job] = flow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert (paths.BOOK / "params" / f"{inputs['params']['default']}.yml").is_file()
    kept = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert kept == ["_build/measured/"]
