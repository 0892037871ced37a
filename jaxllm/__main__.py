"""python -m jaxllm: the command line."""

import sys

from jaxllm.cli import main

sys.exit(main())
