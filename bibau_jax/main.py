"""The command: python -m bibau_jax.main --config=configs/cifar10.py:blended --workdir=runs/x [--config.defense.pgd.steps=10]"""

import errno
import signal
import sys
import traceback

from absl import app, logging

from bibau_jax.cli import CONFIG, WORKDIR, command_line, fail, parse
from bibau_jax.errors import UserError

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than allowed",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
}


def main(argv: list[str]) -> None:
    """Runs the stages; see bibau_jax/experiment.py."""
    from bibau_jax import experiment, parallel, run  # JAX starts here, after the flags were found right

    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every save
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = CONFIG.value.to_dict()
    parallel.keep_compiled()
    parallel.use_cores(*run.batch_sizes(config))
    try:
        record = experiment.run(config, WORKDIR.value, command_line())
        sys.exit(experiment.status(config, record))
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint")
    except OSError as error:
        if error.errno not in DISK:
            _crash()
        fail(f"cannot write {error.filename or WORKDIR.value}: {DISK[error.errno]}; what was finished is kept")
    except Exception:
        _crash()


def _crash() -> None:
    """Ends the program with the traceback of a fault of its own; not with status 1, which is what a scan has found."""
    traceback.print_exc()
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
