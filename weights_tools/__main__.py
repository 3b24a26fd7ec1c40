"""`python -m weights_tools`: the same as the console script."""

import sys

from weights_tools.cli import main

sys.exit(main())
