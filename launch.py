"""The entry of a checkout, and of torchrun; an installed mmdist is started as `mmdist` or `python -m mmdist`.

python launch.py --help
"""

import sys

from mmdist.cli import main
from mmdist.launch import leave

if __name__ == "__main__":
    leave(main([sys.executable, __file__]))
