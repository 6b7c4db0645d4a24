"""Files of ours that the tests damage: each is written, and read through its reader beside a plain one.

A reader's result is compared with what `json`, PyYAML or safetensors make of the same bytes.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import record_rows
import torch
import yaml
from finetuning_toys import PLAN
from safetensors.torch import load as load_tensors
from toys import constant_thresholds, toy

from cats import Thresholds
from cats.book import chapters, reproduce
from cats.calibration.checkpoint import Checkpoint
from cats.evaluation import plan as evaluation_plan
from cats.finetuning import plan as finetuning_plan
from cats.records import record as records

BATCHES = 3
_EVALUATION = """
defaults: {device: cpu, dtype: float32, documents: 6, calibration: {corpus: python-docs, tokens: 1024}}
runs:
  - model: toy
    record: toy
    tasks: [piqa, arc_easy]
    rules: [dense, cats: [0.5, 0.7]]
  - {model: other, record: other, tasks: [piqa], rules: [cats: [0.25]], seed: 7, policy: {prefill: dense}}
"""
_PARAMETERS = (
    'model: smollm2-135m-instruct\nsparsity: 0.5\nlr: 1e-4\nlevels: [0.3, 0.5]\nname: "x"\nseed: 0\n'
)
_CELLS = ("# A chapter\n\nProse.", 'model: str = "toy"  # a name\nsparsity: float = 0.5\n', "print(model)")


def strict(text: str):
    """JSON as its standard has it: each key once, no NaN; ValueError otherwise."""

    def once(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    def none(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=none)


def same(found, written) -> bool:
    """Equal in values and in kinds: 1, 1.0 and True are three things."""
    return json.dumps(found, sort_keys=True) == json.dumps(written, sort_keys=True)


def write_thresholds(folder: Path) -> Path:
    constant_thresholds(toy()).save(folder / "thresholds.json")
    return folder / "thresholds.json"


def write_thresholds_per_neuron(folder: Path) -> Path:
    """So many values that they stand in a file beside the JSON."""
    thresholds = constant_thresholds(toy())
    thresholds.grid = torch.linspace(0, 1, 160)
    thresholds.values = torch.rand(3, 80, 1, generator=torch.Generator().manual_seed(0)) * thresholds.grid
    thresholds.save(folder / "thresholds.json")
    return folder / "thresholds.json"


def thresholds(path: Path) -> None:
    found = Thresholds.load(path)
    written = strict(path.read_text(encoding="utf-8"))
    assert all(same(value, written[key]) for key, value in found.provenance().items())
    assert torch.equal(found.grid, torch.tensor(written["grid"], dtype=torch.float32))
    values = written["values"]
    if isinstance(values, dict):
        [file] = path.parent.glob("*.safetensors")
        assert torch.equal(found.values, load_tensors(file.read_bytes())["values"])
    else:
        assert torch.equal(found.values, torch.tensor(values, dtype=torch.float32))
    assert ("scale" in written) is (found.scale is not None)
    found.at(0.5)


def thresholds_beside(path: Path) -> None:
    thresholds(path.with_name("thresholds.json"))


def write_record(folder: Path) -> Path:
    rows = [record_rows.row("perplexity", model="toy", nll_nats=2.5, tokens=10 * n) for n in range(3)]
    return record_rows.write(folder, rows=rows, sparsity=0.5)


def record(path: Path) -> None:
    [found] = records.every("perplexity", folder=path.parent)
    written = strict(path.read_text(encoding="utf-8"))
    assert same(found.content, written)
    assert len(found.rows) == len(written["rows"])
    found.provenance()
    assert records.read("perplexity", folder=path.parent).path == path


def as_text(path: Path):
    """YAML in which every scalar is the text that is written; asserts that no key is there twice."""

    def once(node):
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            assert len(set(keys)) == len(keys), f"a key is there twice: {keys}"
            assert all(map(once, (child for pair in node.value for child in pair)))
        elif isinstance(node, yaml.SequenceNode):
            assert all(map(once, node.value))
        return True

    text = path.read_bytes().decode("utf-8-sig")
    assert once(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - it makes text of everything


def reads_as(value, text: str) -> bool:
    """Whether a value is what YAML 1.2 takes a scalar for."""
    if value is None:
        return text in ("", "~", "null", "Null", "NULL")
    if isinstance(value, bool):
        return text.lower() in (("true", "yes", "on") if value else ("false", "no", "off"))
    if isinstance(value, (int, float)):
        return (int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)) == value
    return text == value


def write_evaluation_plan(folder: Path) -> Path:
    (folder / "plan.yml").write_text(_EVALUATION)
    return folder / "plan.yml"


def evaluation(path: Path) -> None:
    found = evaluation_plan.read(path)
    _runs(path, [asdict(run) for run in found], {"tasks", "rules", "methods", "calibration", "policy"})


def write_finetuning_plan(folder: Path) -> Path:
    (folder / "plan.yml").write_text(PLAN)
    return folder / "plan.yml"


def finetuning(path: Path) -> None:
    found = [asdict(each) for each in finetuning_plan.read(path)]
    _runs(
        path,
        [{**each["recipes"][0], **each} for each in found],
        {"grid", "methods", "recipes", "calibration"},
    )


def _runs(path: Path, found: list[dict], lists: set[str]) -> None:
    written = as_text(path)
    assert len(found) == len(written["runs"])
    for run, asked in zip(found, written["runs"], strict=True):
        for key, text in {**(written.get("defaults") or {}), **asked}.items():
            if key not in lists and isinstance(text, str):
                assert reads_as(run[key], text), f"{key} is {run[key]!r}, written {text!r}"


def write_parameters(folder: Path) -> Path:
    (folder / "params.yml").write_text(_PARAMETERS)
    return folder / "params.yml"


def parameters(path: Path) -> None:
    found = reproduce.load_profile(str(path))
    written = as_text(path) or {}
    assert list(map(str, found)) == list(written)
    for value, text in zip(found.values(), written.values(), strict=True):
        assert not isinstance(text, str) or reads_as(value, text), f"{value!r}, written {text!r}"


def write_notebook(folder: Path) -> Path:
    kinds = ("markdown", {}), ("code", {"tags": ["parameters"]}), ("code", {})
    cells = [
        {"cell_type": kind, "id": f"cell-{number}", "metadata": about, "source": source.splitlines(True)}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for number, ((kind, about), source) in enumerate(zip(kinds, _CELLS, strict=True))
    ]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "01_toy.ipynb").write_text(json.dumps(content, indent=1))
    return folder / "01_toy.ipynb"


def notebook(path: Path) -> None:
    found = chapters.read(path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [cell.cell_type for cell in found.cells] == [cell["cell_type"] for cell in written["cells"]]
    assert [cell.source for cell in found.cells] == ["".join(cell["source"]) for cell in written["cells"]]
    chapters.parameters(found)
    chapters.cells_hash(chapters.bare(found))
    chapters.problems(found)


def _counted() -> tuple[list[torch.Tensor], list[dict]]:
    generator = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(9, (2, 4), generator=generator)} for _ in range(BATCHES)]
    return [torch.zeros(3, 8, dtype=torch.int64), torch.zeros(5, dtype=torch.float64)], batches


def write_checkpoint(folder: Path) -> Path:
    tensors, batches = _counted()
    checkpoint = Checkpoint(folder / "counts.checkpoint", tensors, ["toy"])
    for number, _ in zip(range(1, BATCHES), checkpoint.rest(batches), strict=False):
        for tensor in tensors:
            tensor += number
        checkpoint.counted(8 * number)
    checkpoint.write()
    return checkpoint.path


def checkpoint(path: Path) -> None:
    tensors, batches = _counted()
    found = Checkpoint(path, tensors, ["toy"])
    begun = list(found.rest(batches))
    data = path.read_bytes()
    state = strict(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())["__metadata__"]
    written = load_tensors(data)
    assert sorted(written) == [str(number) for number in range(len(tensors))]
    for number, tensor in enumerate(tensors):
        other = written[str(number)]
        assert (tensor.dtype == other.dtype and torch.equal(tensor, other)) or other.isnan().any()
    assert len(begun) == BATCHES - int(state["batches"]) == 1 and found.tokens == int(state["tokens"])
