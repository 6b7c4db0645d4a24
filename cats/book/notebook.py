"""What chapters do first and last: check parameters, set the theme, glue numbers, print provenance."""

import time
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime

from IPython import get_ipython
from IPython.display import display
from myst_nb import glue as _glue
from transformers.utils import logging

from cats.book import chapters, plots
from cats.book.comparison import Comparison, comparison_table
from cats.records import environment

_STARTED = time.perf_counter()  # a kernel imports this once, in the first cell of its chapter


def begin(namespace: dict) -> None:
    """Call with `globals()` after the parameters: CatsError for one that no chapter has; sets the theme."""
    chapters.check_parameters(namespace)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    plots.theme()
    shell = get_ipython()
    if shell is not None:
        # SVG without a date, so that equal numbers give equal files
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
        shell.run_line_magic("config", "InlineBackend.print_figure_kwargs = {'metadata': {'Date': None}}")


def glue(**values) -> None:
    """Keep numbers and words under names that any page can show with {glue:text}; nothing is printed."""
    for name, value in values.items():
        _glue(name, value.item() if hasattr(value, "item") else value, display=False)


def compare(comparisons: Iterable[Comparison]) -> None:
    """Show the comparisons as a table, and glue each of its cells as <key>_<column>."""
    comparisons = list(comparisons)
    for comparison in comparisons:
        glue(**{f"{comparison.key}_{column}": text for column, text in comparison.cells().items()})
    display(comparison_table(comparisons))


def setting(model: dict) -> str:
    """Model, dtype and hardware of a measurement, in a few words for a table's last column."""
    return f"{model['id']}, {model['dtype']}, {_hardware()}"


def end(
    chapter: str, *, models: Iterable[dict] = (), texts: Iterable[dict] = (), tokens: int | None = None
) -> None:
    """Print where the numbers of a chapter come from, and glue it for the provenance page.

    `models`: `info` of each model, `texts`: `info` of each corpus or of its batches, `tokens`: through the
    model.
    """
    software, git = environment.software(), environment.git()
    seconds = time.perf_counter() - _STARTED
    commit = f"{git['commit'][:7]}{' with changes' if git['dirty'] else ''}" if git["commit"] else "unknown"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    for model in models:
        identity = model.get("sha256") or model.get("revision") or f"seed {model.get('seed')}"
        print(f"model      {model['id']}, {model['weights']} weights, {model['dtype']}, {identity[:12]}")
    for text in texts:
        used = f", {text['tokens']:,} tokens" if "tokens" in text else ""
        counts = f"{text['documents']} documents{used}, sha256 {text['sha256'][:12]}"
        print(f"text       {text['name']} ({text['split']}), {counts}")
    print(f"hardware   {_hardware()}")
    print("software   " + ", ".join(f"{name} {version}" for name, version in software.items() if version))
    print(f"commit     {commit}")
    print(f"run        {when}, {seconds:.0f} s")
    names = ", ".join(dict.fromkeys(model["id"] for model in models)) or "none"
    sources = ", ".join(dict.fromkeys(text["name"] for text in texts)) or "none"
    glue(
        **{
            f"{chapter}_models": names,
            f"{chapter}_texts": sources,
            f"{chapter}_tokens": f"{tokens:,}" if tokens is not None else "–",
            f"{chapter}_hardware": _hardware(),
            f"{chapter}_commit": commit,
            f"{chapter}_run": f"{when}, {seconds:.0f} s",
        }
    )


def _hardware() -> str:
    """A GPU with its memory, or a CPU with its number of cores."""
    hardware = environment.hardware()
    if hardware["driver"] is None:
        return f"CPU ({hardware['device']}), {hardware['count']} cores"
    return f"{hardware['device']}, {hardware['memory_gb']:.0f} GB"
