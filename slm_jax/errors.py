"""The one error that a user's own input can cause."""

import difflib
from collections.abc import Mapping


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line that names the field, its value and the remedy, for example
    ``n_heads=6 is not a multiple of n_kv_heads=4: choose 1, 2, 3 or 6``. The command line prints it
    without a traceback.
    """


def named[T](field: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of `table` called `name`.

    Raises:
        UserError: if there is none; names the closest ones.
    """
    if name not in table:
        close = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.5) or table
        raise UserError(f"{field}={name!r} does not exist: choose from {', '.join(close)}")
    return table[name]
