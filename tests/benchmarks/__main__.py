"""The command `python -m tests.benchmarks`."""

from __future__ import annotations

import sys

import tests.benchmarks
from tests.frame import main

sys.exit(main(tests.benchmarks))
