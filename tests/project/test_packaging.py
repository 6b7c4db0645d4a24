"""Lock, pyproject and environment.yml agree; imports run one way; a wheel says what it lacks."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import tracked

from cats import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = ("requirements.lock", "requirements-cuda.lock")


def pinned(lock: str) -> dict[str, str]:
    """Names and versions of a lock file."""
    text = (paths.ROOT / lock).read_text(encoding="utf-8")
    pins = re.findall(r"^([\w.-]+)==([^ ;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


LOCK = pinned("requirements.lock")
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for texts in [PROJECT["dependencies"], *EXTRAS.values()] for text in texts]


def test_the_lock_meets_every_requirement_of_pyproject():
    for requirement in REQUIREMENTS:
        version = LOCK.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is in pyproject.toml but not in requirements.lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_the_hashes_of_its_files(lock):
    text = (paths.ROOT / lock).read_text(encoding="utf-8")
    pins = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(pins) == len(pinned(lock)) > 0
    for pin in pins:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", pin), pin


def test_the_cuda_lock_has_only_what_the_cuda_build_of_torch_adds():
    cuda = pinned("requirements-cuda.lock")
    assert all(name.startswith(("nvidia-", "cuda-")) for name in cuda) and not set(cuda) & set(LOCK)


def test_the_lock_is_closed_and_has_nothing_else():
    """Every dependency of what is locked is locked; every pin is wanted by something (or builds the project).

    torch's own nvidia-* and cuda-* wheels are exempt: the build without a GPU has none of them.
    """
    wanted, todo = {"setuptools", "wheel"}, list(REQUIREMENTS)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if not _applies(requirement) or name.startswith(("nvidia-", "cuda-")):
            continue
        extras = {f"{name}[{extra}]" for extra in requirement.extras}
        if name in wanted and extras <= wanted:
            continue
        assert name in LOCK, f"{requirement} is needed but requirements.lock has no {name}"
        wanted |= {name} | extras
        for text in metadata.requires(name) or []:
            child = Requirement(text)
            if any(_applies(child, extra) for extra in ["", *requirement.extras]):
                child.marker = None
                todo.append(child)
    other_platforms = {"colorama", "importlib-metadata", "zipp", "typing-extensions", "pytz"}
    assert set(LOCK) - wanted - other_platforms == set()


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def test_what_runs_here_is_what_is_locked():
    installed = {name: metadata.version(name) for name in LOCK}
    assert {name: Version(version).base_version for name, version in installed.items()} == {
        name: Version(version).base_version for name, version in LOCK.items()
    }


def test_environment_yml_installs_the_lock_on_a_python_that_pyproject_accepts():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    [python] = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    required = Requirement(f"python{PROJECT['requires-python']}")
    assert required.specifier.contains(f"{python.removeprefix('python=')}.0")
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.lock", "-r requirements-cuda.lock"]
    assert "pip install --no-deps -e ." in (paths.ROOT / "postBuild").read_text(encoding="utf-8")


def test_extras_are_those_of_the_documentation():
    assert set(EXTRAS) == {"book", "cpu", "eval", "train", "dev"}


def test_versions_and_titles_agree():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] == metadata.version("cats-companion")
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert "MIT License" in (paths.ROOT / "LICENSE").read_text(encoding="utf-8")
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2404.08763"
    book = yaml.safe_load((paths.ROOT / "_config.yml").read_text(encoding="utf-8"))
    repository = book["repository"]["url"]
    assert citation["repository-code"] == repository == PROJECT["urls"]["Repository"]
    assert repository in (paths.ROOT / "README.md").read_text(encoding="utf-8")


def imports(file: Path) -> set[str]:
    """The absolute module names that a Python file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def roots(folder: str) -> dict[Path, set[str]]:
    files = [file for file in tracked(f"{folder}/*.py") if file.suffix == ".py"]
    assert files, f"no Python file in {folder}"
    return {file: {name.split(".")[0] for name in imports(file)} for file in files}


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "numpy", "numba", "llvmlite", "cats_kernels"} | sys.stdlib_module_names
    for file, names in roots("kernels/cats_kernels").items():
        assert names <= allowed, f"{file.name} imports {names - allowed}"


def test_the_library_imports_no_book_and_no_command_line():
    for file, names in roots("cats").items():
        upward = names & {"book", "cats_cli", "tests", "kernels"}
        assert upward <= ({"cats_cli"} if file.name == "__main__.py" else set()), f"{file.name}: {upward}"


