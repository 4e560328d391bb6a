"""RA, the retuning attack (Min et al., NeurIPS 2024; the paper's Appendix D.2): fine-tune with a handful of poisoned images.

A model that has forgotten its backdoor learns nothing from so few; one that hides it gives it back.
"""

from functools import partial

import jax
import numpy as np

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier

# How many poisoned images each attack is given (Appendix D.2); 5 of all others on GTSRB.
POISONED = {"badnets": 5, "wanet": 5, "iad": 5, "issba": 5, "blended": 1}
OTHERS = {"gtsrb": 5}


def poisoned_count(attack: str, dataset: str) -> int:
    """The paper's number of poisoned images for an attack on a data set: 5, 1 for Blended, 2 for those harder to see."""
    return POISONED.get(attack, OTHERS.get(dataset, 2))


def retune(
    key: jax.Array,
    classifier: Classifier,
    variables,
    benign: ImageSet,
    poisoned: ImageSet,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    padding: int = 4,
    flip: bool = True,
    journal: train.Journal = train.Journal(),
) -> tuple[dict, list[dict]]:
    """(variables, history) after fine-tuning all parameters on benign images and a few poisoned ones.

    As in the authors' code: cross-entropy, SGD without weight decay at a constant rate, BatchNorm in train mode; benign images
    are cropped and flipped once, before training, and poisoned ones (as the attack labels them) are shown as they are. A
    last short batch is left out of an epoch, so let both sets together be a multiple of the batch.
    """
    if not len(benign) or not len(poisoned):
        raise UserError("retuning needs benign and poisoned images")
    moved = np.asarray(crop_and_flip(keys.stream(key, "augment"), benign.images, padding=padding, flip=flip))
    data = {
        "images": np.concatenate([poisoned.images, moved.astype(np.uint8)]),
        "labels": np.concatenate([poisoned.labels, benign.labels]),
    }
    optimizer = train.sgd(train.learning_rate_schedule("constant", learning_rate, 1), momentum=momentum, weight_decay=0.0)
    state, history = train.fit(
        partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=as_they_are),
        train.new_state(variables, optimizer),
        data,
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        journal=journal,
    )
    return state.variables, history


def as_they_are(extra, batch, key):
    """A batch without augmentation, for `train.train_step`."""
    return batch["images"].astype(np.float32), batch["labels"], 0.0, extra
