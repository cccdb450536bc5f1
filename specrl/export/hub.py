"""Handing a bundle to the Hugging Face Hub; asked for by name only, and shown before it is done."""

from __future__ import annotations

import re
from pathlib import Path

from specrl.export.bundle import check_bundle


def push_to_hub(directory: Path, repository: str, *, dry_run: bool, private: bool = True) -> list[str]:
    """Upload a bundle, after checking it against its manifest; the files that went, or with `dry_run` would go.

    Needs `huggingface_hub`, and a login of its own (`hf auth login`); nothing is read of either in a dry run.

    Raises:
        ValueError: a repository that is not 'owner/name', a damaged bundle, or no `huggingface_hub`.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a repository is written 'owner/name', but got {repository!r}")
    files = check_bundle(directory)
    if dry_run:
        return files
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(
            "pushing needs huggingface_hub, but it is not installed; pip install huggingface_hub"
        ) from error
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Draft and plans learned by specrl")
    return files
