"""A directory that serves: the draft as SGLang reads it, and the plan per batch size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from specrl.models.checkpoint import write_atomic
from specrl.models.draft import Draft, load_draft
from specrl.plan import Plan

PLANS, MANIFEST = "plans.json", "manifest.json"


def read_plans(path: Path) -> dict[int, Plan]:
    """The plan per batch size (lower bound -> plan) from a run's plans.json.

    Raises:
        ValueError: no such file, or not a table of plans.
    """
    if not path.exists():
        raise ValueError(
            f"a run must hold {path.name}, but {str(path.parent)!r} does not; name a run that has finished"
        )
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["plans"]
        return {int(batch): Plan.parse(plan) for batch, plan in table.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} must be JSON with 'plans' by batch size, but it is not ({error!r})") from error


def write_bundle(draft: Draft, plans: dict[int, Plan], directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write draft/, plans.json and manifest.json whole or not at all, after reading the draft back.

    Raises:
        ValueError: the draft read back differs from the one written.
    """

    def write(into: Path) -> None:
        draft.save(into / "draft", dtype)
        table = {"plans": {str(batch): str(plan) for batch, plan in sorted(plans.items())}}
        (into / PLANS).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        _verify(draft, into / "draft", dtype)
        files = sorted(path for path in into.rglob("*") if path.is_file())
        digests = {path.relative_to(into).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        (into / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")

    write_atomic(directory, write)


def _verify(draft: Draft, directory: Path, dtype: torch.dtype) -> None:
    again = load_draft(directory)
    if again.config != draft.config:
        raise ValueError(f"the exported configuration must read back as it was, but got {again.config}")
    for name, tensor in draft.tensors.items():
        wanted = tensor if not tensor.is_floating_point() else tensor.to(dtype).float()
        if not torch.equal(again.tensors[name].cpu(), wanted.cpu()):
            raise ValueError(f"the exported draft must read back as it was, but {name} does not; is the disk sound?")
