"""The box that each chapter begins with: question, answer, figure, caveat, command."""

from dataclasses import dataclass

from cats.book.words import tidy


@dataclass(frozen=True)
class Box:
    """What a chapter asks and found, for a cell tagged `box`; numbers come from records, not from a keyboard.

    `answer`: two sentences, with the number and its interval. `figure`: the name of the one figure that shows
    it. `caveat`: what the answer does not say. `command`: what measures it once more.
    """

    question: str
    answer: str
    figure: str
    caveat: str
    command: str

    def _repr_markdown_(self) -> str:
        figure = f"{{numref}}`{self.figure}`"
        parts = {
            "Question": tidy(self.question),
            "Answer": f"{tidy(self.answer)} See {figure}.",
            "Caveat": tidy(self.caveat),
            "Run it again": f"`{self.command}`",
        }
        return "\n\n".join(f"**{name}.** {text}" for name, text in parts.items())

    def __repr__(self) -> str:
        return f"{self.question} {self.answer}"
