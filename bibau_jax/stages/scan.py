"""The stage that looks for a backdoor without knowing the trigger: a class that an unusually small patch reaches.

Neural Cleanse's inversion (Wang et al., IEEE S&P 2019), on any model; see `defenses.inversion`. Its anomaly index is taken of
the logarithms of sizes, which differ by factors: where classes differ much among themselves, the index of the sizes as they are
cannot pass the limit however small one of them is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from bibau_jax import keys, npz, parallel, progress, records
from bibau_jax.data import ImageSet, splits
from bibau_jax.defenses import inversion
from bibau_jax.errors import UserError
from bibau_jax.metrics import cost
from bibau_jax.models import Classifier
from bibau_jax.run import Run, load_model, update, write_arrays
from bibau_jax.stages import evaluate

VERDICT = ("limit", "share")  # settings of what is made of the triggers, not of the search for them
COMPARABLE = 3  # classes; fewer have no median to stand out from
LEAST_SPREAD = 0.05  # of the logarithms: where sizes are alike to 5 % or there is none, one that is half as large stands out


class Scan(NamedTuple):
    """What a scan found: a trigger for every class, its anomaly index [K], and the classes whose index is above the limit.

    The index of a class for which no trigger was found is minus infinity.
    """

    triggers: inversion.Triggers
    index: np.ndarray
    flagged: tuple[int, ...]

    @property
    def suspected(self) -> int:
        """The class with the largest index, flagged or not; -1 where no trigger was found for any."""
        return int(np.argmax(self.index)) if np.isfinite(self.index).any() else -1

    @property
    def found(self) -> int:
        """For how many classes a trigger was found."""
        return int(np.isfinite(self.triggers.sizes).sum())

    @property
    def is_undetermined(self) -> bool:
        """Whether there is too little to compare: triggers for less than half of the classes, or only two classes."""
        return 2 * self.found < len(self.triggers.sizes) or len(self.triggers.sizes) < COMPARABLE

    @property
    def told(self) -> dict[str, Any]:
        """The numbers of the scan for a record; size -1 and index None are those of a trigger that was not found."""
        sizes = [float(size) if np.isfinite(size) else -1.0 for size in self.triggers.sizes]
        index = [float(value) if np.isfinite(value) else None for value in self.index]
        largest = index[self.suspected] if self.suspected >= 0 else None
        told = {"flagged": list(self.flagged), "suspected": self.suspected, "anomaly_index": largest}
        told |= {"found": self.found, "undetermined": self.is_undetermined}
        return told | {"indices": index, "sizes": sizes, "reached": self.triggers.reached.tolist()}


def scan(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    limit: float = 2.0,
    share: float = 0.5,
    **search,
) -> Scan:
    """Inverts a trigger for every class and compares them; `search`: see `searched`.

    A class is flagged where its index is above `limit` (the paper: 2) and its trigger at most `share` of the median's size:
    where all classes are nearly alike, a little less than the others says nothing. Two classes have no spread to compare with:
    both triggers are inverted, and it cannot be told whether one is too small.
    """
    return judged(searched(key, classifier, variables, clean, **search), limit=limit, share=share)


def searched(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    images: int = 500,
    memory: float = 4.0,
    **search,
) -> inversion.Triggers:
    """Triggers inverted on `images` of the clean ones, at least one of each class; the rest: see `inversion.invert`."""
    chosen = splits.some_of(clean, max(images, classifier.num_classes))
    given = (key, classifier, variables, chosen)
    least = inversion.FIRST_WEIGHT  # in few epochs a weight that was lowered far would not come back
    return inversion.invert(*given, memory=memory, least=least, **search)[0]


def search_of(this: Run) -> dict[str, Any]:
    """The settings of a run that `searched` takes."""
    section = {name: value for name, value in this.config["scan"].items() if name not in VERDICT}
    return section | {name: this.config["data"][name] for name in ("padding", "flip")}


def judged(triggers: inversion.Triggers, *, limit: float = 2.0, share: float = 0.5) -> Scan:
    """The scan's verdict on inverted triggers, see `scan`.

    A class for which no trigger was found counts as one that takes the whole image. Where those are more than half, the search
    was too short to compare, and none is flagged.
    """
    found = np.isfinite(triggers.sizes)
    whole = max([float(np.prod(triggers.masks.shape[1:3])), *triggers.sizes[found]])
    sizes = np.where(found, triggers.sizes, whole)
    index = np.where(found, inversion.anomaly(np.log(sizes), floor=LEAST_SPREAD), -np.inf)
    flagged = (index > limit) & (sizes <= share * np.median(sizes))
    made = Scan(triggers, index, tuple(np.flatnonzero(flagged).tolist()))
    return made._replace(flagged=()) if made.is_undetermined else made


def check(section: dict) -> None:
    """Raises `UserError` on settings that `scan` cannot use."""
    inversion.check_search(**{name: section[name] for name in ("epochs", "enough", "patience", "stop_after")})
    if min(section["images"], section["batch_size"]) < 1 or section["learning_rate"] <= 0:
        raise UserError("scan.images and scan.batch_size must be at least 1, scan.learning_rate must be positive")
    if section["limit"] < 0 or section["share"] < 0 or section["memory"] <= 0:
        raise UserError("scan.limit and scan.share must not be negative, scan.memory must be positive")


def run(this: Run, command: str) -> None:
    """Scans the model that is to be purified, before anything is done to it."""
    found = of_model(this, command, evaluate.BEFORE, "scan")
    say(this, found)


def of_model(this: Run, command: str, one: evaluate.Measured, room: str) -> Scan:
    """The scan of a model, from `room` in the run's folder where it was done before; joins the model's row."""
    path, measured = this.folder / room / "triggers.npz", evaluate.begun(this, one)
    if path.exists() and "scan" in measured.extra:
        progress.say(f"{room}: done", show=parallel.is_lead())
        return read(path)
    journal, variables = this.journal(room), load_model(this, one.stage)[0]
    with cost.measure() as spent:
        given = (keys.stream(this.key, "scan"), this.classifier, variables, this.splits.clean)
        verdict = {name: this.config["scan"][name] for name in VERDICT}
        found = scan(*given, journal=journal, **verdict, **search_of(this))
    arrays = found.triggers._asdict() | {"index": found.index, "flagged": np.array(found.flagged, int)}
    arrays["example"] = this.measured.images[0]
    write_arrays(path, arrays)
    journal.keeper.clear()
    measured = dataclasses.replace(measured, extra=measured.extra | {"scan": found.told})
    update(this, command, metrics={one.name: measured}, stages={room: records.StageCost(**dataclasses.asdict(spent))})
    return found


def read(path) -> Scan:
    """A scan from its arrays on disk."""
    arrays = npz.left(path, *inversion.Triggers._fields, "index", "flagged")
    triggers = inversion.Triggers(*(arrays[name] for name in inversion.Triggers._fields))
    return Scan(triggers, arrays["index"], tuple(arrays["flagged"].tolist()))


def say(this: Run, found: Scan) -> None:
    """One line of what the scan found."""
    told = found.told
    if len(found.index) < COMPARABLE:
        line = "cannot tell: two classes are too few to compare"
    elif found.is_undetermined:
        count = len(found.index)
        line = f"cannot tell: no trigger was found for {count - found.found} of {count} classes; a longer search may find them "
        line += "(scan.epochs, scan.images)"
    elif found.flagged:
        names = this.suspect.told["class_names"] if this.is_own else this.dataset.class_names
        classes = ", ".join(f"{label} ({names[label]})" for label in found.flagged)
        line = f"suspicious: a small patch turns images into class {classes}; anomaly index {told['anomaly_index']:.1f}"
    else:
        line = f"nothing found: the largest anomaly index is {told['anomaly_index']:.1f}"
    progress.say(f"scan: {line}", show=parallel.is_lead())
