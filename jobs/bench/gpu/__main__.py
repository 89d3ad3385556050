"""`python -m valle.jobs.bench.gpu`: the command of run.py."""

import sys

from valle.jobs.bench.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
