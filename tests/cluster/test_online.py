"""Engines on two nodes feed one learner; it may be slow or die, and serving goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from small import LEARNER, small, small_draft, write_target

from specrl.agents.draft.learner import OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.cluster.connect import RayConfig
from specrl.cluster.learner import CHECKPOINT, LearnerActor, RemoteLearner, SentTraces, newest_weights
from specrl.cluster.online import RayOnlineTrainer
from specrl.core.round import Trace
from specrl.io.output import OutputDir
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("two_nodes")


def prefill(request: int) -> Trace:
    """A request of three tokens that ends with its prompt."""
    rows, generator = torch.arange(3), torch.Generator().manual_seed(request)
    return Trace(
        request_ids=torch.tensor([request]).numpy(),
        positions=torch.tensor([0]).numpy(),
        tokens=torch.tensor([[1, 2, 3]]),
        features=torch.randn(1, 3, 96, generator=generator),
        logits=torch.randn(1, 3, 10, generator=generator),
        parents=(rows - 1)[None],
        path=rows[None],
        draft_version=0,
        temperatures=(1.0,),
        finished=(request,),
    )


@ray.remote(num_cpus=0)
class Gate:
    """A learner that answers one call at a time, when it is let."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.open = False

    async def learn(self, engine: int, sent: SentTraces) -> tuple[int, list[Any], dict[str, float]]:
        import asyncio

        self.held.append(len(SentTraces(*sent).unpack()))
        while not self.open:
            await asyncio.sleep(0.01)
        return 0, [], {}

    async def let(self) -> list[int]:
        self.open = True
        return self.held


def test_requests_that_a_slow_learner_does_not_take_are_dropped_and_counted() -> None:
    gate = Gate.remote()
    remote = RemoteLearner(gate, 0, (0, {}), Assembler())
    for request in range(7):
        counts = remote.learn([prefill(request)])  # would never come back if it waited: the gate is shut
    assert (counts["pending"], counts["dropped"], counts["sent"]) == (2.0, 5.0, 0.0)
    ray.get(gate.let.remote())
    remote.poll(180.0)
    assert ray.get(gate.let.remote()) == [1, 1]
    assert remote.counts() == {"sent": 2.0, "dropped": 5.0, "lost": 0.0, "pending": 0.0}
    remote.learn([prefill(7)])
    remote.poll(180.0)
    assert remote.counts()["sent"] == 3.0


def test_requests_on_their_way_to_a_killed_learner_are_lost_and_counted() -> None:
    gate = Gate.remote()
    remote = RemoteLearner(gate, 0, (5, {"a": torch.ones(1)}), Assembler())
    remote.learn([prefill(0), prefill(1)])
    ray.kill(gate)
    remote.poll(180.0)
    assert remote.counts() == {"sent": 0.0, "dropped": 0.0, "lost": 2.0, "pending": 0.0}
    assert remote.weights()[0] == 5


def test_sequences_are_sent_as_bytes_without_a_change() -> None:
    (sequence,) = Assembler().add([prefill(0)])
    sent = SentTraces.pack([sequence])
    assert isinstance(sent.tensors, bytes) and isinstance(sent.notes, str)
    (back,) = ray.get(ray.put(sent)).unpack()
    for name in ("tokens", "features", "logits"):
        assert torch.equal(getattr(back, name), getattr(sequence, name))
    assert back.temperature == 1.0 and back.prompt_tokens == 3


def test_engines_on_both_nodes_feed_a_learner_that_is_killed_and_restarts(tmp_path: Path) -> None:
    target, out = write_target(tmp_path / "target"), OutputDir(tmp_path / "run")
    draft = small_draft(target)
    trainer = RayOnlineTrainer(RayConfig(engines=2), small(target), draft, out)
    lines: list[str] = []
    trainer.serve(160, print_line=lines.append)

    def learns_again() -> bool:
        """Whether the learner came back, and what it has learnt since serves."""
        try:
            restored = ray.get(trainer.learner.newest.remote()).metrics["restored"]
        except ray.exceptions.RayActorError:
            return False
        return bool(restored == 1.0 and max(int(str(row["draft_version"])) for row in trainer.rows) > before)

    before, kept = -1, 0
    while (answer := ray.get(trainer.learner.newest.remote()).version) != before:  # it may still learn what it was sent
        before, kept = answer, load_checkpoint(out.path / CHECKPOINT, "cluster").state["learner"]["updates"]
    assert kept == before > 0
    ray.kill(trainer.learner, no_restart=False)
    requests = 160
    while requests < 160 + 320 or not learns_again():  # begun while there is no learner
        trainer.serve(320, print_line=lines.append)
        requests += 320
        assert requests < 50_000
    trainer.serve(160, print_line=lines.append)
    found = trainer.finish()
    served: list[dict[str, Any]] = found["engines"]  # type: ignore[assignment]
    assert len({s["node"] for s in served}) == 2, "one engine on each node"
    assert sum(s["requests"] for s in served) >= requests + 160
    counts = [s["counts"] for s in served]
    assert found["learner"]["restored"] == 1.0  # type: ignore[index]
    assert found["draft_version"] > before  # type: ignore[operator]
    assert max(s["draft_version"] for s in served) > before, "weights of the new life serve"
    assert set(found["taken"]) == {0, 1}  # type: ignore[call-overload]
    # every second request opted out and never left its engine; each other one was answered for, dropped, lost, or
    # finished after its engine's last call
    known = sum(c["sent"] + c["dropped"] + c["lost"] for c in counts)
    assert -2 * 8 <= sum(s["requests"] for s in served) / 2 - known <= 2 * (8 + 8)
    assert all(c["pending"] == 0 for c in counts)
    learnt = load_draft(out.path / "draft")
    assert any(not torch.equal(learnt.tensors[n], t) for n, t in draft.tensors.items() if t.is_floating_point())
    assert (out.path / "plans.json").is_file() and len(lines) == len((out.path / "log.csv").read_text().split()) - 3


def test_a_learner_continues_from_its_checkpoint(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    first = small_draft(target)
    first.save(tmp_path / "first")

    def make() -> Any:
        actor = ray.remote(LearnerActor).options(num_cpus=0)
        return actor.remote(target, str(tmp_path / "first"), LEARNER, str(tmp_path), publish_every=4, seed=0)

    generator = torch.Generator().manual_seed(0)
    sequences = [
        TrainingSequence(
            torch.randint(1, 10, (12,), generator=generator),
            torch.randn(12, 96, generator=generator),
            torch.randn(12, 10, generator=generator),
            1.0,
            0,
        )
        for _ in range(16)
    ]
    one = make()
    answer = ray.get(one.learn.remote(0, SentTraces.pack(sequences)))
    ray.kill(one)
    two = make()
    again = ray.get(two.newest.remote())
    assert (again.version, again.metrics["restored"]) == (answer.version, 1.0) and answer.version == 8
    assert ray.get(two.taken.remote()) == {0: 16}
    own = OnlineLearner(first, load_target(target).embedding, LEARNER, seed=0)
    own.take_sequences(SentTraces.pack(sequences).unpack())
    own.learn([])
    _, sent = newest_weights(two)
    for name, tensor in own.weights()[1].items():
        assert torch.allclose(sent[name], tensor, atol=1e-6)
    ray.kill(two)
