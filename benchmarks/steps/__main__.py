import sys

from benchmarks.steps.command import main
from maskalign.errors import RunError, UsageError

try:
    main()
except (UsageError, RunError) as error:
    print(f"benchmarks.steps: error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UsageError) else 1)
