"""``python -m dmm_fast`` is ``dmm-fast``."""

import sys

from dmm_fast.cli import main

sys.exit(main())
