"""``python -m pdarts_fast`` is the command ``pdarts-fast``."""

import sys

from pdarts_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
