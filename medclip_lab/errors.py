"""The exceptions that the command line turns into a line and an exit code."""


class UserError(ValueError):
    """A mistake the user can mend: the message is one line that names the thing, the value and the way out.

    Exit code 2.
    """


class StartAgainError(Exception):
    """No mistake: the work was cut off, and goes on where it was when the same command is started again.

    Exit code 75, EX_TEMPFAIL of sysexits.h, which a job script may answer by requeueing.
    """
