"""Errors that a user can mend; the command line prints them and exits with code 2."""


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file, the record and the mend."""
