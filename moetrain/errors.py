"""The exceptions that mean: the user can mend this. The command line prints them without a traceback."""


class UserError(Exception):
    """One line: what was wrong, where (config key, file, rank), both numbers, and what to do."""

    exit_code = 2


class TrainingError(UserError):
    """Training itself went wrong (a loss not finite, a spike), with the last good checkpoint named."""

    exit_code = 1
