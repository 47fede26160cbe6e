"""The subcommands, one file each: ``run(args)`` takes the words after its name and returns the exit code.

Raises UserError for what the user can mend. A command is imported when it is called.
"""
