"""Names and numbers as a reader sees them, and the verdict on a run in words made from its numbers."""

import math

CLEAN = "clean"  # in place of an attack, where a model has no backdoor
ATTACKS = {
    "badnets": "BadNets",
    "blended": "Blended",
    "sig": "SIG",
    "refool": "Refool",
    "wanet": "WaNet",
    "iad": "IAD",
    "issba": "ISSBA",
    "narcissus": "Narcissus",
    "adap_blend": "Adap-Blend",
    "adap_patch": "Adap-Patch",
    "enhanced_adap_blend": "Enhanced Adap-Blend",
    "enhanced_adap_patch": "Enhanced Adap-Patch",
    "patch": "A trigger of one's own",
    "unknown": "No trigger known",
}
DEFENSES = {
    "none": "Backdoored model",
    "clean": "Clean twin",
    "ft": "Fine-tuning",
    "base_at": "Base AT",
    "bibau_t": "BI-BAU (T)",
    "bibau_u": "BI-BAU (U)",
    "ibu": "IBU (ideal, no defence)",
    "nc": "Neural Cleanse",
    "bti_dbf": "BTI-DBF",
    "anp": "ANP",
    "ep": "EP (sees poisoned images)",
    "bnp": "BNP",
    "rnp": "RNP",
    "clp": "CLP",
    "i_bau": "I-BAU",
    "sau": "SAU",
    "pam": "PAM",
    "nad": "NAD",
}
DATASETS = {"own": "Own images", "cifar10": "CIFAR-10", "gtsrb": "GTSRB", "tiny_imagenet": "Tiny-ImageNet", "digits": "Digits"}
# Further measurements that tables show; records hold more.
MEASURES = {"r_asr": "R-ASR", "q_asr": "Q-ASR", "u_asr": "U-ASR", "s_asr": "S-ASR", "bec": "BEC"}
REACTIVATION = ("r_asr", "q_asr")
NETWORKS = {"resnet18": "ResNet-18", "vgg19": "VGG19", "vit_b_32": "ViT-B/32"}
NOTHING = "–"


def attack(name) -> str:
    """The attack's name as its paper writes it, `CLEAN` as none; a name not known is shown as it is."""
    return "none (clean model)" if name == CLEAN else ATTACKS.get(name, str(name))


def defense(name) -> str:
    """The defence's name as its paper writes it, with its ablation ("bibau_u:+A"); a name not known is shown as it is."""
    base, _, ablation = str(name).partition(":")
    return DEFENSES.get(base, base) + (f", {'Base AT' if ablation == 'base_at' else ablation}" if ablation else "")


def dataset(name) -> str:
    """The data set's name as its paper writes it; a name not known is shown as it is."""
    return DATASETS.get(name, str(name))


def measure(name: str) -> str:
    """The heading of a further measurement, e.g. `R-ASR` for `r_asr`."""
    return MEASURES.get(name, name.replace("_", " "))


def order(known, name) -> tuple:
    """A sort key: the place of `name` among `known`, unknown names after all of them by alphabet."""
    names, (base, _, ablation) = list(known), str(name).partition(":")
    return (names.index(base), ablation) if base in names else (len(names), str(name))


def is_number(value) -> bool:
    """Whether `value` is a finite number (a truth value is not one)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value, digits: int = 1) -> str:
    """`1,234.5`: a fixed number of digits after the point and a true minus sign; a dash for what is not there."""
    return f"{value:,.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def short(value) -> str:
    """About three digits of a number of any size, e.g. `0.0123`, `12.3`, `1.2e+06`; a dash for what is not there."""
    if not is_number(value):
        return NOTHING
    plain = value == 0 or 1e-4 <= abs(value) < 1e5
    return (f"{value:,.3g}" if plain and abs(value) < 1e3 else f"{value:,.0f}" if plain else f"{value:.1e}").replace("-", "−")


def percent(value) -> str:
    """`97.2 %`, from a value in percent; a dash for what is not there."""
    return f"{number(value)}\u202f%" if is_number(value) else NOTHING


def rate(value) -> float | None:
    """A Rate's value in percent, None where nothing was counted."""
    return value.percent if value is not None and value.count else None


