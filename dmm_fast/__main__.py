"""``python -m dmm_fast`` is ``dmm-fast``."""

import sys

from dmm_fast.commands.main import main

sys.exit(main())
