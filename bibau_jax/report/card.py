"""The model card beside purified weights: what was done, with which figures, and how to load them."""

from html import escape
from pathlib import Path

from bibau_jax.errors import shown
from bibau_jax.report import own, words


def is_of(path: Path, file: str, sha256: str) -> bool:
    """Whether nothing lies at `path`, or a card of this file that names this digest; anybody else's text is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return text.startswith(f"# {file}\n") and f"SHA-256 `{sha256}`" in text


def markdown(record, file: str, sha256: str) -> str:
    """The card of `file` as Markdown, from the record of the run that made it."""
    told, after = own.suspect(record), words.purified(record)
    made = own.rows(record)
    parts = [
        f"# {file}",
        f"{_plain(own.verdict(record))}\n\n{own.basis(record)}",
        "## What was done",
        "\n".join(
            [
                f"- From: `{told.get('file', '').rsplit('/', 1)[-1]}`, SHA-256 `{told.get('sha256', '')}`",
                f"- By: {words.defense(record.config['defense']['name'])} of bibau_jax {record.versions['bibau_jax']}",
                f"- This file: SHA-256 `{sha256}`, the same names, layouts and types as the one it came from{_under(told)}",
                f"- Network: {told.get('network')}; pixels scaled as {told.get('normalisation')}: "
                f"(x / 255 - {_numbers(told.get('mean', []))}) / {_numbers(told.get('std', []))}{own.nearly_as_well(told)}",
                f"- Command: `{record.command}`",
            ]
        ),
        "## Figures",
        _table(made),
        *([] if after else ["The purified model was not measured: the stage verify does that."]),
        "## What is not known",
        "\n".join(f"- {_plain(line)}" for line in own.unknown(record)),
        "## To load it in PyTorch",
        _loading(file, told.get("prefix", "")),
    ]
    return "\n\n".join(parts) + "\n"


def _under(told: dict) -> str:
    under = f"; there they lie under {_quoted(told['container'])}" if told.get("container") else ""
    return under + (f"; left out, being no tensors: {', '.join(map(_quoted, told['others']))}" if told.get("others") else "")


def _quoted(name: str) -> str:
    """A name out of a stranger's file, as code that nothing in it can end."""
    return f"`{shown(name).replace('`', '?')}`"


def _numbers(values) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _plain(text) -> str:
    """Text in which names of classes are nobody's markup."""
    return escape(str(text), quote=False)


def _safe(cell) -> str:
    return _plain(cell).replace("|", "\\|")


def _table(made) -> str:
    if not made:
        return "Nothing was measured."
    heads = ["Model", *(cell.heading for cell in made[0][1])]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([name, *map(_safe, cells)] for name, cells in made)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(file: str, prefix: str) -> str:
    reading = "safetensors.torch.load_file" if file.endswith(".safetensors") else "torch.load"
    options = "" if file.endswith(".safetensors") else ", weights_only=True"
    package = "import safetensors.torch" if file.endswith(".safetensors") else "import torch"
    weights, plain = f"{reading}({ascii(file)}{options})", ""
    if prefix:  # as the file's own names have it, of a model that was wrapped when it was saved; text, whatever it holds
        plain = f"weights = {{name.removeprefix({ascii(prefix)}): array for name, array in weights.items()}}\n"
    return f"```python\n{package}\n\nweights = {weights}\n{plain}model.load_state_dict(weights, strict=True)\n```"
