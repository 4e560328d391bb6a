"""ISSBA (Li et al., 2021): a secret hidden in the image by a trained steganographic encoder, dirty label.

Encoder and decoder are trained here, on the clean training images with random secrets; then one secret, the same for all
images, is the trigger. What changes in an image follows the image, so every image has a trigger of its own.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bibau_jax import keys, parallel, train
from bibau_jax.attacks.networks import StegoDecoder, StegoEncoder
from bibau_jax.attacks.protocol import Attack, Control, aim_at, check_pixels, dirty_label, in_blocks, on_all_devices, untrained
from bibau_jax.errors import UserError

BATCH = 64
READABLE = 0.9  # bit accuracy of a batch from which on the image begins to count
BIT_ACCURACY, PSNR = 0.99, 25.0  # what must be reached after rounding to pixels, else the trigger is refused
JUDGED = 500  # images


def weight_of_image(since: jax.Array, wait: int, ramp: int, largest: float) -> jax.Array:
    """lambda: 0 until `wait` steps after the secret could first be read (`since`; -1 before), then rising to `largest`."""
    return largest * jnp.clip((since - wait) / ramp, 0.0, 1.0)


def step(state: train.TrainState, frozen, batch, key, *, modules, optimizer, wait, ramp, largest):
    """One step of encoder and decoder on clean images: BCE of the bits + lambda MSE of the image."""
    images = batch["images"].astype(jnp.float32) / 255
    secrets = jax.random.bernoulli(key, 0.5, (len(images), modules["decoder"].bits)).astype(jnp.float32)
    weight = weight_of_image(state.extra["since"], wait, ramp, largest)

    def loss(params):
        carrying = modules["encoder"].apply({"params": params["encoder"]}, secrets, images)
        logits = modules["decoder"].apply({"params": params["decoder"]}, carrying)
        error = jnp.mean((carrying - images) ** 2)
        bits = optax.sigmoid_binary_cross_entropy(logits, secrets).mean()
        return bits + weight * error, (error, jnp.mean((logits > 0) == (secrets > 0.5)))

    (value, (error, read)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    since = state.extra["since"]
    since = jnp.where((since >= 0) | (read > READABLE), since + 1, since)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        extra={"since": since},
    )
    return state, {"loss": value, "squared_error": error, "bit_accuracy": read, "image_weight": weight}


def networks(bits: int, width: int) -> dict:
    """The encoder and the decoder."""
    return {"encoder": StegoEncoder(width), "decoder": StegoDecoder(bits, width)}


@partial(jax.jit, static_argnames="width")
def _carrying(pixels, params, secret, *, width):
    images = parallel.shard(pixels.astype(jnp.float32) / 255)
    secrets = jnp.broadcast_to(jnp.asarray(secret, jnp.float32), (len(images), len(secret)))
    carrying = StegoEncoder(width).apply({"params": params["encoder"]}, secrets, images)
    return jnp.clip(255 * carrying + 0.5, 0, 255).astype(jnp.uint8)


def carry(params, pixels: np.ndarray, secret: np.ndarray, *, width: int) -> np.ndarray:
    """Images uint8 [N, H, W, C] that carry `secret` [bits], rounded to uint8."""
    return in_blocks(on_all_devices(partial(_carrying, params=params, secret=secret, width=width)), pixels)


def quality(params, pixels: np.ndarray, secret: np.ndarray, *, width: int) -> tuple[float, float]:
    """(bit accuracy 0..1, mean PSNR in dB) of images uint8 once they carry `secret` and are rounded to pixels.

    The accuracy is the lower one of the secret's and its complement's: whoever always reads the same is right half the time.
    """
    decode = jax.jit(lambda images: StegoDecoder(len(secret), width).apply({"params": params["decoder"]}, images / 255.0))
    read = []
    for bits in (1 - np.asarray(secret), np.asarray(secret)):
        carrying = carry(params, pixels, bits, width=width)
        read.append(np.mean((np.asarray(decode(carrying.astype(np.float32))) > 0) == (bits > 0.5)))
    error = np.mean((carrying.astype(np.float64) - pixels) ** 2, (1, 2, 3))
    return float(min(read)), float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))


def fresh(key: jax.Array, shape: tuple[int, ...], bits: int, width: int) -> dict:
    """The first parameters of both networks, {"encoder", "decoder"}, for images of `shape` [H, W, C]."""
    modules, images, secrets = networks(bits, width), jnp.zeros((1, *shape)), jnp.zeros((1, bits))
    return {
        "encoder": modules["encoder"].init(keys.stream(key, "encoder"), secrets, images)["params"],
        "decoder": modules["decoder"].init(keys.stream(key, "decoder"), images)["params"],
    }


def divided(split) -> tuple[np.ndarray, np.ndarray, int]:
    """(images to train on, images to judge by, batch size)."""
    judged = max(1, min(JUDGED, len(split) // 10))
    images = split.images[:-judged]
    return images, split.images[-judged:], parallel.batch_of(min(BATCH, len(images)))


def check(split, *, epochs: int, wait: int, ramp: int) -> None:
    """Refuses a training that ends before the image counts."""
    images, _, batch = divided(split)
    if (steps := epochs * (len(images) // batch)) <= wait + ramp:
        raise UserError(
            f"issba: {steps} steps are too few: the image counts fully {wait + ramp} steps after the secret can first be read "
            "(attack.issba.epochs, wait, ramp)"
        )


def learn(key, split, journal, augment, *, bits, width, epochs, learning_rate, wait, ramp, largest):
    """{"encoder", "decoder", "secret"}, trained on clean images and judged on others, and the history of that training.

    UserError if the gate is not passed.
    """
    images, unseen, batch = divided(split)
    modules, params = networks(bits, width), fresh(key, images.shape[1:], bits, width)
    optimizer = optax.adam(learning_rate)
    state, history = train.fit(
        partial(step, modules=modules, optimizer=optimizer, wait=wait, ramp=ramp, largest=largest),
        train.new_state({"params": params, "batch_stats": {}}, optimizer, {"since": jnp.int32(-1)}),
        {"images": images},
        key=keys.stream(key, "encoder"),
        epochs=epochs,
        batch_size=batch,
        journal=journal,
    )
    found = jax.device_get(state.params)
    secret = np.asarray(jax.random.bernoulli(keys.stream(key, "secret"), 0.5, (bits,)), np.float32)
    secret[0] = 1.0  # a secret of zeros alone would be no secret
    read, psnr = quality(found, unseen, secret, width=width)
    if read < BIT_ACCURACY or psnr < PSNR:
        since = int(state.extra["since"])
        why = (
            "the secret never became readable"
            if since < 0
            else f"the image counted fully for {max(0, since - wait - ramp)} steps"
        )
        raise UserError(
            f"issba: the encoder is not good enough: bit accuracy {read:.3f} (at least {BIT_ACCURACY}), PSNR {psnr:.1f} dB (at "
            f"least {PSNR:.0f}); {why}; take another attack.issba.learning_rate, epochs or seed, and another workdir"
        )
    return found | {"secret": secret}, history


def stamp(pixels: np.ndarray, index: np.ndarray, *, learned, width: int) -> np.ndarray:
    """Every image carrying the one secret; uint8 [N, H, W, C] in and out."""
    check_pixels(pixels)
    return carry(learned, pixels, learned["secret"], width=width)


def finish(attack: Attack, learned, *, key, width: int, poison_ratio: float) -> Attack:
    """The attack with its encoder trained."""
    trigger = partial(stamp, learned=learned, width=width)
    poison = partial(dirty_label, key, stamp=trigger, aim=attack.aim, poison_ratio=poison_ratio)
    return dataclasses.replace(attack, stamp=trigger, poison=poison)


def make(
    key: jax.Array,
    *,
    num_classes: int,
    target_label: int = 0,
    poison_ratio: float = 0.1,
    mode: str = "all_to_one",
    bits: int = 1,
    width: int = 32,
    epochs: int = 20,
    learning_rate: float = 1e-4,
    wait: int = 1000,
    ramp: int = 3000,
    image_weight: float = 10.0,
) -> Attack:
    """ISSBA with a secret of `bits`; encoder and decoder of `width` channels, trained for `epochs` with Adam.

    The image begins to count `wait` steps after the secret can first be read, and fully, with `image_weight` times the mean
    squared error on the 0..1 scale, `ramp` steps later. The defaults are BackdoorBench's, whose arrays for small images carry
    one bit; the networks shift their inputs by a half, as BackdoorBox's do. UserError, when it is trained, for an encoder
    whose images cannot be read after rounding (bit accuracy below 0.99) or show it (PSNR below 25 dB).
    """
    if min(bits, width, epochs) < 1 or learning_rate <= 0 or wait < 0 or ramp < 1 or image_weight < 0:
        raise UserError(
            "ISSBA needs bits, width, epochs and ramp of at least 1, a positive learning_rate, and wait and image_weight "
            "of at least 0"
        )
    aim, trigger = aim_at(mode, target_label, num_classes), untrained("issba")
    training = {"epochs": epochs, "learning_rate": learning_rate, "wait": wait, "ramp": ramp, "largest": image_weight}
    control = Control(
        init=partial(learn, bits=bits, width=width, **training),
        finish=partial(finish, key=key, width=width, poison_ratio=poison_ratio),
        check=partial(check, epochs=epochs, wait=wait, ramp=ramp),
    )
    poison = partial(dirty_label, key, stamp=trigger, aim=aim, poison_ratio=poison_ratio)
    return Attack("issba", trigger, poison, aim, control)
