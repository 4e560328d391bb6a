"""What the commands share: the flags --config and --workdir, and ending with one line."""

import itertools
import re
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from bibau_jax import records
from bibau_jax.errors import NOT_APPLICABLE, NotApplicable, UserError, say

CONFIG = config_flags.DEFINE_config_file("config", None, "settings, e.g. configs/cifar10.py:blended", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run; the same command goes on where it was cut off")


def fail(message) -> None:
    """Ends the program with one line on stderr and exit status 2, or 3 where a defence cannot treat the network."""
    unfit = isinstance(message, NotApplicable)
    say(f"not applicable: {message}" if unfit else message)
    sys.exit(NOT_APPLICABLE if unfit else 2)


def _apart(flags: list[str], name: str) -> tuple[list[str], list[str]]:
    """The flag of that name with its value, "--name=value" or "--name value", wherever it was written; and all others."""
    found, others, waiting = [], [], iter(flags)
    for flag in waiting:
        written, equals, _ = flag.partition("=")
        if flag.startswith("-") and written.lstrip("-") == name:
            found += [flag] if equals else [flag, *itertools.islice(waiting, 1)]
        else:
            others.append(flag)
    return found, others


def _where(argv: list[str], first: list[str]) -> str:
    """Which flag names a setting that the config file lacks, and which one is meant where it only left out sections.

    `first` are the flags that name the file.
    """
    sys.argv[1:] = first  # where overrides are read from
    try:
        flags.FLAGS(sys.argv)
        known = [f"--config.{name}" for name in records.flat(CONFIG.value.to_dict())]
    except (AttributeError, KeyError):  # of the file's own
        return f" (in {' '.join(first)})"
    written = ("--" + flag.partition("=")[0].lstrip("-") for flag in argv if flag.startswith("-"))
    where = next((flag for flag in written if flag.startswith("--config.") and flag not in known), "")
    meant = [name for name in known if where and name.endswith(where.removeprefix("--config"))]
    return (f" (in {where})" if where else "") + (f"; did you mean {meant[0]}?" if len(meant) == 1 else "")


def command_line() -> str:
    """The command that started this program, for all stages: run in another folder, it makes the same record."""
    return shlex.join(["python", "-m", "bibau_jax.main", *_apart(sys.argv[1:], "config.stages")[1]])


def read_flags(argv: list[str]) -> list[str]:
    """Reads the flags; what is wrong with them, or with the config file, ends the program in one line. Returns the rest."""
    first, others = _apart(argv[1:], "config")
    argv[1:] = first + others  # settings can only be overridden once the config's file is read
    sys.argv[1:] = argv[1:]
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            fail("which settings? give --config, e.g. --config=configs/digits.py")
        CONFIG.value.to_dict()  # a config file that failed to load raises only when it is looked at
    except UserError as error:
        fail(error)
    except (AttributeError, KeyError) as error:
        reason = error.args[0]
        reason = str(reason.args[0] if isinstance(reason, KeyError) else reason)  # of a section in a section it is wrapped
        fail(f"unknown setting {reason}{_where(argv[1:], first)}")
    except (flags.Error, OSError, ImportError, SyntaxError, TypeError, ValueError) as error:
        said = str(error).removeprefix("Configuration is not available because of an earlier failure to load: ")
        if "Traceback (most recent call last)" in said:  # of the file's own get_config; what went wrong stands last
            said = re.split(r"\w*(?:Error|Exception): ", said)[-1]
        fail(said)
    if len(rest) > 1:
        fail(f'"{rest[1]}" is not a flag; settings are written --config.name=value')
    return rest


def parse(argv: list[str]) -> list[str]:
    """As `read_flags`, and asks for a folder."""
    rest = read_flags(argv)
    if not WORKDIR.value:
        fail("where to? give --workdir, e.g. --workdir=runs/digits")
    return rest
