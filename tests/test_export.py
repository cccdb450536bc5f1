"""Exports for SGLang: plans, flags, model card and manifest; and imports of published drafts."""

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
from specrl.export.serving_flags import plan_serving
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


def write(directory: Path, table: dict[int, Plan], draft: Draft | None = None) -> Path:
    policy = LearnedPolicy(table, tuple(dict.fromkeys(table.values())))
    source = Provenance("embedded", 0.0)
    Bundle(draft or new(), policy, plan_serving(table), source, "/models/target").write(directory)
    return directory


def test_chains_become_an_adaptive_config_with_one_candidate_per_tier(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", CHAINS)
    steps = {
        bound: tier["candidate_steps"] for bound, tier in json.loads((bundle / "adaptive.json").read_text()).items()
    }
    assert steps == {"1": [3], "4": [1], "16": [0]}
    flags = dict(line.split(": ") for line in (bundle / "serve.yaml").read_text().splitlines())
    assert flags["speculative-num-steps"] == "3" and flags["speculative-num-draft-tokens"] == "4"
    assert flags["speculative-adaptive"] == "true" and flags["model-path"] == '"/models/target"'
    assert (bundle / "launch.sh").stat().st_mode & 0o111
    assert LearnedPolicy.load(bundle / "policy").chooser().plans == (Plan(3), Plan(1), Plan(0))


def test_rejection_sampling_is_used_for_sampled_chains() -> None:
    flag = "speculative-use-rejection-sampling"
    for plan, sampled, used in ((Plan(2), True, True), (Plan(2), False, False), (TREE, True, False)):
        flags = plan_serving({1: plan}).flags("m", rejection_sampling=sampled)
        assert (flag in flags) == used, "SGLang refuses it for trees"


def test_more_candidates_are_the_fastest_chains_and_the_learned_one_stays() -> None:
    serving = plan_serving({1: Plan(1), 4: Plan(1)}, SPEEDS, candidates=2)
    assert serving.tiers == {1: (1, 3), 4: (0, 1)}


def test_a_tree_serves_alone_and_its_loss_is_reported() -> None:
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
    for options, rule in (
        ({"lookahead": "adaptive"}, "to replace a tree by a chain"),
        ({"candidates": 0}, "candidates"),
    ):
        with pytest.raises(ValueError, match=rule):
            plan_serving(table, **options)


def test_no_draft_is_served_if_plan_0_is_always_best(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", {1: Plan(0), 4: Plan(0)})
    assert (bundle / "serve.yaml").read_text() == 'model-path: "/models/target"\n'
    assert "without speculation" in (bundle / "README.md").read_text()


def test_a_bundle_is_checked_against_its_manifest(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", CHAINS)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(check_bundle(bundle)) == files
    assert not any("embed" in name for name in load_file(bundle / "draft/model.safetensors"))
    assert push_to_hub(bundle, "me/draft", dry_run=True) == check_bundle(bundle)
    with pytest.raises(ValueError, match="push_to_hub must be"):
        push_to_hub(bundle, "draft", dry_run=True)
    (bundle / "adaptive.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adaptive\.json"):
        push_to_hub(bundle, "me/draft", dry_run=True)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        check_bundle(tmp_path)


def test_an_export_that_does_not_read_back_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = new()
    before = check_bundle(write(tmp_path / "b", CHAINS, good))
    damaged = Draft(good.config, {**good.tensors, "fc.weight": good.tensors["fc.weight"] + 1e-6})
    monkeypatch.setattr("specrl.export.bundle.load_draft", lambda path: damaged)
    with pytest.raises(ValueError, match=r"fc\.weight"):
        write(tmp_path / "b", CHAINS, good)
    assert check_bundle(tmp_path / "b") == before and list(tmp_path.iterdir()) == [tmp_path / "b"]


def export(directory: Path, plans: str, config: str, *options: str, **files: str) -> int:
    """Run `specrl export` on a run with these files; the result is in directory/bundle."""
    run = directory / "run"
    new().save(run / "draft")
    for name, text in {"plans.json": plans, "config.yaml": config, **files}.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    return main(["export", "--run", str(run), "--output_dir", str(directory), *options])


def test_the_card_shows_the_runs_measurements_with_their_intervals(tmp_path: Path) -> None:
    header = "batch_size,plan,speedup,low,high,accept_length\n"
    rows = "1,plain,,,,1.0\n1,3/1/4,1.5123,1.4,1.6,2.345\n1,plain (A/A),1.001,0.99,1.01,1.0\n"
    files = {"measured.csv": header + rows, "environment.json": '{"cpu": "A CPU of Tests", "gpus": []}'}
    config = "target: {name: some/model}\nworkload: {temperature: 0.0}\n"
    assert export(tmp_path, '{"plans": {"1": "3/1/4"}, "requests": 77}', config, **files) == 0
    card = (tmp_path / "bundle/README.md").read_text()
    assert "| 1 | 3/1/4 | 1.5123 | 1.4 to 1.6 | 2.345 |" in card and "A/A" not in card
    assert "some/model" in card and "77 requests" in card and "A CPU of Tests" in card


def test_the_exported_chooser_goes_on_learning(tmp_path: Path) -> None:
    plans = (Plan(0), Plan(1), Plan(3))
    chooser = AdaptiveChooser(plans)
    for plan in plans * 5:
        chooser.costs.learn(4, plan, 1.0 + plan.num_steps)
    config = "serving: {plans: '0,1/1/2,3/1/4'}\nworkload: {temperature: 0.0}\n"
    files = {"checkpoint/state.json": json.dumps({"chooser": chooser.state_dict()})}
    options = ("--candidates", "2")
    assert export(tmp_path, '{"plans": {"4": "0"}}', config, *options, **files) == 0, "no plan drafts: no tiers"
    again = LearnedPolicy.load(tmp_path / "bundle/policy").chooser()
    assert isinstance(again, AdaptiveChooser)
    assert [e.seconds for e in again.estimates(4)] == [e.seconds for e in chooser.estimates(4)]
    assert export(tmp_path, '{"plans": {"4": "1/1/2"}}', config, *options, **files) == 0
    assert json.loads((tmp_path / "bundle/adaptive.json").read_text()) == {"4": {"candidate_steps": [0, 1]}}


def test_a_run_of_an_older_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, '{"plans": {"4": "0"}}', "target: embedded\nplans: 0\n") == 2
    assert "older version" in capsys.readouterr().err


def test_a_policy_file_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold policy.json"):
        LearnedPolicy.load(tmp_path)
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "plans": ["0"], "table": {"1": "3"}, "chooser": null}'):
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ValueError, match="must be a policy that this version wrote"):
            LearnedPolicy.load(tmp_path)


