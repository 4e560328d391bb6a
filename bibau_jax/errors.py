"""The one exception for what a user can put right: it is printed as a single line, never as a traceback."""

import sys

MOST = 1000  # characters of a message


class UserError(ValueError):
    """A mistake in the settings, the data or the files at hand; the message is one line that says what to do.

    Names in it may come from a stranger's file: what a terminal would obey is not shown, and what is long is cut.
    """

    def __init__(self, message: str):
        super().__init__(shown(str(message), MOST))


def say(message) -> None:
    """Writes one line on stderr, as every command tells what went wrong."""
    sys.stderr.write(f"bibau_jax: {' '.join(str(message).split())}\n")


def shown(text: str, most: int = 80) -> str:
    """Text from a file as it may be printed: one line of printable characters, `most` of them."""
    line = "".join(one if one.isprintable() else " " if one.isspace() else "?" for one in text[: most + 1])
    return line if len(text) <= most else f"{line[: most - 3]}..."


NOT_APPLICABLE = 3  # the program's exit status then


class NotApplicable(UserError):
    """A network that a defence cannot treat, e.g. one without the layers that it prunes."""


class Diverged(UserError):
    """A training whose loss or weights are no longer finite."""


def unknown(kind: str, name: str, known) -> UserError:
    """The error for a name that is not among those known, e.g. `unknown attack "bagnets"`."""
    return UserError(f'unknown {kind} "{name}"; known: {", ".join(sorted(known))}')
