"""The one error for whatever a person can mend."""


class UserError(ValueError):
    """What a user can mend: a recipe, a file, a name, a refusal of the Hub. Its message is one line for them."""


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks, for a `UserError`."""
    return " ".join(str(error).split())
