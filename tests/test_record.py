"""Traces on disk: recorded as a user records them, read back, and learnt from without an engine."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specrl.agents.draft.sequences import RejectedDrafts, TrainingSequence
from specrl.cli import main
from specrl.io.output import OutputDir
from specrl.models.draft import load_draft
from specrl.training.trace_files import INDEX, ShardWriter, Traces, pack, unpack

SIZES = "--workload.max_new_tokens 16 --workload.prompt_tokens 24"
SHORT = f"{SIZES} --batch_size 8"


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sequence(length: int, rejected: bool = False) -> TrainingSequence:
    generator = torch.Generator().manual_seed(length)
    fallen = RejectedDrafts(torch.tensor([2]), torch.tensor([7]), torch.randn(1, 9, generator=generator).half())
    return TrainingSequence(
        torch.randint(0, 9, (length,), generator=generator),
        torch.randn(length, 6, generator=generator),
        torch.randn(length, 9, generator=generator).half(),
        0.7,
        length,
        prompt_tokens=2,
        rejected=fallen if rejected else None,
    )


def assert_same(one: TrainingSequence, other: TrainingSequence) -> None:
    for name in TrainingSequence.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        elif isinstance(a, RejectedDrafts):
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("positions", "tokens", "logits"))
        else:
            assert a == b, name


def test_sequences_come_back_as_they_went() -> None:
    sent = [sequence(5), sequence(3, rejected=True)]
    tensors, notes = pack(sent)
    for i, note in enumerate(json.loads(json.dumps(notes))):
        assert_same(unpack(i, tensors, note), sent[i])


def test_the_index_names_whole_shards_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = OutputDir("out")
    writer = ShardWriter(directory, {"target": "t"}, 2)
    writer.add([sequence(3), sequence(4), sequence(5)])
    assert len(Traces(Path("out"))) == 2, "the third waits for its shard"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("specrl.training.trace_files.save_tensors", full)
        with pytest.raises(OSError, match="No space"):
            writer.close()
    traces = Traces(Path("out"))
    assert len(traces) == 2 and traces.about["target"] == "t"
    writer.close()
    for number, found in zip((2, 0, 1), Traces(Path("out")).read([2, 0, 1]), strict=True):
        assert_same(found, sequence(3 + number))
    with pytest.raises(ValueError, match="to a new directory"):
        ShardWriter(directory, {}, 2)


def test_what_is_no_record_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="has none; 'specrl record'"):
        Traces(Path())
    writer = ShardWriter(OutputDir("out"), {}, 1)
    writer.add([sequence(3)])
    Path("out/shard-00000.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="shard-00000.safetensors cannot be read"):
        list(Traces(Path("out")).read([0]))
    for text in ("{", "[]", '{"format": 1}', '{"format": 9, "shards": []}'):
        Path("out", INDEX).write_text(text)
        with pytest.raises(ValueError, match="must be JSON with 'shards'|must have format 1"):
            Traces(Path("out"))
    outside = [{"file": "../x", "sequences": [{}]}]
    Path("out", INDEX).write_text(json.dumps({"format": 1, "shards": outside}))
    with pytest.raises(ValueError, match="in the folder of index.json"):
        Traces(Path("out"))


def test_a_draft_learns_from_a_record_without_serving(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out accept length rises by half of what separates 1.07 from the 1.4 that three epochs reach."""
    Path("own.jsonl").write_text(
        "\n".join(
            json.dumps({"text": f"def function_{i}(value):\n    return value + {i}\n\n" * 20, "learn": i % 4 > 0})
            for i in range(8)
        )
    )
    own = f"record {SHORT} --requests 16 --workload own.jsonl --output_dir own"
    assert main(own.split()) == 0
    assert 0 < len(Traces(Path("own"))) < 16, "some opted out"
    assert main(f"record {SHORT} --requests 64 --shard_sequences 24 --output_dir traces".split()) == 0
    assert "64 requests" in capsys.readouterr().out
    assert [len(s["sequences"]) for s in json.loads(Path("traces", INDEX).read_text())["shards"]] == [24, 24, 16]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("specrl.decoding.engine.LocalEngine.start", never)
    learn = "train offline traces --learner.ttt_steps 2 --learner.ema_decay 0.9 --learner.dtype float32"
    assert main(f"{learn} --epochs 2 --output_dir run".split()) == 0
    assert main(f"{learn} --epochs 3 --resume --output_dir run".split()) == 0
    rows = list(csv.DictReader(Path("run/log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [int(row["updates"]) for row in rows] == [0, 15, 30, 45]  # 58 sequences in batches of 4
    lengths = [float(row["accept_length"]) for row in rows]
    assert lengths[0] < 1.2 and lengths[3] > lengths[0] + 0.15
    assert main(f"{learn} --epochs 1 --draft run/draft --output_dir more".split()) == 0
    first = next(csv.DictReader(Path("more/log.csv").read_text().splitlines()))
    assert float(first["accept_length"]) == pytest.approx(lengths[3], rel=1e-6)
    assert not torch.equal(load_draft("run/draft").tensors["fc.weight"], load_draft("more/draft").tensors["fc.weight"])

    for line, message in {
        f"{learn} --target embedded-easy": "traces must be of the draft's target",
        f"{learn} --epochs 0": "needs an epoch",
        f"{learn} --learner.rejected_weight 0.5": "--rejected",
        f"{learn} --resume --output_dir none": "--resume needs a checkpoint",
        f"{learn} --epochs 3 --resume --output_dir run": "--epochs must be above",
        f"{learn} --epochs 4 --seed 1 --resume --output_dir run": "must hold out the same sequences",
        f"{learn} --epochs 4 --learner.holdout_fraction 0.3 --resume --output_dir run": "must hold out the same",
        f"{learn} --draft.vocab_size 9": "draft.vocab_size",
        "train offline .": "has none; 'specrl record'",
        f"record {SHORT} --output_dir traces": "to a new directory",
        f"record {SHORT} --plan 3/1/4": "needs a draft",
        f"record {SHORT} --requests 0": "must be at least 1",
    }.items():
        assert main(line.split()) == 2
        assert message in capsys.readouterr().err


def test_rejected_drafts_are_recorded_where_asked_for() -> None:
    served = "--serving.requests 8 --serving.batch_schedule 4"
    assert main(f"train {SIZES} {served} --output_dir run".split()) == 0
    line = f"record {SHORT} --requests 8 --draft run/draft --plan 3/1/4 --rejected --output_dir traces"
    assert main(line.split()) == 0
    traces = Traces(Path("traces"))
    assert traces.about["plan"] == "3/1/4"
    rejected = [found.rejected for found in traces.read(range(len(traces)))]
    assert sum(len(each.positions) for each in rejected if each is not None) > 8
    learn = "train offline traces --learner.ttt_steps 2 --learner.rejected_weight 0.5 --output_dir again"
    assert main(learn.split()) == 0
