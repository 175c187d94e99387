"""The one exception that means a user's mistake rather than a bug."""


class UserError(Exception):
    """Something that the user can put right; the message says what and how, and is all that is printed."""