# Published drafts.


def publish(directory: Path, draft: Draft, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    draft.save(directory)
    content = {**json.loads((directory / "config.json").read_text()), **config}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def reduced() -> Draft:
    return with_vocabulary(new(), (1, 2, 4, 5, 8))


def same(a: Draft, b: Draft) -> bool:
    return a.config == b.config and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_the_other_layout_is_read_and_every_difference_is_reported(tmp_path: Path) -> None:
    draft = reduced()
    draft.save(tmp_path / "ours")
    again, notes = import_draft(tmp_path / "ours")
    assert same(draft, again) and notes == []
    renamed = {
        n.replace("midlayer.", "model.layers.0."): t.bfloat16() for n, t in draft.tensors.items() if "2" not in n
    }
    ids = draft.target_ids
    assert ids is not None
    extra = {"embed_tokens.weight": tiny_target().embedding, "d2t": ids.to(torch.int32), "t2d": draft.tensors["t2d"]}
    eagle = {"use_aux_hidden_state": True}
    changes = {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": None, "target_hidden_size": None}
    published = publish(tmp_path / "d", draft, {**changes, "eagle_config": eagle}, {**renamed, **extra})
    with pytest.raises(ValueError, match="num_layers"):
        import_draft(published)
    again, notes = import_draft(published, num_layers=9)
    assert again.config.aux_layers == (2, 4, 6) and again.config.draft_vocab_size == 5
    for name, tensor in draft.tensors.items():
        assert torch.equal(again.tensors[name], tensor.bfloat16().float() if tensor.is_floating_point() else tensor)
    for word in ("Eagle3LlamaForCausalLM", "embed_tokens.weight", "renamed", "d2t holds ids", "draft_vocab_size"):
        assert sum(word in note for note in notes) == 1, (word, notes)
    assert any("bfloat16" in note for note in notes) and any("aux layers are not named" in note for note in notes)


def test_a_missing_map_is_computed_and_a_contradiction_refused(tmp_path: Path) -> None:
    draft = reduced()
    tensors = {n: t for n, t in draft.tensors.items() if n != "d2t"}
    again, notes = import_draft(publish(tmp_path / "d", draft, {}, tensors))
    assert same(draft, again) and notes == ["d2t is missing: computed from t2d"]
    del tensors["t2d"]
    for name, maps in {"both": {**tensors, **draft.tensors, "d2t": draft.tensors["d2t"] + 1}, "none": tensors}.items():
        with pytest.raises(ValueError, match="d2t"):
            import_draft(publish(tmp_path / name, draft, {}, maps))


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture must be one of"),
        ({"norm_before_residual": True}, "norm_before_residual must be false"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1"),
    ],
)
def test_another_architecture_is_refused(config: dict[str, Any], rule: str, tmp_path: Path) -> None:
    draft = reduced()
    with pytest.raises(ValueError, match=rule):
        import_draft(publish(tmp_path / "d", draft, config, dict(draft.tensors)))


def test_the_import_command_prints_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = new()
    publish(tmp_path / "d", draft, {}, {n: t.bfloat16() for n, t in draft.tensors.items()})
    assert main(["import", "--draft", str(tmp_path / "d"), "--output_dir", str(tmp_path)]) == 0
    assert "note: weights are bfloat16" in capsys.readouterr().out
    assert load_draft(tmp_path / "draft").config == draft.config
