"""The strip of images: clean, triggered and adversarial, what differs, and what each model says."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

KINDS = {
    "clean": ("Clean", "as the data set has them"),
    "triggered": ("Triggered", "with the attack’s trigger"),
    "adversarial": ("Adversarial", "x′, made from the clean image to fool the backdoored model"),
}
MODELS = ("backdoored", "purified")
GAINS = (1, 2, 3, 5, 10, 15, 20, 30, 50, 100)
TARGET_MARK = "◎"


def data_uri(image: np.ndarray) -> str:
    """A uint8 image [H, W, C], C = 1 or 3, as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def amplified(images: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, int]:
    """(images - clean) enlarged around mid-grey, uint8 [n, H, W, C], and the factor: as large as clips nothing, else 1."""
    difference = images.astype(np.int32) - clean.astype(np.int32)
    most = int(np.abs(difference).max(initial=0))
    gain = max((g for g in GAINS if g * most <= 127), default=1) if most else 1
    return np.clip(128 + gain * difference, 0, 255).astype(np.uint8), gain


def _class(names, label) -> str:
    return str(names[label]) if 0 <= label < len(names) else str(label)


def _models(arrays, kind: str) -> list[str]:
    found = [name.removeprefix(f"{kind}_by_") for name in arrays if name.startswith(f"{kind}_by_")]
    return sorted(found, key=lambda name: (MODELS.index(name) if name in MODELS else len(MODELS), name))


def _says(arrays, names, kind: str, index: int, target: int | None) -> list[tuple[str, str, bool]]:
    """What every model predicts for one image: (model, class name, whether that is the attack's target)."""
    told = []
    aim = int(arrays["aims"][index]) if "aims" in arrays else target
    for model in _models(arrays, kind):
        label = int(arrays[f"{kind}_by_{model}"][index])
        told.append((model, _class(names, label), label == aim))
    return told


def _cell(image, alt: str, says) -> str:
    lines = []
    for model, name, hit in says:
        tone, mark = (" hit", f"\u00a0<b>{TARGET_MARK}</b>") if hit else ("", "")
        lines.append(f'<span class="says{tone}"><i>{escape(model)}</i> {escape(name)}{mark}</span>')
    return f'<td><img src="{data_uri(image)}" alt="{escape(alt)}">{"".join(lines)}</td>'


def _image_row(arrays, names, kind: str, target) -> str:
    cells = []
    for index, image in enumerate(arrays[kind]):
        says = _says(arrays, names, kind, index, target)
        told = ", ".join(f"{model} model says {name}{' (the target)' if hit else ''}" for model, name, hit in says)
        true = _class(names, int(arrays["labels"][index]))
        cells.append(_cell(image, f"{kind} image of {true}" + (f": {told}" if told else ""), says))
    return f"<tr>{''.join(cells)}</tr>"


def _row_head(title: str, text: str, columns: int) -> str:
    return f'<tr><th scope="rowgroup" colspan="{columns}">{title} <span>{text}</span></th></tr>'


def _difference_row(arrays, kind: str) -> str:
    images, gain = amplified(arrays[kind], arrays["clean"])
    columns = len(images)
    cells = (_cell(image, f"difference of {kind} image {i + 1} from the clean one", ()) for i, image in enumerate(images))
    text = f"difference from clean{f', × {gain}' if gain > 1 else ''}; grey is no change"
    return f'<tr><th scope="rowgroup" colspan="{columns}"><span>{text}</span></th></tr><tr>{"".join(cells)}</tr>'


def table(arrays: dict, target: int | None) -> str:
    """The strip as an HTML table, one column an image, from the arrays of `strip.npz`.

    Kinds that are not there are left out. What the attack wants of each image is in `aims`, else it is `target`, the
    attack's one target label (None where there is none).
    """
    names = [str(name) for name in arrays.get("class_names", ())]
    kinds = [kind for kind in KINDS if kind in arrays and len(arrays[kind])]
    if not kinds or "labels" not in arrays:
        return ""
    columns = len(arrays[kinds[0]])
    heads = "".join(f'<th scope="col">{escape(_class(names, int(label)))}</th>' for label in arrays["labels"][:columns])
    out = [f'<table class="strip" style="--n:{columns}"><caption>True class</caption>']
    out.append(f"<thead><tr>{heads}</tr></thead>")
    for kind in kinds:
        rows = _row_head(*KINDS[kind], columns) + _image_row(arrays, names, kind, target)
        if kind != "clean" and "clean" in arrays:
            rows += _difference_row(arrays, kind)
        out.append(f"<tbody>{rows}</tbody>")
    return "".join(out) + "</table>"
