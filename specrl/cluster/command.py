"""What `specrl train --ray`, `specrl study --ray` and `specrl rl --ray` do besides what they do without."""

from __future__ import annotations

from specrl.cluster.connect import connected
from specrl.cluster.learner import CHECKPOINT
from specrl.cluster.online import Fleet
from specrl.cluster.serving import Serving
from specrl.io.output import OutputDir, show
from specrl.models.draft import Draft


def train_over_ray(
    address: str,
    doing: Serving,
    first: Draft,
    out: OutputDir,
    *,
    requests: int,
    engines: int,
    engine_device: str,
    learner_device: str,
    resume: bool,
) -> None:
    """Serve `requests` on the cluster's engines while its learner learns, and write what it learned.

    Raises:
        ValueError: a learner is there and nobody asked to go on, or none is and somebody did; or no such cluster.
    """
    there = (out.path / CHECKPOINT).exists()
    if there != resume:
        state = "holds a learner's checkpoint" if there else "holds none"
        remedy = "add --resume to go on, or take another output_dir" if there else "leave --resume out"
        raise ValueError(f"--resume is for a run on Ray that is there, but {str(out.path)!r} {state}; {remedy}")
    with connected(address):
        fleet = Fleet(doing, first, out, engines=engines, engine_device=engine_device, learner_device=learner_device)
        fleet.serve(requests)
        found = fleet.finish()
    show(f"draft {found['draft_version']} learned from {found['taken']} requests by engine", f"written: {out.path}")
