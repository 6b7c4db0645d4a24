"""The identity of an op: what runs counts, how it is written and where it lies does not."""

import ast
import textwrap

import pytest

from cats import CatsError
from cats.records import identity

KERNELS = "kernels/cats_kernels"


def changed(source, edits: dict):
    """`source` with functions of the text over some of its files, or texts in place of them."""

    def read(path: str) -> str | None:
        edit = edits.get(path) or edits.get("*")
        if isinstance(edit, str):
            return edit
        text = source(path)
        return text if text is None or edit is None else edit(text)

    return read


class Documented(ast.NodeTransformer):
    """Another docstring in every function, and another word behind every local that no one else sees."""

    def visit_FunctionDef(self, node):
        passed = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
        passed |= {name for each in ast.walk(node) if isinstance(each, ast.Global) for name in each.names}
        stored = {
            each.id
            for each in ast.walk(node)
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        }
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and each.id in stored - passed:
                each.id += "_renamed"
        node.body = [ast.Expr(ast.Constant("Other words.")), *node.body]
        return node


def rewritten(text: str) -> str:
    """Without comments, formatted anew, with other docstrings and locals."""
    return ast.unparse(ast.fix_missing_locations(Documented().visit(ast.parse(text))))


class First(ast.NodeTransformer):
    """Changes the first node of a kind within one function."""

    def __init__(self, function: str, kind: type, change):
        self.function, self.kind, self.change, self.inside, self.done = function, kind, change, False, False

    def visit(self, node):
        entered = isinstance(node, ast.FunctionDef) and node.name == self.function
        self.inside = self.inside or entered
        if self.inside and not self.done and isinstance(node, self.kind):
            self.done = self.change(node)
        node = self.generic_visit(node)
        self.inside = self.inside and not entered
        return node


def edited(function: str, kind: type, change):
    def edit(text: str) -> str:
        first = First(function, kind, change)
        tree = first.visit(ast.parse(text))
        assert first.done, f"nothing to change in {function}"
        return ast.unparse(tree)

    return edit


def other_operator(node: ast.BinOp) -> bool:
    node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
    return True


def other_number(node: ast.Constant) -> bool:
    if type(node.value) is int:
        node.value += 16
        return True
    return False


@pytest.mark.parametrize("op", identity.OPS)
def test_comments_docstrings_formatting_and_locals_change_no_identity(op):
    assert identity.identity(op, changed(identity.on_disk, {"*": rewritten})) == identity.today(op)


@pytest.mark.parametrize("op", identity.OPS)
def test_another_file_changes_no_identity(op):
    more = changed(identity.on_disk, {f"{KERNELS}/four_bits.py": "def launch(x):\n    return x\n"})
    assert identity.identity(op, more) == identity.today(op)


@pytest.mark.parametrize(
    "path, edit, ops",
    [
        (f"{KERNELS}/decode.py", edited("gate_up_down", ast.BinOp, other_operator), {"one_row", "centred"}),
        (f"{KERNELS}/tuning.py", edited("few_config", ast.Constant, other_number), {"few_rows"}),
        (f"{KERNELS}/cpu.py", edited("run", ast.Constant, other_number), {"cpu"}),
        (
            "cats/decoding/graph.py",
            edited("_decode_one", ast.Constant, other_number),
            {"decoding"},
        ),
        ("cats/decoding/attention.py", edited("_fuse", ast.BinOp, other_operator), {"decoding"}),
        (
            f"{KERNELS}/decode_attention.py",
            edited("decode_attention", ast.Constant, other_number),
            {"decoding"},
        ),
    ],
)
def test_what_runs_changes_the_identity_of_the_ops_that_run_it(path, edit, ops):
    source = changed(identity.on_disk, {path: edit})
    assert {op for op in identity.OPS if identity.identity(op, source) != identity.today(op)} == ops


def toy(text: str, **others: str):
    """Sources of which `launch` in decode.py is one row's op."""
    files = {f"{KERNELS}/{name}.py": textwrap.dedent(other) for name, other in others.items()}
    return ({f"{KERNELS}/decode.py": textwrap.dedent(text)} | files).get


BASE = """
    import triton
    import triton.language as tl
    from cats_kernels import tuning
    from cats_kernels.primitives import survives as kept

    TILE = 8

    @triton.jit
    def kernel(x_ptr, R: tl.constexpr):
        rows = tl.arange(0, R)
        return kept(tl.load(x_ptr + rows), 1.0)

    def launch(x, config=None):
        config = config or tuning.config(x)
        if x is None:
            raise ValueError(f"no {x}")
        return kernel[(1,)](x, R=TILE * config["rows"])

    def unused():
        return 3
"""
TUNING = "def config(x):\n    return {'rows': 4}\n"
PRIMITIVES = "def survives(z, t):\n    return abs(z) >= t\n"


def same(text: str = BASE, tuning: str = TUNING, primitives: str = PRIMITIVES) -> bool:
    def found(*sources):
        return identity.identity("one_row", toy(sources[0], tuning=sources[1], primitives=sources[2]))

    return found(BASE, TUNING, PRIMITIVES) == found(text, tuning, primitives)


@pytest.mark.parametrize(
    "old, new",
    [
        ("no {x}", "there is no {x} at all"),
        ("return 3", "return 4"),
        ("x, config=None", "x: int, config: dict | None = None"),
        ("rows", "neurons"),
        (" kernel", " gate_and_up"),
        ("survives as kept", "survives as survives_here"),
        ("TILE", "NEURONS"),
    ],
)
def test_words_that_do_not_run_do_not_count(old, new):
    text = BASE.replace(old, new)
    text = text.replace("kept(", "survives_here(") if "survives_here" in new else text
    assert text != BASE and same(text.replace('["neurons"]', '["rows"]'))


@pytest.mark.parametrize(
    "old, new",
    [
        ("TILE = 8", "TILE = 16"),
        ("TILE * config", "TILE + config"),
        ("R: tl.constexpr", "R"),
        ("@triton.jit", "@triton.jit(debug=True)"),
        ("ValueError", "TypeError"),
        ("tl.load", "tl.store"),
        ("x_ptr + rows", "rows + x_ptr"),
    ],
)
def test_what_runs_counts(old, new):
    assert old in BASE and not same(BASE.replace(old, new))


def test_helpers_count_where_they_lie_in_other_modules():
    assert not same(tuning=TUNING.replace("4", "8"))
    assert not same(primitives=PRIMITIVES.replace(">=", ">"))
    assert same(tuning=TUNING + "\ndef other():\n    return 0\n")


def test_a_helper_that_moves_changes_nothing():
    moved = BASE.replace("cats_kernels.primitives", "cats_kernels.tuning")
    assert same(moved, TUNING + PRIMITIVES, "")


def test_methods_that_change_their_names_with_each_other_count():
    text = "class Decoder:\n    def step(self):\n        return 1\n    def prefill(self):\n        return 2\n"
    turned = text.replace("step", "other").replace("prefill", "step").replace("other", "prefill")
    attention = {"cats/attention.py": "def install(model):\n    return model\n"}
    found = [
        identity.identity("decoding", (attention | {"cats/decoding.py": each}).get)
        for each in (text, turned, text + "\n# more\n")
    ]
    assert found[0] == found[2] != found[1]


def test_an_op_that_a_version_has_not_has_no_identity():
    assert identity.identity("centred", toy(BASE, tuning=TUNING, primitives=PRIMITIVES)) is None
    with pytest.raises(CatsError, match="Unknown op 'gpu': use one of one_row"):
        identity.identity("gpu", identity.on_disk)
