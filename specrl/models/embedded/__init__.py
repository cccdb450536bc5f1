"""The embedded targets: small Llamas pretrained on the Python standard library by tools/pretrain_embedded.py.

Both are Hugging Face checkpoints with 16 layers of width 192, a vocabulary of 512 and 1024 positions. `log.json` has
the learning curve, and `held_out.txt` the files that were not trained on. `easy` was pretrained for 7 minutes on two
CPU cores (1.78 bits per byte held out), `strong` for 70 (1.16); a draft predicts `strong` less well.
"""

from __future__ import annotations

from pathlib import Path

from specrl.core.checks import require_known
from specrl.models.hub import hub_directory

_FOLDERS = {"embedded": "easy", "embedded-easy": "easy", "embedded-strong": "strong"}


def embedded_directory(name: str = "embedded") -> Path:
    """Return the checkpoint directory of an embedded target: 'embedded' (the default), 'embedded-easy' or '-strong'.

    Raises:
        ValueError: there is no embedded target of this name.
    """
    require_known("an embedded target", name, _FOLDERS)
    return Path(__file__).parent / _FOLDERS[name]


def target_directory(target: str | Path) -> Path:
    """Return the directory of a target by the name of an embedded one, by its directory or by its Hugging Face id."""
    name = str(target)
    return embedded_directory(name) if name.startswith("embedded") and "/" not in name else hub_directory(target)