def further_value(name: str, value) -> str:
    """A further measurement to a fixed number of digits: percent to one, BEC (about 0 to 1) to two."""
    return number(value, 2 if name.startswith("bec") else 1)


def duration(seconds) -> str:
    """`61.2 s`, `12 min 05 s` or `3 h 20 min`; a dash for what is not there."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 120:
        return f"{number(seconds)}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}\u202fmin {rest:02d}\u202fs"
    return f"{minutes // 60:,}\u202fh {minutes % 60:02d}\u202fmin"


def model(settings: dict) -> str:
    """The network in words, e.g. `resnet18 (width 16, stages 1-1-1-1)`, from the config's `model` part."""
    stages = settings.get("stages")
    stages = "-".join(map(str, stages)) if isinstance(stages, (list, tuple)) else stages
    parts = [f"{key} {value}" for key, value in (("width", settings.get("width")), ("stages", stages)) if value]
    return f"{settings.get('name', NOTHING)} ({', '.join(parts)})" if parts else str(settings.get("name", NOTHING))


def backdoored(record):
    """The measurement of the model before any defence, None where the record has none."""
    return next((m for m in record.metrics.values() if m.defense == "none"), None)


def purified(record):
    """The measurement that the run is about: the one named `purified`, else BI-BAU's, else the last defence's."""
    if "purified" in record.metrics:
        return record.metrics["purified"]
    found = {m.defense: m for m in record.metrics.values() if m.defense not in ("none", "clean")}
    return next((found[name] for name in ("bibau_u", "bibau_t") if name in found), (list(found.values()) or [None])[-1])


def cost(record, measurement):
    """The StageCost of the stage that made a measured model, None where the record does not name it."""
    made_by = {"none": ("implant",), "clean": ("clean", "implant/clean", "twin")}
    stages = made_by.get(measurement.defense, ()) + (f"purify/{measurement.defense.partition(':')[0]}",)
    return next((record.stages[name] for name in stages if name in record.stages), None)


def further(record) -> list[str]:
    """Which of MEASURES any model of the record was given, in their order."""
    return [name for name in MEASURES if any(is_number(m.extra.get(name)) for m in record.metrics.values())]


def verdict(record) -> str:
    """One sentence on what was measured: the trigger's success and the clean accuracy, before and after."""
    before, after = backdoored(record), purified(record)
    if before is None or after is None:
        missing = "the backdoored model" if before is None else "a purified model"
        return f"The record holds no measurement of {missing}, so nothing can be said about a purification."
    return (
        f"The trigger worked on {percent(rate(before.asr))} of images before purification and works on "
        f"{percent(rate(after.asr))} after; clean accuracy went from {percent(rate(before.ca))} to "
        f"{percent(rate(after.ca))}."
    )


def reservation(record) -> str:
    """What the verdict rests on and leaves open: how many images, how many seeds, whether re-activation was tried."""
    after = purified(record)
    if after is None:
        return ""
    kind = record.config.get("measured_on", "test")
    basis = f"Counted on {after.asr.count:,} triggered and {after.ca.count:,} clean {kind} images; one run, seed {record.seed}."
    tried = [f"{measure(k)} {percent(after.extra[k])}" for k in REACTIVATION if is_number(after.extra.get(k))]
    if tried:
        counted = after.extra.get("reactivation_images")
        over = f" (of {counted:,} triggered images)" if is_number(counted) else ""
        each = [value for value in after.extra.get("r_asr_each", []) if is_number(value)]
        reach = f"; R-ASR of single draws {number(min(each))} to {number(max(each))}" if len(each) > 1 else ""
        return f"{basis} Re-activation was tried on the purified model: {', '.join(tried)}{over}{reach}."
    return f"{basis} Re-activation was not tested: whether the trigger can be brought back is not known from this run."
