"""`python -m cats`: the command line; `python -m cats_cli` answers `--help` sooner."""

import sys

from cats_cli import main

sys.exit(main())