def test_the_library_reaches_kernels_only_by_their_package():
    for file in tracked("cats/*.py", "tests/*.py", "cats_cli/*.py"):
        names = imports(file)
        inner = {n for n in names if n.startswith("kernels.")}
        assert not inner, f"{file.name} imports {inner}: cats_kernels is the name"
    # It would shadow another package of that name.
    assert not (paths.ROOT / "kernels" / "__init__.py").exists()


def test_the_command_line_answers_before_the_library_is_loaded():
    for file in tracked("cats_cli/*.py"):
        top = {
            name.split(".")[0]
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
        }
        assert top <= sys.stdlib_module_names | {"cats_cli"}, file.name


def test_every_import_is_declared():
    """What the library and the kernels import is a dependency of its own, not another's that may drop it."""
    distributions = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS} | {"cats-companion"}
    for folder in ("cats", "kernels"):
        for file, names in roots(folder).items():
            beside = {sibling.stem for sibling in file.parent.glob("*.py")}
            for name in names - sys.stdlib_module_names - beside - {"cats", "cats_kernels"}:
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
                assert owners & declared, f"{file.name} imports {name}: declare it in pyproject.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git tracks."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in tracked("cats", "kernels", "cats_cli", "pyproject.toml", "README.md", "LICENSE"):
        target = source / file.relative_to(paths.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    built = subprocess.run(
        [*command, "-w", str(output), str(source)], capture_output=True, text=True, cwd=output
    )
    assert built.returncode == 0, built.stderr
    [file] = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's files unpacked, as an installation without a clone around it would have them."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_library_the_kernels_and_the_command(wheel):
    assert wheel.name == f"cats_companion-{PROJECT['version']}-py3-none-any.whl"
    information = f"cats_companion-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{information}/entry_points.txt").decode()
    sources = tracked("cats/*.py", "cats_cli/*.py", "kernels/cats_kernels/*.py")
    expected = {file.relative_to(paths.ROOT).as_posix().removeprefix("kernels/") for file in sources}
    assert expected <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        *("cats", "cats_kernels", "cats_cli")
    }
    assert "cats = cats_cli:main" in entry_points


COMMANDS = """
import contextlib, io, json, sys
import cats_cli
done = []
for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cats_cli.main(line.split())
    done.append([status, out.getvalue(), err.getvalue()])
print(json.dumps([cats_cli.__file__, done]))
"""


def test_the_library_runs_from_a_wheel_and_what_needs_a_clone_says_so(installed):
    """One process for both: what takes long is importing PyTorch."""
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS, "inspect random:llama-2-7b --sparsity 0.5", "reproduce"],
        capture_output=True,
        text=True,
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert ran.returncode == 0, ran.stderr
    file, [inspected, reproduced] = json.loads(ran.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(installed)
    assert inspected[0] == 0, inspected[2]
    assert "22.3 %" in inspected[1]  # 0.5 · 2/3 of the MLP weights, over all linear weights
    assert reproduced[0] == 2
    [line] = reproduced[2].strip().splitlines()
    assert "clone the project" in line
    assert not (installed / "data").exists()


TOY = paths.ROOT / "tests" / "core" / "saved-0.1" / "model"  # 20 kB, as version 0.1 saved it


def test_no_large_file_and_no_weights():
    weights = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".parquet", ".whl", ".pkl", ".npz"}
    for file in tracked():
        assert file.stat().st_size <= 2_000_000, f"{file.name} has more than 2 MB"
        assert file.suffix not in weights or file.parent == TOY, f"{file.name} is no source"


MACHINE_PATH = re.compile(r"""(?<![\w.~$}/-])/(?:root|home/\w+|Users/\w+|work|mnt|tmp)/[\w.]""")
REGISTRY_HOST = re.compile(r"py(?:pi|thonhosted)\.org")
# not within the letters of packed scores, which may spell anything
UNFINISHED = re.compile(r"(?<![\w+/])(?:TO" r"DO|FIX" r"ME|XX" r"X)(?![\w+/=])")


@pytest.mark.parametrize(
    ("what", "pattern"),
    [("a machine's path", MACHINE_PATH), ("a registry's host", REGISTRY_HOST), ("unfinished", UNFINISHED)],
)
def test_no_text_names(what, pattern):
    found = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(paths.ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == [], what
