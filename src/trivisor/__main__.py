"""`python -m trivisor` is the command `trivisor`."""

import sys

from trivisor.cli.main import main

sys.exit(main())
