"""`python -m fastsft` is `fastsft`."""

import sys

from fastsft.cli import main

sys.exit(main())
