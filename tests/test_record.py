"""Traces on disk: recorded by `specrl record`, read back, and used to train without an engine."""

import csv
import json
from dataclasses import fields
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
LEARN = "train offline traces --learner.ttt_steps 2 --learner.ema_decay 0.9 --learner.dtype float32"


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sequence(length: int, rejected: bool = False) -> TrainingSequence:
    generator = torch.Generator().manual_seed(length)
    drafts = RejectedDrafts(torch.tensor([2]), torch.tensor([7]), torch.randn(1, 9, generator=generator).half())
    return TrainingSequence(
        torch.randint(0, 9, (length,), generator=generator),
        torch.randn(length, 6, generator=generator),
        torch.randn(length, 9, generator=generator).half(),
        0.7,
        length,
        prompt_tokens=2,
        rejected=drafts if rejected else None,
    )


def assert_same(one: TrainingSequence, other: TrainingSequence) -> None:
    values, others = ([getattr(each, field.name) for field in fields(each)] for each in (one, other))
    torch.testing.assert_close(values, others, rtol=0, atol=0)


def test_pack_and_unpack_keep_every_field() -> None:
    sent = [sequence(5), sequence(3, rejected=True)]
    tensors, notes = pack(sent)
    for i, note in enumerate(json.loads(json.dumps(notes))):
        assert_same(unpack(i, tensors, note), sent[i])


def test_index_lists_only_complete_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = OutputDir("out")
    writer = ShardWriter(directory, {"target": "t"}, 2)
    writer.add([sequence(3), sequence(4), sequence(5)])

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("specrl.training.trace_files.save_tensors", disk_full)
        writer.close()
    traces = Traces(Path("out"))
    assert len(traces) == 2 and traces.about["target"] == "t"
    writer.close()
    for number, read in zip((2, 0, 1), Traces(Path("out")).read([2, 0, 1]), strict=True):
        assert_same(read, sequence(3 + number))
    with pytest.raises(ValueError, match="to a new directory"):
        ShardWriter(directory, {}, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "has none; 'specrl record'"),
        ("{", "must be JSON with 'shards'"),
        ("[]", "must be JSON with 'shards'"),
        ('{"format": 1}', "must be JSON with 'shards'"),
        ('{"format": 9, "shards": []}', "must have format 1"),
        ('{"format": 1, "shards": [{"file": "../x", "sequences": [{}]}]}', "in the folder of index.json"),
        ('{"format": 1, "shards": [{"file": "short.safetensors", "sequences": [{}]}]}', "short.* cannot be read"),
    ],
)
def test_directory_without_readable_traces_is_refused(index: str | None, message: str) -> None:
    Path("short.safetensors").write_bytes(b"short")
    if index is not None:
        Path(INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        list(Traces(Path()).read([0]))


def test_draft_learns_from_recorded_traces_without_an_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out accept length rises by half of the difference between 1.07 and 1.4, which three epochs reach."""
    text = "def function_{0}(value):\n    return value + {0}\n\n"
    lines = [json.dumps({"text": text.format(i) * 20, "learn": i % 4 > 0}) for i in range(8)]
    Path("own.jsonl").write_text("\n".join(lines))
    assert main(f"record {SHORT} --requests 16 --workload own.jsonl --output_dir own".split()) == 0
    assert 0 < len(Traces(Path("own"))) < 16, "requests with learn false are not recorded"
    assert main(f"record {SHORT} --requests 64 --shard_sequences 24 --output_dir traces".split()) == 0
    assert "64 requests" in capsys.readouterr().out
    assert [len(s["sequences"]) for s in json.loads(Path("traces", INDEX).read_text())["shards"]] == [24, 24, 16]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("specrl.decoding.engine.LocalEngine.start", fail)
    assert main(f"{LEARN} --epochs 2 --output_dir run".split()) == 0
    assert main(f"{LEARN} --epochs 3 --resume --output_dir run".split()) == 0
    rows = list(csv.DictReader(Path("run/log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert [int(row["updates"]) for row in rows] == [0, 15, 30, 45]  # 58 sequences in batches of 4
    lengths = [float(row["accept_length"]) for row in rows]
    assert lengths[0] < 1.2 and lengths[3] > lengths[0] + 0.15
    assert main(f"{LEARN} --epochs 1 --draft run/draft --output_dir more".split()) == 0
    first = next(csv.DictReader(Path("more/log.csv").read_text().splitlines()))
    assert float(first["accept_length"]) == pytest.approx(lengths[3], rel=1e-6)
    assert not torch.equal(load_draft("run/draft").tensors["fc.weight"], load_draft("more/draft").tensors["fc.weight"])

    for line, message in {
        f"{LEARN} --target embedded-easy": "traces must be of the draft's target",
        f"{LEARN} --epochs 0": "needs an epoch",
        f"{LEARN} --learner.rejected_weight 0.5": "--rejected",
        f"{LEARN} --resume --output_dir none": "--resume needs a checkpoint",
        f"{LEARN} --epochs 3 --resume --output_dir run": "--epochs must be above",
        f"{LEARN} --epochs 4 --seed 1 --resume --output_dir run": "must hold out the same sequences",
        f"{LEARN} --epochs 4 --learner.holdout_fraction 0.3 --resume --output_dir run": "must hold out the same",
        f"{LEARN} --draft.vocab_size 9": "draft.vocab_size",
        f"record {SHORT} --output_dir traces": "to a new directory",
        f"record {SHORT} --plan 3/1/4": "without --draft",
        f"record {SHORT} --requests 0": "must be at least 1",
    }.items():
        assert main(line.split()) == 2
        assert message in capsys.readouterr().err


def test_rejected_drafts_are_recorded_and_learned_from() -> None:
    served = "--serving.requests 8 --serving.batch_schedule 4"
    assert main(f"train {SIZES} {served} --output_dir run".split()) == 0
    line = f"record {SHORT} --requests 8 --draft run/draft --plan 3/1/4 --rejected --output_dir traces"
    assert main(line.split()) == 0
    traces = Traces(Path("traces"))
    assert traces.about["plan"] == "3/1/4"
    rejected = [each.rejected for each in traces.read(range(len(traces)))]
    assert sum(len(each.positions) for each in rejected if each is not None) > 8
    learn = "train offline traces --learner.ttt_steps 2 --learner.rejected_weight 0.5 --output_dir again"
    assert main(learn.split()) == 0
