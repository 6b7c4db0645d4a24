"""What the README shows is true: its Python runs on the embedded model, its commands and links exist."""

import re
import runpy
import shlex

import pytest
import torch

import cats
import cats_cli
from cats import paths
from cats.models import embedded
from cats.models import load as models

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
] + re.findall(r"`((?:cats [a-z]|make )[^`]*)`", README)


def test_three_lines_make_a_model_sparse(thresholds_file, monkeypatch):
    block, decoding = [block for language, block in BLOCKS if language == "python"]
    assert len(block.strip().splitlines()) == 3
    monkeypatch.chdir(thresholds_file.parent)
    script = thresholds_file.with_name("three_lines.py")
    script.write_text(block, encoding="utf-8")
    model = runpy.run_path(str(script), {"name": embedded.model_folder(models.DEFAULT)})["model"]
    prompt = torch.tensor([[1, 504, 3575, 282]])
    with cats.SparsityMeter(model) as meter, torch.inference_mode():
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 8)
    assert 0.3 < float(meter.overall) < 0.7
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    script.write_text(decoding.replace("max_new_tokens=256", "max_new_tokens=4"), encoding="utf-8")
    runpy.run_path(str(script), {"model": model, "inputs": inputs})


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("cats ")])
def test_its_commands_are_understood(line):
    assert cats_cli.parser().parse_args(shlex.split(line)[1:]).command


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_its_make_targets_exist(line):
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)


def test_its_papermill_line_names_files_that_exist():
    [line] = [line for line in SHELL if line.startswith("papermill ")]
    words = shlex.split(line)
    assert (paths.ROOT / words[1]).is_file()
    assert (paths.ROOT / words[words.index("-f") + 1]).is_file()


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    missing = [target for target in targets if "://" not in target and not (paths.ROOT / target).is_file()]
    assert not missing


def test_its_picture_is_what_the_chapter_drew_last():
    [picture] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    drawn = runpy.run_path(str(paths.ROOT / "scripts" / "picture.py"))["stored"]()
    assert (paths.ROOT / picture).read_text(encoding="utf-8") == drawn


def test_it_is_short():
    assert len(README.splitlines()) < 120
