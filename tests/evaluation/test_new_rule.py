"""A new rule is one file: it registers itself, and the evaluator runs it by name."""

from importlib.util import module_from_spec, spec_from_file_location

import evaluation_toys
import pytest

from cats import criteria
from cats.corpora import Calibration
from cats.criteria.sites import is_sparse
from cats.errors import CatsError
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method
from cats.evaluation.table import load_results, results_table

RULE = '''
"""Every other neuron, whatever the token."""

import torch

from cats.core.structure import find_gated_mlps
from cats.criteria import register
from cats.criteria.sited import SitedRule, neuron_site


@register
class Alternate(SitedRule):
    name, title, what = "alternate", "Alternate neurons", "every other neuron is dropped"
    neurons = True

    def measure(self, model, batches, progress):
        """Nothing: no text is read."""

    def sites(self, model, state, sparsity):
        def keep(gate, call):
            return (torch.arange(gate.shape[-1]) % 2 == 0).expand(gate.shape)

        return [neuron_site(mlp, "gate", keep) for mlp in find_gated_mlps(model)]
'''


@pytest.fixture
def registered(tmp_path):
    path = tmp_path / "alternate.py"
    path.write_text(RULE)
    spec = spec_from_file_location("alternate", path)
    spec.loader.exec_module(module_from_spec(spec))
    yield criteria.RULES["alternate"]
    del criteria.RULES["alternate"]


def test_a_rule_in_one_file_is_evaluated_by_its_name(registered, tmp_path):
    loaded = evaluation_toys.loaded()
    evaluator = Evaluator(
        loaded,
        tmp_path / "results",
        data_dir=str(evaluation_toys.mirrors(tmp_path / "mirrors")),
        calibration=Calibration("python-docs", tokens=256, sequence_length=128),
        documents=2,
    )
    methods = [Method(), Method("alternate", 0.5)]
    found = load_results(evaluator.run(["piqa"], methods, progress=False))
    row = results_table(found).set_index("rule").loc["alternate"]
    assert row.gate_sparsity == 0.5 and row.realised_sparsity == pytest.approx(0.5)
    assert not is_sparse(loaded.model)
    with pytest.raises(CatsError, match=r"did you mean alternate\?"):
        criteria.rule("alternates")
