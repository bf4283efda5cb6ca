"""The one error that a user's own input can cause."""


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line that names the field, its value and the remedy, for example
    ``n_heads=6 is not a multiple of n_kv_heads=4: choose 1, 2, 3 or 6``. The command line prints it
    without a traceback.
    """
