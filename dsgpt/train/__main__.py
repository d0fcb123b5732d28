"""`python -m dsgpt.train RUN.yaml [key=value…]`: one rank of a training run, as launchers start it."""

import sys

from dsgpt.train.worker import main

if __name__ == "__main__":
    main(sys.argv[1:])
