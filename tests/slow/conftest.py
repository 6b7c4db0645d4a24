"""What `make harden` prints at its end: how many cases of each kind there were, and how they came out."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    counts: dict[str, Counter] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for what, outcomes in getattr(report, "user_properties", ()):
                if getattr(report, "when", "") == "call":
                    counts.setdefault(what, Counter()).update(outcomes)
    for what, outcomes in sorted(counts.items()):
        parts = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(outcomes.items()))
        terminalreporter.write_line(f"{outcomes.total():,} {what}: {parts}")
