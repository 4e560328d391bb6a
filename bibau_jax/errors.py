"""The one exception for what a user can put right: it is printed as a single line, never as a traceback."""


class UserError(ValueError):
    """A mistake in the settings, the data or the files at hand; the message is one line that says what to do."""


def unknown(kind: str, name: str, known) -> UserError:
    """The error for a name that is not among those known, e.g. `unknown attack "bagnets"`."""
    return UserError(f'unknown {kind} "{name}"; known: {", ".join(sorted(known))}')
