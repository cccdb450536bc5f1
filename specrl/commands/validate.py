"""`specrl validate`: does a record of `specrl evaluate` hold? Its choices are repeated and its claim is tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from specrl.core.batch_schedule import parse_traffic
from specrl.core.statistics import Interval
from specrl.evaluation.backends import Simulated, live_source
from specrl.evaluation.records import Record, check_claim, digest, read_record
from specrl.evaluation.scores import agree, speedup_interval
from specrl.evaluation.simulation import Replayed
from specrl.io.output import OutputDir, progress, show
from specrl.simulation.profile import Shift, profile_from_json

_WIDEST = 2.0  # upper over lower end of a claim


def validate(record: Path, *, output_dir: Path | None = None) -> None:
    """Repeat what a record says was chosen, and test what it claims.

    A simulated record is played again: every round's tokens and the speedup must be the same. A live one is decoded
    again on this machine, in turns with plain decoding: the greedy continuations of the first prompts must be those of
    the record, with drafts and without, and the claimed speedup must agree with the one measured now, by both
    intervals, at odds of one in a hundred that an honest record of this machine fails.

    Args:
        record: record-<source>-<chooser>.json, its .npz beside it.
        output_dir: where validate.json goes; by default runs/validate-<time>.

    Raises:
        ValueError: it does not hold, and what of it.

    Example:
        specrl validate runs/evaluate-20261121-094406-1/record-live-adaptive.json
    """
    found = read_record(record)
    if found.claimed.high > _WIDEST * found.claimed.low:
        raise ValueError(
            f"a claim must be narrow enough to be tested, within a factor of {_WIDEST:g}, but it is "
            f"{found.claimed.low:.3g} to {found.claimed.high:.3g}; evaluate longer or with more seeds"
        )
    again = _simulated(found) if found.kind == "simulated" else _live(found)
    if output_dir is not None:
        OutputDir(output_dir).write_json("validate.json", {"record": record, "claimed": found.claimed, "again": again})
    show(f"{record} holds: {found.chooser} on {found.source} claims a speedup of {found.claimed}; again: {again}")


def _simulated(record: Record) -> Interval:
    config = record.config
    shifts = [Shift(int(at), cost, int(steps), odds) for at, cost, steps, odds in config["shifts"]]
    rounds = record.choices.shape[1]
    source = Simulated(profile_from_json(config["profile"]), parse_traffic(config["traffic"]), rounds, shifts)
    if source.plans != record.plans:
        raise ValueError("plans must be those of the record's profile at its batch sizes, but the record has others")
    scores = []
    with progress("replaying", len(record.seeds)) as bar:
        for seed, choices in zip(record.seeds, record.choices.tolist(), strict=True):
            scores.append(source.score(Replayed(record.plans, choices), seed))
            bar(len(scores))
    if digest([s.tokens.tolist() for s in scores]) != record.tokens_sha256:
        raise ValueError("the replayed rounds must yield the recorded tokens, but they yield others")
    again = speedup_interval(np.concatenate([s.speedups for s in scores]))
    check_claim(record.claimed, again, "the replay")
    return again


def _live(record: Record) -> Interval:
    config = dict(record.config)
    phases, cycles = parse_traffic(config.pop("traffic")), config.pop("cycles")
    source = live_source(record.plans, phases, cycles, **config)
    if record.choices.shape[1] != source.cycle_rounds * cycles:
        raise ValueError("choices must cover the cycles of the record's traffic, but they do not")
    chosen = [record.plans[i] for i in record.choices[0].tolist()]
    for how, plans in (("plainly", []), ("with the recorded plans", chosen)):
        if source.greedy_sha256(plans, record.seeds[0]) != record.tokens_sha256:
            raise ValueError(f"greedy tokens decoded {how} must be the recorded ones, but they are others")
    with progress("replaying", len(record.seeds) * cycles) as bar:
        again = speedup_interval(source.replay(record, lambda done: bar(done)))
    if not agree(record.claimed, again):
        raise ValueError(
            f"the claimed speedup must agree with a repeated measurement, but {record.claimed} is claimed "
            f"and {again} was measured; repeat it on the machine of the record, with nothing else running"
        )
    return again
