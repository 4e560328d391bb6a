"""The one exception for what a user can put right: it is printed as a single line, never as a traceback."""


class UserError(ValueError):
    """A mistake in the settings, the data or the files at hand; the message is one line that says what to do."""


NOT_APPLICABLE = 3  # the program's exit status then


class NotApplicable(UserError):
    """A network that a defence cannot treat, e.g. one without the layers that it prunes."""


def unknown(kind: str, name: str, known) -> UserError:
    """The error for a name that is not among those known, e.g. `unknown attack "bagnets"`."""
    return UserError(f'unknown {kind} "{name}"; known: {", ".join(sorted(known))}')
