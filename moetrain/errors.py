"""The one exception that means: the user can mend this. The command line prints it without a traceback."""


class UserError(Exception):
    """One line: what was wrong, where (config key, file, rank), both numbers, and what to do."""
