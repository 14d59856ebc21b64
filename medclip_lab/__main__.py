"""`python -m medclip_lab` is `medclip-lab`."""

import sys

from medclip_lab.cli import main

sys.exit(main())
