"""`python -m nf_engine`: the same as the command nf-engine."""

import sys

from nf_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
