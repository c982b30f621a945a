"""`python -m tlsproxy`."""

import sys

from tlsproxy.cli import main

sys.exit(main())
