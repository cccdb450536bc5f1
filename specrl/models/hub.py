"""Targets by Hugging Face id, 'owner/name' or 'owner/name@revision', from the local cache or downloaded."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

_FILES = (  # files that this package or SGLang reads; no pickles
    "config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer*.json "
    "tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja "
    "additional_chat_templates/*.jinja"
).split()
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


class HubId(NamedTuple):
    """A model on the Hugging Face Hub."""

    name: str  # owner/name
    revision: str | None = None  # branch, tag or commit; None: the main branch


def hub_id(target: str | Path) -> HubId | None:
    """Return `target` as a Hugging Face id; None if it is an existing directory or not of the form 'owner/name'."""
    match = _ID.fullmatch(str(target))
    return None if match is None or Path(target).exists() else HubId(match[1], match[2])


def hub_directory(target: str | Path) -> Path:
    """Return the directory of a checkpoint: `target` itself, or the snapshot of a Hugging Face id in the local cache.

    Missing files are downloaded, unless HF_HUB_OFFLINE is set or there is no network. Within one process an id always
    means the same commit.

    Raises:
        ValueError: an id that is neither in the cache nor can be downloaded.
    """
    model = hub_id(target)
    return Path(target) if model is None else _snapshot(model)


def served_as(target: str | Path) -> dict[str, object]:
    """Return SGLang's flags for a target (without dashes): an id and its revision, or a directory."""
    model = hub_id(target)
    if model is None:
        return {"model-path": str(target)}
    return {"model-path": model.name, **({} if model.revision is None else {"revision": model.revision})}


@functools.cache
def _snapshot(model: HubId) -> Path:
    from huggingface_hub import constants, snapshot_download

    name, revision, offline = model.name, model.revision, constants.HF_HUB_OFFLINE
    shown, option = (name, "") if revision is None else (f"{name}@{revision}", f" --revision {revision}")
    rule = f"a target must be a checkpoint directory or an available Hugging Face model, but {shown!r} is no directory"
    remedy = f"give a directory, or run: hf download {name}{option}"
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=offline))
    except Exception as error:  # errors of the hub, of its HTTP client and of the disk
        reason = next(iter(str(error).splitlines()), "").strip() or type(error).__name__
        raise ValueError(f"{rule} and is neither cached nor downloadable ({reason}); {remedy}") from error
    if not any(directory.glob("model*.safetensors")):
        raise ValueError(f"{rule} and its snapshot {str(directory)!r} lacks model*.safetensors; {remedy}")
    return directory
