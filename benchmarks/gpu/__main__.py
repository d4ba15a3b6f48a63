"""All measurements on a GPU within minutes: `python -m benchmarks.gpu --help`."""

import sys

from benchmarks.gpu.command import main
from maskalign.errors import UsageError

try:
    sys.exit(main())
except UsageError as error:
    print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
    sys.exit(2)
