#!/usr/bin/env python3
"""Put the figure that the README shows beside it: what the chapter on perplexity drew when it last ran."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "book" / "03_perplexity.ipynb"
FIGURE = "fig-perplexity"
PICTURE = ROOT / "book" / "images" / "perplexity.svg"


def stored() -> str:
    """The figure's SVG out of the chapter's stored outputs; LookupError where there is none."""
    for cell in json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]:
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == FIGURE:
            for output in cell["outputs"]:
                if svg := output.get("data", {}).get("image/svg+xml"):
                    return "".join(svg)
    raise LookupError(f"{CHAPTER.name} has no stored figure {FIGURE}: run `make execute` first.")


if __name__ == "__main__":
    try:
        svg = stored()
    except LookupError as error:
        sys.exit(f"make: {error.args[0]}")
    temporary = PICTURE.with_name(f".{PICTURE.name}.tmp")
    temporary.write_text(svg, encoding="utf-8")
    temporary.replace(PICTURE)
