"""The command `python -m tests.faults`."""

from __future__ import annotations

import sys

import tests.faults
from tests.frame import main

sys.exit(main(tests.faults))
