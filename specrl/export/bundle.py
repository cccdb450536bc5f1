"""A directory that SGLang serves: the draft, its plans, the policy, the flags, a model card and a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template

from specrl.core.checks import require
from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving, write_serving
from specrl.io.output import OutputDir
from specrl.models.checkpoint import write_atomic
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft, load_draft
from specrl.sglang.plugin.policy import LearnedPolicy

PLANS, MANIFEST, CARD = "plans.json", "manifest.json", "README.md"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The run that an export comes from."""

    target: str  # its name
    temperature: float  # of the requests
    requests: int | None = None  # number of requests that were learned from; None: unknown
    measured: tuple[Mapping[str, str], ...] = ()  # rows with batch_size, plan, speedup, low, high and accept_length
    environment: Mapping[str, Any] = field(default_factory=dict)  # of the run, as in environment.json
    config: str = ""  # of the run, YAML


def model_card(config: DraftArchitecture, table: Mapping[int, Plan], serving: Serving, source: Provenance) -> str:
    """Return README.md as a Hugging Face model card, from the template model_card.md."""
    tiers = serving.tiers or {}
    served = {b: " or ".join(str(Plan(steps)) for steps in tiers[b]) if tiers else str(serving.plan) for b in table}
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    template = Template(text, trim_blocks=True, keep_trailing_newline=True)
    return template.render(config=config, table=table, serving=serving, source=source, served=served)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The contents of an export."""

    draft: Draft
    policy: LearnedPolicy
    serving: Serving  # how SGLang serves the policy's plans
    source: Provenance
    model_path: str  # of the target, for SGLang
    dtype: torch.dtype = torch.float32  # of the draft's weights on disk

    def write(self, directory: Path) -> None:
        """Write the directory atomically; raise a ValueError if the draft or the policy does not read back."""
        write_atomic(directory, self._write)

    def _write(self, into: Path) -> None:
        table, output = self.policy.table, OutputDir(into)
        self.draft.save(into / "draft", self.dtype)
        output.write_json(PLANS, {"plans": dict(sorted(table.items()))})
        (into / "policy").mkdir()
        self.policy.save(into / "policy")
        sampled = self.source.temperature > 0
        write_serving(self.serving, self.serving.flags(self.model_path, rejection_sampling=sampled), output)
        output.write_text(CARD, model_card(self.draft.config, table, self.serving, self.source))
        output.write_json(MANIFEST, {"sha256": _digests(into)})
        self._read_back(into)

    def _read_back(self, directory: Path) -> None:
        draft, policy = load_draft(directory / "draft"), LearnedPolicy.load(directory / "policy")
        expected = {n: t.to(self.dtype).float() if t.is_floating_point() else t for n, t in self.draft.tensors.items()}
        wrong = [name for name, t in expected.items() if not torch.equal(draft.tensors[name].cpu(), t.cpu())]
        if draft.config != self.draft.config:
            wrong.append("the draft's config.json")
        if dict(policy.table) != dict(self.policy.table) or policy.state != json.loads(json.dumps(self.policy.state)):
            wrong.append("the policy")
        if wrong:
            raise ValueError(f"an export must read back unchanged, but {wrong[0]} does not; check the disk")


def _digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_bundle(directory: Path) -> list[str]:
    """Return the files of a bundle; a ValueError if one is missing, changed or not in manifest.json."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"a bundle must hold {MANIFEST}, but {str(directory)!r} does not; export it again")
    expected, actual = json.loads(manifest.read_text(encoding="utf-8"))["sha256"], _digests(directory)
    wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if wrong:
        raise ValueError(f"a bundle must agree with {MANIFEST}, but {wrong[0]!r} does not; export it again")
    return [*actual, MANIFEST]


def push_to_hub(directory: Path, repository: str, *, dry_run: bool) -> list[str]:
    """Upload a bundle to a private repository of the Hugging Face Hub, after checking it against its manifest.

    It needs a login (`hf auth login`), but not for a dry run. It returns the files that were uploaded, or with
    `dry_run` would be. A repository that is not 'owner/name', or a damaged bundle, is a ValueError.
    """
    require(bool(re.fullmatch(r"[\w.-]+/[\w.-]+", repository)), "push_to_hub", "'owner/name'", repository)
    files = check_bundle(directory)
    if not dry_run:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Draft and plans learned by specrl")
    return files


def read_plans(path: Path) -> dict[int, Plan]:
    """Return the plans (lower bound of the batch size -> plan) of a run's plans.json; a ValueError without them."""
    if not path.exists():
        raise ValueError(f"a run must hold {path.name}, but {str(path.parent)!r} does not; name a finished run")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["plans"]
        return {int(batch): Plan.parse(plan) for batch, plan in table.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} must be JSON with 'plans' by batch size, but it is not ({error!r})") from error
