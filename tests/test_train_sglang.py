"""Learning from a server's traffic, with a server and a plugin that only look like it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
import tiny
import torch
from test_hot_swap import Fake

from specrl.agents.draft.learner import LearnerConfig
from specrl.commands.train_server import train_server
from specrl.io.output import OutputDir
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.ring import Ring
from specrl.sglang.plugin.wire import Frame
from specrl.training.server_learner import Follower, Source, follow

CONFIG = LearnerConfig(batch_size=2, passes=1, dtype="float32")


class Traffic:
    """Requests of eight tokens, one after the other, as the plugin tells of them."""

    def __init__(self, path: Path) -> None:
        self.ring = Ring(path, 64, lambda: (), Failsafe("traces", "nothing"))
        self._off = Event()
        Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._off.set()
        self.ring.close()

    def _serve(self) -> None:
        target = tiny.tiny_target().config
        generator = torch.Generator().manual_seed(0)
        number = 0
        while not self._off.wait(0.005):
            tokens = torch.randint(1, target.vocab_size, (9,), generator=generator)
            features = torch.randn(9, 3 * target.hidden_size, generator=generator)
            logits = torch.randn(9, target.vocab_size, generator=generator)
            rid, frames = f"r{number}", list[Frame]()
            frames.append(
                Frame(
                    {"kind": "prefill", "requests": [rid], "start": 0}, {"tokens": tokens[:4], "features": features[:4]}
                )
            )
            for at in range(4, 8):
                said = {"kind": "round", "requests": [rid], "plan": "1/1/2", "temperatures": [0.7]}
                rows = {
                    "tokens": tokens[None, at : at + 2],
                    "features": features[None, at : at + 2],
                    "logits": logits[None, at : at + 2],
                    "path": torch.tensor([[0, -1]]),
                    "positions": torch.tensor([at]),
                }
                frames.append(Frame({**said, "weight_version": "3"}, rows))
            frames.append(Frame({"kind": "finished", "requests": [rid]}, {}))
            number += 1
            for frame in frames:
                if self.ring.room():
                    self.ring.put(lambda frame=frame: frame)  # type: ignore[misc]


@pytest.fixture
def draft() -> Draft:
    return new_draft(tiny.tiny_target(), taps=tiny.TAPS, seed=3)


@pytest.fixture
def served(draft: Draft) -> Iterator[tuple[Fake, Traffic, Source]]:
    fake = Fake(draft, {}, device="cuda")  # where checksums cannot be compared, so that any weights may come
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        traffic = Traffic(Path(name) / "t")
        yield fake, traffic, Source(fake.url, Path(name) / "t")
        traffic.close()
    fake.server.shutdown()
    fake.server.server_close()


def test_it_learns_swaps_and_goes_on(draft: Draft, served: tuple[Fake, Traffic, Source], tmp_path: Path) -> None:
    fake, _, source = served
    target = tiny.tiny_target()
    lines: list[str] = []
    follower = Follower(target, draft, CONFIG, source, sync_every=2)
    follow(follower, OutputDir(tmp_path), requests=6, checkpoint_every=2, print_line=lines.append)
    versions = [int(said["weight_version"]) for path, said in fake.asked if path == "/update_weights_from_tensor"]
    assert versions[0] == 0 and versions == sorted(set(versions)) and follower.version == versions[-1] > 0
    assert follower.accept_length == 1.0 and "accept length 1.00" in lines[-2]
    assert {s.draft_version for s in follower.learner.replay} == {3}, "by the server's own name for it"
    learned = load_draft(tmp_path / "draft")
    assert not torch.equal(learned.tensors["fc.weight"], draft.tensors["fc.weight"])
    # A resumed run first has the server serve what was learnt, and goes on counting.
    fake.asked.clear()
    resumed = Follower(target, draft, CONFIG, source, sync_every=2, resume=tmp_path / "checkpoint")
    (update,) = [said for path, said in fake.asked if path == "/update_weights_from_tensor"]
    assert int(update["weight_version"]) == follower.version and resumed.requests == follower.requests
    assert all(torch.equal(t, learned.tensors[n]) for n, t in resumed.learner.weights()[1].items())
    resumed.close()


def test_a_server_that_goes_leaves_a_checkpoint_and_one_error(
    draft: Draft, served: tuple[Fake, Traffic, Source], tmp_path: Path
) -> None:
    fake, traffic, source = served
    follower = Follower(tiny.tiny_target(), draft, CONFIG, source, sync_every=2)

    def die(line: str) -> None:
        if "accept length" in line and follower.requests and not traffic._off.is_set():
            traffic.close()
            fake.server.shutdown()
            fake.server.server_close()

    with pytest.raises(OSError, match=r"is gone; start it again and go on with --resume|is the server up"):
        follow(follower, OutputDir(tmp_path), requests=10_000, checkpoint_every=9_999, every_s=0.2, print_line=die)
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["requests"] == follower.requests > 0


@pytest.mark.parametrize(("changes", "name"), [({"requests": 0}, "requests"), ({"checkpoint_interval": 0}, "interval")])
def test_numbers_out_of_range_are_named(changes: dict[str, int], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        train_server(server="", traces=tmp_path, draft=tmp_path, output_dir=tmp_path, **changes)  # type: ignore[arg-type]
