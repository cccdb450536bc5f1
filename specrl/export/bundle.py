"""A directory that serves: the draft as SGLang reads it, the lookahead, the policy, and how to launch it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from specrl.core.plan import Plan
from specrl.export.card import Provenance, model_card
from specrl.export.serving_flags import ADAPTIVE, Serving, write_serving
from specrl.models.checkpoint import write_atomic
from specrl.models.draft import Draft, load_draft
from specrl.sglang.plugin.policy import LearnedPolicy

PLANS, MANIFEST, CARD = "plans.json", "manifest.json", "README.md"


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is exported.

    Args:
        draft: the learned draft.
        policy: the plans that go with it.
        serving: how SGLang serves them.
        source: where it comes from.
        model_path: of the target, for SGLang.
        dtype: that the draft's weights are written in.
    """

    draft: Draft
    policy: LearnedPolicy
    serving: Serving
    source: Provenance
    model_path: str
    dtype: torch.dtype = torch.float32

    def write(self, directory: Path) -> None:
        """Write it whole or not at all, after reading all of it back.

        Raises:
            ValueError: something read back differs from what was written.
        """
        write_atomic(directory, self._write)

    def _write(self, into: Path) -> None:
        table = self.policy.table
        self.draft.save(into / "draft", self.dtype)
        plans = {"plans": {str(batch): str(plan) for batch, plan in sorted(table.items())}}
        (into / PLANS).write_text(json.dumps(plans, indent=2) + "\n", encoding="utf-8")
        (into / "policy").mkdir()
        self.policy.save(into / "policy")
        sampled = self.source.temperature > 0
        write_serving(self.serving, self.serving.flags(self.model_path, rejection_sampling=sampled), into)
        card = model_card(self.draft.config, table, self.serving, self.source)
        (into / CARD).write_text(card, encoding="utf-8")
        digests = {path.relative_to(into).as_posix(): _digest(path) for path in _files(into)}
        (into / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
        self._verify(into)

    def _verify(self, directory: Path) -> None:
        again = load_draft(directory / "draft")
        if again.config != self.draft.config:
            raise ValueError(f"the exported configuration must read back as it was, but got {again.config}")
        for name, tensor in self.draft.tensors.items():
            wanted = tensor if not tensor.is_floating_point() else tensor.to(self.dtype).float()
            if not torch.equal(again.tensors[name].cpu(), wanted.cpu()):
                raise ValueError(
                    f"the exported draft must read back as it was, but {name} does not; is the disk sound?"
                )
        policy = LearnedPolicy.load(directory / "policy")
        if dict(policy.table) != dict(self.policy.table) or policy.state != _plain(self.policy.state):
            raise ValueError("the exported policy must read back as it was, but it does not; is the disk sound?")
        config = self.serving.adaptive_config()
        if config is not None and json.loads((directory / ADAPTIVE).read_text(encoding="utf-8")) != config:
            raise ValueError(f"{ADAPTIVE} must read back as it was written, but it does not; is the disk sound?")
        check_bundle(directory)


def _plain(state: object) -> object:
    return json.loads(json.dumps(state))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_bundle(directory: Path) -> list[str]:
    """The files of a bundle, after comparing every one with manifest.json.

    Raises:
        ValueError: no manifest, or a file that is missing, changed or not in it.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"a bundle must hold {MANIFEST}, but {str(directory)!r} does not; export it again")
    said = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    found = {path.relative_to(directory).as_posix(): _digest(path) for path in _files(directory)}
    wrong = sorted(name for name in {*said, *found} if said.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"a bundle must be as {MANIFEST} says, but {wrong[0]!r} is not; export it again")
    return [*sorted(found), MANIFEST]


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
