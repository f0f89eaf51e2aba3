"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake in what was asked for or handed in: one sentence that names the thing, what was found and what was
    expected. The command line prints it without a traceback and exits with status 2."""
