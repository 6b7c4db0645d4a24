"""`python -m cats_cli`: the command line, also of the processes that accelerate starts."""

import sys

from cats_cli import main

sys.exit(main())
