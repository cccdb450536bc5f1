"""An export holds all that serves, says what it gives up, reads back, and published drafts come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import AUX_LAYERS, tiny_target, with_vocabulary
from torch import Tensor

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.cli import main
from specrl.core.plan import Plan
from specrl.export.bundle import Bundle, Provenance, check_bundle, push_to_hub
from specrl.export.published import import_draft
from specrl.export.serving_flags import Serving, plan_serving
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.sglang.plugin.policy import LearnedPolicy

CHAINS = {1: Plan(3), 4: Plan(1), 16: Plan(0)}
TREE = Plan(3, 2, 6)
SPEEDS = {
    1: {Plan(0): 100.0, Plan(1): 120.0, Plan(3): 150.0, TREE: 180.0},
    4: {Plan(0): 100.0, Plan(1): 110.0, Plan(3): 90.0, TREE: 88.0},
}


def new() -> Draft:
    return new_draft(tiny_target(), intermediate_size=32, aux_layers=AUX_LAYERS)


def bundle(draft: Draft, serving: Serving, table: dict[int, Plan], temperature: float = 0.0) -> Bundle:
    policy = LearnedPolicy(table, tuple(dict.fromkeys(table.values())))
    return Bundle(draft, policy, serving, Provenance("embedded", temperature), "/models/target")


def test_chains_become_an_adaptive_config_with_one_candidate_a_tier(tmp_path: Path) -> None:
    serving = plan_serving(CHAINS)
    assert serving.adaptive_config() == {
        "1": {"candidate_steps": [3]},
        "4": {"candidate_steps": [1]},
        "16": {"candidate_steps": [0]},
    }
    bundle(new(), serving, CHAINS).write(tmp_path / "b")
    assert json.loads((tmp_path / "b/adaptive.json").read_text()) == serving.adaptive_config()
    flags = dict(line.split(": ") for line in (tmp_path / "b/serve.yaml").read_text().splitlines())
    assert flags["speculative-num-steps"] == "3" and flags["speculative-num-draft-tokens"] == "4"
    assert flags["speculative-adaptive"] == "true" and flags["model-path"] == '"/models/target"'
    assert (tmp_path / "b/launch.sh").stat().st_mode & 0o111
    assert LearnedPolicy.load(tmp_path / "b/policy").chooser().plans == (Plan(3), Plan(1), Plan(0))


def test_rejection_sampling_is_asked_for_where_chains_were_learned_with_sampling() -> None:
    chain, tree = plan_serving({1: Plan(2)}), plan_serving({1: TREE})
    flag = "speculative-use-rejection-sampling"
    assert flag in chain.flags("m", rejection_sampling=True) and flag not in chain.flags("m")
    assert flag not in tree.flags("m", rejection_sampling=True), "SGLang refuses it for trees"


def test_more_candidates_are_the_fastest_chains_and_the_learned_one_stays() -> None:
    serving = plan_serving({1: Plan(1), 4: Plan(1)}, SPEEDS, candidates=2)
    assert serving.tiers == {1: (1, 3), 4: (0, 1)}


def test_a_tree_serves_alone_and_what_that_gives_up_is_said() -> None:
    table = {1: TREE, 4: Plan(1)}
    serving = plan_serving(table, SPEEDS)
    assert serving.tiers is None
    # log(180) + log(88) > log(120) + log(110) > log(150) + log(90)
    assert serving.plan == TREE
    assert serving.costs == {1: 0.0, 4: pytest.approx(1 - 88 / 110)}
    chains = plan_serving(table, SPEEDS, lookahead="adaptive")
    assert chains.tiers == {1: (3,), 4: (1,)} and chains.costs == {1: pytest.approx(1 - 150 / 180), 4: 0.0}
    unknown = plan_serving(table)
    assert unknown.plan == TREE and unknown.costs == {1: 0.0, 4: None}
    with pytest.raises(ValueError, match="a tree must give way to a chain, but it does not"):
        plan_serving(table, lookahead="adaptive")


def test_where_nothing_pays_no_draft_is_served(tmp_path: Path) -> None:
    serving = plan_serving({1: Plan(0), 4: Plan(0)})
    bundle(new(), serving, {1: Plan(0), 4: Plan(0)}).write(tmp_path / "b")
    assert (tmp_path / "b/serve.yaml").read_text() == 'model-path: "/models/target"\n'
    assert "without speculation" in (tmp_path / "b/README.md").read_text()


def test_the_bundle_is_what_its_manifest_says(tmp_path: Path) -> None:
    written = tmp_path / "b"
    bundle(new(), plan_serving(CHAINS), CHAINS).write(written)
    files = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert set(check_bundle(written)) == files
    assert not any("embed" in name for name in load_file(written / "draft/model.safetensors"))
    assert push_to_hub(written, "me/draft", dry_run=True) == check_bundle(written)
    with pytest.raises(ValueError, match="'owner/name', but got 'draft'"):
        push_to_hub(written, "draft", dry_run=True)
    (written / "adaptive.json").write_text("{}")
    with pytest.raises(ValueError, match="'adaptive.json' does not"):
        push_to_hub(written, "me/draft", dry_run=True)
    with pytest.raises(ValueError, match="must hold manifest.json"):
        check_bundle(tmp_path)


def test_an_export_that_does_not_read_back_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bundle(new(), plan_serving(CHAINS), CHAINS)
    good.write(tmp_path / "b")
    before = check_bundle(tmp_path / "b")
    damaged = Draft(good.draft.config, {**good.draft.tensors, "fc.weight": good.draft.tensors["fc.weight"] + 1e-6})
    monkeypatch.setattr("specrl.export.bundle.load_draft", lambda path: damaged)
    with pytest.raises(ValueError, match="must read back as it was, but fc.weight does not"):
        good.write(tmp_path / "b")
    assert check_bundle(tmp_path / "b") == before and list(tmp_path.iterdir()) == [tmp_path / "b"]


def run_directory(path: Path, **files: str) -> Path:
    new().save(path / "draft")
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_the_card_shows_the_runs_measurements_with_their_intervals(tmp_path: Path) -> None:
    header = "batch_size,plan,speedup,low,high,accept_length\n"
    rows = "1,plain,,,,1.0\n1,3/1/4,1.5123,1.4,1.6,2.345\n1,plain (A/A),1.001,0.99,1.01,1.0\n"
    run = run_directory(
        tmp_path / "run",
        plans__json='{"plans": {"1": "3/1/4"}, "requests": 77}',
        measured__csv=header + rows,
        environment__json='{"cpu": "A CPU of Tests", "gpus": []}',
        config__yaml="target: {name: some/model}\nworkload: {temperature: 0.0}\n",
    )
    assert main(["export", "--run", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/bundle/README.md").read_text()
    assert "| 1 | 3/1/4 | 1.5123 | 1.4 to 1.6 | 2.345 |" in card and "A/A" not in card
    assert "some/model" in card and "77 requests" in card and "A CPU of Tests" in card


def test_the_chooser_goes_along_and_goes_on(tmp_path: Path) -> None:
    plans = (Plan(0), Plan(1), Plan(3))
    chooser = AdaptiveChooser(plans)
    for batch, plan, seconds in [(4, plan, 1.0 + plan.num_steps) for plan in plans for _ in range(5)]:
        chooser.costs.learn(batch, plan, seconds)
    run = run_directory(
        tmp_path / "run",
        plans__json='{"plans": {"4": "0"}}',
        config__yaml="serving: {plans: '0,1/1/2,3/1/4'}\nworkload: {temperature: 0.0}\n",
    )
    (run / "checkpoint").mkdir()
    (run / "checkpoint/state.json").write_text(json.dumps({"chooser": chooser.state_dict()}))
    words = ["export", "--run", str(run), "--output_dir", str(tmp_path), "--candidates", "2"]
    assert main(words) == 0  # all plans are 0: nothing to adapt
    again = LearnedPolicy.load(tmp_path / "bundle/policy").chooser()
    assert isinstance(again, AdaptiveChooser)
    assert [e.seconds for e in again.estimates(4)] == [e.seconds for e in chooser.estimates(4)]
    (run / "plans.json").write_text('{"plans": {"4": "1/1/2"}}')
    assert main(words) == 0
    assert json.loads((tmp_path / "bundle/adaptive.json").read_text()) == {"4": {"candidate_steps": [0, 1]}}


def test_a_run_of_an_older_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_directory(
        tmp_path / "run", plans__json='{"plans": {"4": "0"}}', config__yaml="target: embedded\nplans: 0\n"
    )
    assert main(["export", str(run), "--output_dir", str(tmp_path)]) == 2
    assert "older version" in capsys.readouterr().err


def test_a_policy_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold policy.json"):
        LearnedPolicy.load(tmp_path)
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "plans": ["0"], "table": {"1": "3"}, "chooser": null}'):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ValueError, match="must be a policy that this version wrote"):
            LearnedPolicy.load(tmp_path)


# Published drafts.


def publish(directory: Path, draft: Draft, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    draft.save(directory)
    said = json.loads((directory / "config.json").read_text())
    said = {key: value for key, value in {**said, **config}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(said))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def reduced() -> Draft:
    return with_vocabulary(new(), (1, 2, 4, 5, 8))


def same(a: Draft, b: Draft) -> bool:
    return a.config == b.config and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_our_own_layout_comes_in_without_a_note(tmp_path: Path) -> None:
    draft = reduced()
    draft.save(tmp_path / "d")
    again, notes = import_draft(tmp_path / "d")
    assert same(draft, again) and notes == []


def test_the_other_layout_comes_in_and_every_oddity_is_reported(tmp_path: Path) -> None:
    draft = reduced()
    renamed = {
        n.replace("midlayer.", "model.layers.0."): t.bfloat16() for n, t in draft.tensors.items() if "2" not in n
    }
    ids = draft.target_ids
    assert ids is not None
    extra = {"embed_tokens.weight": tiny_target().embedding, "d2t": ids.to(torch.int32), "t2d": draft.tensors["t2d"]}
    eagle = {"use_aux_hidden_state": True}
    changes = {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": None, "target_hidden_size": None}
    published = publish(tmp_path / "d", draft, {**changes, "eagle_config": eagle}, {**renamed, **extra})
    with pytest.raises(ValueError, match="say how many layers its target has"):
        import_draft(published)
    again, notes = import_draft(published, num_layers=9)
    assert again.config.aux_layers == (2, 4, 6) and again.config.draft_vocab_size == 5
    for name, tensor in draft.tensors.items():
        assert torch.equal(again.tensors[name], tensor.bfloat16().float() if tensor.is_floating_point() else tensor)
    for word in ("Eagle3LlamaForCausalLM", "embed_tokens.weight", "renamed", "d2t holds ids", "draft_vocab_size"):
        assert sum(word in note for note in notes) == 1, (word, notes)
    assert any("bfloat16" in note for note in notes) and any("aux layers are not named" in note for note in notes)


def test_a_missing_map_is_worked_out_and_a_contradiction_refused(tmp_path: Path) -> None:
    draft = reduced()
    tensors = {n: t for n, t in draft.tensors.items() if n != "d2t"}
    again, notes = import_draft(publish(tmp_path / "d", draft, {}, tensors))
    assert same(draft, again) and notes == ["d2t is missing: worked out from t2d"]
    wrong = {**draft.tensors, "d2t": draft.tensors["d2t"] + 1}
    with pytest.raises(ValueError, match="must say the same"):
        import_draft(publish(tmp_path / "e", draft, {}, wrong))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture must be one of"),
        ({"norm_before_residual": True}, "norm_before_residual must be false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1"),
    ],
)
def test_what_computes_something_else_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    draft = reduced()
    with pytest.raises(ValueError, match=message):
        import_draft(publish(tmp_path / "d", draft, config, dict(draft.tensors)))


def test_the_command_says_what_was_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = new()
    publish(tmp_path / "d", draft, {}, {n: t.bfloat16() for n, t in draft.tensors.items()})
    assert main(["import", "--draft", str(tmp_path / "d"), "--output_dir", str(tmp_path)]) == 0
    assert "note: weights are bfloat16" in capsys.readouterr().out
    assert load_draft(tmp_path / "draft").config == draft.config
