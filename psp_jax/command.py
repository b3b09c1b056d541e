"""How every command ends when something is wrong: one sentence on stderr and exit code 1."""

import os
import sys
from collections.abc import Callable


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; an error that a user can mend becomes one line, anything else keeps its traceback.

    With PSP_JAX_DEBUG=1 every error keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("PSP_JAX_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
