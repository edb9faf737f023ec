"""The one exception of `data/prepare`, and what a program does with it.

Exit codes are those of Graft: 1 a bug, 2 usage or configuration, 3 data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

BUG = 1
USAGE = 2
DATA = 3


class PrepareError(Exception):
    """A mistake of the user or of a file, told as `where: what is wrong, what to do`."""

    def __init__(self, message: str, exit_code: int = DATA) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_reporting_errors(program: str, main: Callable[[], None]) -> int:
    """Runs `main`; a PrepareError or a failed read or write becomes one line on standard error.

    @return the exit code of the process
    """
    try:
        main()
    except PrepareError as error:
        print(f"error: {program}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; the interpreter must not complain about it at exit
        return DATA
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {program}: {where}{error.strerror or error}", file=sys.stderr)
        return DATA
    except KeyboardInterrupt:
        print(f"{program}: interrupted; what was there before is unchanged", file=sys.stderr)
        return 130
    return 0
