"""FT: plain fine-tuning of all parameters on the defender's clean images."""

from functools import partial

import jax

from bibau_jax import train
from bibau_jax.data import ImageSet
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.models import Classifier


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    schedule: str = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 0,
) -> Purified:
    """Cross-entropy on clean images, BatchNorm in train mode: the baseline that stands beside every defence.

    cutout: pixels a side of the black square in each image, 0 for none.
    """
    check_clean(classifier, clean)
    steps = epochs * max(1, len(clean) // min(batch_size, len(clean)))
    optimizer = train.sgd(
        train.learning_rate_schedule(schedule, learning_rate, steps), momentum=momentum, weight_decay=weight_decay
    )
    prepare = partial(train.augmented, padding=padding, flip=flip, holes=cutout)
    step = partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare)
    state, history = train.fit(
        step,
        train.new_state(variables, optimizer),
        as_data(clean),
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        after_epoch=watch(classifier, held_out),
        journal=journal,
    )
    return Purified(state.variables, history)
