"""The embedded targets: small Llamas pretrained for this project on the Python standard library's sources.

Both have one shape (16 layers of width 192, vocabulary 512, positions up to 1024) and are Hugging Face checkpoints
made by `pretrain.py`; `log.json` holds the curve, `held_out.txt` the files never trained on. `easy` had 7 minutes of
pretraining on two CPU cores (1.78 bits per byte held out), `strong` 70 (1.16): it writes plausible Python and is the
harder one for a draft to follow.
"""

from __future__ import annotations

from pathlib import Path

from specrl.models.hub import hub_directory

_FOLDERS = {"embedded": "easy", "embedded-easy": "easy", "embedded-strong": "strong"}


def embedded_directory(name: str = "embedded") -> Path:
    """The checkpoint directory of an embedded target: 'embedded' (the default), 'embedded-easy' or 'embedded-strong'.

    Raises:
        ValueError: there is no embedded target of this name.
    """
    if name not in _FOLDERS:
        raise ValueError(f"an embedded target is one of {', '.join(map(repr, _FOLDERS))}, but got {name!r}")
    return Path(__file__).parent / _FOLDERS[name]


def target_directory(target: str | Path) -> Path:
    """Where a target's files are, by the name of an embedded one, by its directory or by its Hugging Face id."""
    name = str(target)
    return embedded_directory(name) if name.startswith("embedded") and "/" not in name else hub_directory(target)
