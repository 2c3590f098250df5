"""The one exception that means "you can fix this": what is wrong, what was found, what to do.

The command line prints its message without a traceback and leaves with exit code 2; everything
else that escapes is a bug of ours and exits with 1. It is a ValueError, so that Python callers
need no import to catch it.
"""


class UserError(ValueError):
    """Input the user can mend. The message names the file, row or key, what was found and what to do."""
