"""`specrl export`: what a run learned, in the form in which it serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.core.plan import Plan, parse_plans
from specrl.export.bundle import PLANS, Bundle, read_plans
from specrl.export.card import Provenance
from specrl.export.hub import push_to_hub as push
from specrl.export.serving_flags import Lookahead, Speeds, plan_serving
from specrl.io.output import OutputDir, show
from specrl.models.draft import load_draft
from specrl.models.embedded import target_directory
from specrl.models.hub import hub_id
from specrl.models.target import as_dtype
from specrl.sglang.plugin.policy import LearnedPolicy

_QUICKSTART = {"target": "embedded", "temperature": "0.7"}  # what `specrl quickstart` serves


def export(
    *,
    run: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    target: str | None = None,
    lookahead: Lookahead = "auto",
    candidates: int = 1,
    push_to_hub: str | None = None,
    dry_run: bool = False,
    output_dir: Path | None = None,
) -> Path:
    """Write what a run learned as one directory that SGLang serves.

    The directory `bundle` in output_dir holds draft/ (an EAGLE3 checkpoint with SGLang's names; nothing of the
    target's is in it), adaptive.json (the lookahead per batch size, in SGLang's format), policy/ (the chooser, for the
    plugin), serve.yaml and launch.sh (the flags), README.md (a model card with what was measured), plans.json and
    manifest.json (SHA-256 of every file). It is read back and compared before it appears, and appears whole or not.

    SGLang changes num_steps while it serves, but no tree's shape: where a tree was learned for some batch size, one
    plan serves all, the best of them, and the card says what that gives up.

    Args:
        run: output directory of `specrl train` or `specrl quickstart`.
        dtype: of the exported weights.
        target: checkpoint directory or Hugging Face id that SGLang shall serve; by default the run's.
        lookahead: 'adaptive' for the best chain per batch size, 'single' for one plan; 'auto': the latter if need be.
        candidates: lookaheads per batch size among which SGLang's own rule may choose; 1 pins what was learned.
        push_to_hub: 'owner/name' of a private repository on the Hugging Face Hub to upload the bundle to.
        dry_run: only say what would be uploaded.
        output_dir: where bundle/ goes; by default runs/export-<time>.

    Raises:
        ValueError: the run holds no draft or no plans, or what was written does not read back.

    Example:
        specrl export --run runs/day0 --output_dir exported
        specrl export --run runs/day0 --lookahead adaptive --candidates 2
        specrl export --run runs/day0 --push_to_hub me/my-draft --dry_run
    """
    table, draft = read_plans(run / PLANS), load_draft(run / "draft")
    said = {**_QUICKSTART, **_options(run)}
    chooser = _chooser(run, said.get("plans"))
    speeds = None if chooser is None else _speeds(chooser, table)
    source = Provenance.of(run, target=target or said["target"], temperature=float(said["temperature"]))
    plans = chooser.plans if chooser is not None else tuple(dict.fromkeys(table.values()))
    bundle = Bundle(
        draft,
        LearnedPolicy(table, plans, None if chooser is None else chooser.state_dict()),
        plan_serving(table, speeds, lookahead=lookahead, candidates=candidates),
        source,
        source.target if hub_id(source.target) else str(target_directory(source.target).resolve()),
        as_dtype(dtype),
    )
    directory = OutputDir(output_dir or Path("runs/export")).path / "bundle"
    bundle.write(directory)
    show(f"written: {directory} (plans: " + ", ".join(f"batch {b}: {p}" for b, p in sorted(table.items())) + ")")
    if push_to_hub is not None:
        files = push(directory, push_to_hub, dry_run=dry_run)
        show(f"{'would upload' if dry_run else 'uploaded'} to {push_to_hub}: {', '.join(files)}")
    return directory


def _options(run: Path) -> dict[str, str]:
    """The options of the run at the top of its config.yaml that are plain values."""
    path = run / "config.yaml"
    return dict(re.findall(r"^(\w+): (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)) if path.is_file() else {}


def _chooser(run: Path, plans: str | None) -> AdaptiveChooser | None:
    """Our chooser as the run's checkpoint left it; None: it had none, or has no checkpoint."""
    path = run / "checkpoint" / "state.json"
    if plans is None or not path.is_file():
        return None
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))["chooser"]
        if "survival" not in state:  # a table
            return None
        chooser = AdaptiveChooser(parse_plans(plans))
        chooser.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must be a checkpoint that this version wrote, but got {error!r}") from error
    return chooser


def _speeds(chooser: AdaptiveChooser, table: dict[int, Plan]) -> Speeds:
    """Tokens per second and request of every plan that was tried, by batch size."""
    return {batch: {e.plan: e.speed for e in chooser.estimates(batch) if e.tried >= 2.0} for batch in table}
