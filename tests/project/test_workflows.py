"""The workflows: pinned actions, least rights, nothing of a user's spliced into a shell."""

import re
import subprocess

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


def test_the_three_workflows_are_there():
    assert set(WORKFLOWS) == {"test.yml", "site.yml", "gpu.yml"}


@pytest.mark.parametrize(("where", "step"), STEPS, **named)
def test_actions_are_pinned_to_a_commit(where, step):
    assert ("uses" in step) != ("run" in step)
    if "uses" in step:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_pin_says_its_version(file):
    for line in file.read_text(encoding="utf-8").splitlines():
        if "uses:" in line:
            assert re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize(("where", "step"), STEPS, **named)
def test_scripts_parse_and_take_inputs_by_environment_only(where, step):
    script = step.get("run", "")
    assert "${{" not in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


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
