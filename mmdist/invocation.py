"""How this process was started, and how to start another one of us."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# -P: what lies in the folder where a job is started is no module of its ranks.
PROGRAM = (sys.executable, "-P", "-m", "mmdist")


def program_name() -> str:
    """What the user has typed to start us."""
    return "python launch.py" if Path(sys.argv[0]).name == "launch.py" else "mmdist"


def is_rank() -> bool:
    """True when torchrun or our agent made this process a rank."""
    return "RANK" in os.environ
