"""SGLang's own model class reads what we export, and computes what we compute."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from specrl.core.plan import Plan
from specrl.export.bundle import Bundle, Provenance
from specrl.export.serving_flags import plan_serving
from specrl.models.attention import TokenSlots
from specrl.models.draft import Draft, ServingDraft, load_draft, new_draft
from specrl.models.target import Target
from specrl.sglang.plugin.policy import LearnedPolicy

LENGTH = 12
PLAN = Plan(3)


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor, batch: object, **rest: object) -> Tensor:
    """In place of SGLang's attention over its cache: one sequence, from its start."""
    query = q.view(1, -1, self.tp_q_head_num, self.head_dim).transpose(1, 2)
    key, value = (x.view(1, -1, self.tp_k_head_num, self.head_dim).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def of_sglang(directory: Path, embedding: Tensor, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits [T, Vd] of SGLang's class for an exported draft, and its vocabulary's target ids [Vd].

    Every weight must come from the file.
    """
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    config = ModelConfig(str(directory), dtype="float32", is_draft_model=True)
    bootstrap.init_layer_runtime(model_config=config)
    model = LlamaForCausalLMEagle3(config.hf_config).eval().float()
    for weight in model.parameters():
        weight.data.fill_(float("nan"))  # what the file does not set will show
    model.load_weights(load_file(directory / "model.safetensors").items())
    model.set_embed(torch.nn.Parameter(embedding))
    unset = [name for name, weight in model.named_parameters() if weight.isnan().all()]
    assert not unset, unset
    mode = types.SimpleNamespace(is_extend=lambda *_: True, is_draft_extend_v2=lambda *_: False)
    batch = types.SimpleNamespace(
        mm_input_embeds=None,
        forward_mode=mode,
        contains_mm_inputs=lambda: False,
        spec_info=types.SimpleNamespace(hidden_states=features),
    )
    with torch.no_grad():
        hidden, _ = model.model(tokens, torch.arange(len(tokens)), batch)
        return F.linear(hidden, model.lm_head.weight), model.hot_token_id


def of_ours(draft: Draft, target: Target, tokens: Tensor, features: Tensor) -> Tensor:
    serving = ServingDraft(draft, target)
    with torch.inference_mode():
        cache = serving.new_cache(1, LENGTH)
        fused = serving.fuse(features[None])
        hidden = serving.decode(tokens[None], fused, cache, TokenSlots(torch.arange(LENGTH)[None], LENGTH))
        return serving.logits(hidden[0])


@pytest.mark.parametrize("kept", [512, 256], ids=["full", "reduced"])
def test_logits_are_ours(
    kept: int, target: Target, tmp_path: Path, sglang_runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    monkeypatch.setattr(RadixAttention, "forward", causal)
    ids = torch.randperm(512, generator=torch.Generator().manual_seed(1))[:kept].sort().values
    fresh = new_draft(target, vocabulary=ids, intermediate_size=256)
    scaled = {n: t * 5.0 if t.ndim == 2 and "mid" in n else t for n, t in fresh.tensors.items()}
    norms = {n: torch.linspace(0.5, 1.5, len(t)) for n, t in fresh.tensors.items() if "norm" in n}
    table = {1: PLAN}
    source = Provenance("embedded", 0.0)
    bundle = Bundle(
        Draft(fresh.config, {**scaled, **norms}), LearnedPolicy(table, (PLAN,)), plan_serving(table), source, "/target"
    )
    bundle.write(tmp_path / "bundle")
    exported = load_draft(tmp_path / "bundle/draft")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (LENGTH,), generator=generator)
    features = torch.randn(LENGTH, 3 * 192, generator=generator)
    theirs, theirs_ids = of_sglang(tmp_path / "bundle/draft", target.embedding.clone(), tokens, features)
    ours = of_ours(exported, target, tokens, features)
    assert theirs_ids is None if kept == 512 else torch.equal(theirs_ids.cpu(), ids)  # type: ignore[union-attr]
    assert ours.shape == (LENGTH, kept) and ours.std() > 0.5
    torch.testing.assert_close(theirs[:, :kept], ours, atol=1e-4, rtol=0.0)
    print(f"largest difference of logits: {(theirs[:, :kept] - ours).abs().max():.1e}")
