"""The one exception that a user's mistake raises; the command line turns it into a line and exit code 2."""


class UserError(ValueError):
    """A mistake the user can mend: the message is one line that names the thing, the value and the way out."""
