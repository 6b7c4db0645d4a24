"""Every second chapter, run on tiny parameters, from the second on."""

import chapter_runs
import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", chapter_runs.CHAPTERS[1::2])
def test_a_chapter_runs_on_tiny_parameters(name, tmp_path):
    chapter_runs.check(name, tmp_path)
