"""NC, Neural Cleanse (Wang et al., IEEE S&P 2019): finds the class with an unusually small trigger, and unlearns that trigger.

A model in which no class stands out is given back as it is.
"""

import jax
import numpy as np

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import ft
from bibau_jax.defenses.inversion import anomaly, check_search, invert, stamped
from bibau_jax.defenses.protocol import Purified, check_clean
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier


def with_trigger(key: jax.Array, clean: ImageSet, share: float, triggers) -> ImageSet:
    """The clean images, `share` of them replaced by stamped ones under their true labels: as many of each (mask, pattern).

    BackdoorBench stamps the same share with every trigger, one copy each; here several triggers divide it, so that the share
    means the same however many classes are flagged.
    """
    count = max(len(triggers), round(share * len(clean)))
    order = np.asarray(jax.random.permutation(key, len(clean)))[:count]
    images = clean.images.copy()
    for rows, (mask, pattern) in zip(np.array_split(order, len(triggers)), triggers, strict=True):
        made = stamped(clean.images[rows].astype(np.float32), mask, pattern)
        images[rows] = np.clip(np.round(made), 0, 255).astype(np.uint8)
    return ImageSet(images, clean.labels, clean.ids)


def check(
    num_classes: int,
    *,
    share: float = 0.2,
    epochs: int = 100,
    limit: float = 2.0,
    at_most: float = 0.0,
    memory: float = 8.0,
    schedule: str = "cosine",
    inversion_epochs: int = 80,
    enough: float = 0.99,
    patience: int = 5,
    stop_after: int = 25,
    **others,
) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if not 0 < share <= 1 or epochs < 1 or limit <= 0 or memory < 0 or at_most < 0:
        raise UserError("nc needs share within 0..1, at least one epoch, a positive limit, memory and at_most of at least 0")
    train.learning_rate_schedule(schedule, 1.0, 1)  # refuses an unknown name
    check_search(inversion_epochs, enough, patience, stop_after)


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    inversion_epochs: int = 80,
    batch_size: int = 256,
    inversion_rate: float = 0.1,
    enough: float = 0.99,
    patience: int = 5,
    stop_after: int = 25,
    memory: float = 8.0,
    limit: float = 2.0,
    at_most: float = 0.0,
    share: float = 0.2,
    epochs: int = 100,
    learning_rate: float = 0.01,
    schedule: str = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    padding: int = 4,
    flip: bool = True,
) -> Purified:
    """Inverts a trigger for every class, flags those with an anomaly index above `limit`, fine-tunes on their triggers.

    Args:
      enough, patience, stop_after: see `inversion.together`. memory: see `inversion.invert`.
      limit: of the anomaly index (the paper: 2).
      at_most: of the median mask's size, for a mask to be flagged; 0, the paper's form, asks for the index alone. Ours, because
        where the masks of a clean model are nearly alike one that is a little smaller passes the index.
      share: of the clean images that carry flagged triggers, true labels kept (0.2). The rest is fine-tuning.

    `told` holds the classes flagged, the largest index, its class and that mask's size over the median's; `evidence` masks and
    patterns of all classes.
    """
    check_clean(classifier, clean)
    searching = {"enough": enough, "patience": patience, "stop_after": stop_after}
    check(
        classifier.num_classes,
        share=share,
        epochs=epochs,
        limit=limit,
        at_most=at_most,
        memory=memory,
        schedule=schedule,
        inversion_epochs=inversion_epochs,
        **searching,
    )
    triggers, history = invert(
        keys.stream(key, "inversion"),
        classifier,
        variables,
        clean,
        epochs=inversion_epochs,
        batch_size=batch_size,
        learning_rate=inversion_rate,
        memory=memory,
        **searching,
        padding=padding,
        flip=flip,
        journal=journal.part("inversion", 2),
    )
    # As in the authors' code: of the masks that are kept, also of those that never reached enough images. A class that was
    # never searched, for want of time, has none.
    sizes = np.where(np.isnan(triggers.sizes), np.inf, triggers.masks.sum((1, 2, 3)))
    triggers = triggers._replace(sizes=sizes)
    index = anomaly(sizes)
    searched = sizes[np.isfinite(sizes)]
    relative = np.where(np.isfinite(sizes), sizes, 0.0) / max(np.median(searched) if len(searched) else 1.0, 1e-9)
    flagged = np.flatnonzero((index > limit) & ((at_most == 0) | (relative <= at_most)))
    told = {"flagged": flagged.tolist(), "anomaly_index": float(index.max()) if np.isfinite(index.max()) else 0.0}
    told |= {"suspected": int(index.argmax()), "relative_size": float(relative[index.argmax()])}
    evidence = triggers._asdict() | {"index": index}
    if not len(flagged):
        return Purified(jax.device_get(variables), history, told=told, evidence=evidence)
    chosen = [(triggers.masks[label], triggers.patterns[label]) for label in flagged]
    data = with_trigger(keys.stream(key, "stamped"), clean, share, chosen)
    tuned = ft.purify(
        keys.stream(key, "unlearn"),
        classifier,
        variables,
        data,
        held_out=held_out,
        journal=journal.part("unlearn"),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        momentum=momentum,
        weight_decay=weight_decay,
        padding=padding,
        flip=flip,
    )
    return Purified(tuned.variables, [*history, *tuned.history], told=told, evidence=evidence)
