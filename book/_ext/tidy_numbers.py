"""Numbers of every page in one form, whoever wrote them: `50 %` that does not break, a true minus sign."""

from docutils import nodes

from cats.book.words import tidy

_AS_IT_IS = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.comment)


def tidy_numbers(app, doctree, docname: str) -> None:
    for text in list(doctree.findall(nodes.Text)):
        node = text.parent
        while node is not None and not isinstance(node, _AS_IT_IS):
            node = node.parent
        if node is None and (tidied := tidy(text.astext())) != text.astext():
            text.parent.replace(text, nodes.Text(tidied))


def setup(app) -> dict:
    app.connect("doctree-resolved", tidy_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
