"""The one exception for what a person can fix: bad files, bad values, bad configuration."""


class InputError(ValueError):
    """Input that is wrong in a way its owner can mend.

    The message is one line: what is wrong, the value received, what to do. The command line prints it without a
    traceback and exits with code 2.
    """
