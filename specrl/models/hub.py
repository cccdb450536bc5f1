"""Targets by Hugging Face id, 'owner/name' or 'owner/name@revision': read from the hub's cache, fetched if need be.

An id stays an id wherever a target is recorded; this module says which directory on this machine it means.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

_FILES = (  # all that is read here or by SGLang; never pickles
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


class HubId(NamedTuple):
    """A model on the Hugging Face Hub."""

    name: str  # owner/name
    revision: str | None = None  # branch, tag or commit; None: the main branch


def hub_id(target: str | Path) -> HubId | None:
    """The id that `target` is; None where it is something else: a directory that exists, or no 'owner/name'."""
    found = _ID.fullmatch(str(target))
    return None if found is None or Path(target).exists() else HubId(found[1], found[2])


def hub_directory(target: str | Path) -> Path:
    """Where a checkpoint's files are: a directory as it stands, the files of a Hugging Face id in the hub's cache.

    What the cache lacks is downloaded, unless HF_HUB_OFFLINE is set or there is no network. Within one process an id
    means the same commit always.

    Raises:
        ValueError: an id whose files are neither in the cache nor to be had.
    """
    named = hub_id(target)
    return Path(target) if named is None else _snapshot(named)


def served_as(target: str | Path) -> dict[str, object]:
    """The flags by which SGLang finds a target (without their dashes): its id and revision, or a directory."""
    named = hub_id(target)
    if named is None:
        return {"model-path": str(target)}
    flags: dict[str, object] = {"model-path": named.name}
    return flags if named.revision is None else {**flags, "revision": named.revision}


@functools.cache
def _snapshot(model: HubId) -> Path:
    shown = model.name if model.revision is None else f"{model.name}@{model.revision}"
    at = "" if model.revision is None else f" --revision {model.revision}"
    rule = (
        f"a target must be a checkpoint directory or a Hugging Face model in reach, but {shown!r} is no directory and "
    )
    remedy = f"; give a directory, or run: hf download {model.name}{at}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{rule}huggingface_hub is not installed; pip install huggingface_hub") from error
    try:
        found = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(_FILES)))
    except Exception as error:  # of the hub, of what it speaks HTTP with, of the disk
        why = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
        raise ValueError(f"{rule}the hub's cache and network gave none ({why}){remedy}") from error
    if not any(found.glob("model*.safetensors")):
        raise ValueError(f"{rule}its files here, {str(found)!r}, lack model*.safetensors{remedy}")
    return found
