"""What SGLang 0.5.23 calls of its kernels' CPU build, in plain torch: for tests, where only the answers count.

Covers dense Llama and Qwen targets with EAGLE drafts (chains and trees) under SGLANG_USE_CPU_ENGINE=1. Everything else
is missing on purpose, `convert_weight_packed` above all: without it SGLang's layers take their own torch paths.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_QLEN_ONLY = 1  # TreeMaskMode: the mask [B, n, n] among the drafts alone, flattened


def assign_req_to_token_pool_cpu(requests, table, start, end, slots, width):  # type: ignore[no-untyped-def]
    """Write each request's new cache slots into its row of the table, from start to end."""
    sizes = (end - start).tolist()
    for request, first, part in zip(requests.tolist(), start.tolist(), slots[: sum(sizes)].split(sizes), strict=True):
        table[request, first : first + len(part)] = part.to(table.dtype)


def assign_extend_cache_locs_cpu(requests, table, start, end, slots, width):  # type: ignore[no-untyped-def]
    """Read them back, one request after the other."""
    rows = [table[r, s:e] for r, s, e in zip(requests.tolist(), start.tolist(), end.tolist(), strict=True)]
    found = torch.cat(rows)
    slots[: len(found)] = found.to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, slots, width, topk, steps):  # type: ignore[no-untyped-def]
    """The slots after each request's committed ones, topk * steps of them."""
    rows = [table[r, at : at + topk * steps] for r, at in zip(requests.tolist(), lengths.tolist(), strict=True)]
    slots.copy_(torch.cat(rows).to(slots.dtype))


def build_draft_decode_metadata_cpu(table, requests, lengths, topk, steps, width):  # type: ignore[no-untyped-def]
    """One row of cache slots for every branch: what is committed, then the branch's own."""
    out = torch.zeros((len(requests) * topk, width), dtype=table.dtype)
    for index, (request, at) in enumerate(zip(requests.tolist(), lengths.tolist(), strict=True)):
        branches = table[request, at : at + topk * steps].view(topk, steps)
        out[index * topk : (index + 1) * topk, :at] = table[request, :at]
        out[index * topk : (index + 1) * topk, at : at + steps] = branches
    return out


def fill_bonus_tokens_cpu(accepted, lengths, bonus, stride):  # type: ignore[no-untyped-def]
    """The last accepted token of each request."""
    last = torch.arange(len(lengths)) * stride + lengths.long() - 1
    bonus.copy_(accepted.flatten()[last])


def fill_accept_out_cache_loc_cpu(accept_index, slots, accepted_slots, size=None):  # type: ignore[no-untyped-def]
    """The cache slots of accepted rows, those without one left out."""
    rows = accept_index[accept_index >= 0].long()
    accepted_slots[: len(rows)] = slots[rows]


def copy_all_layer_kv_cache_cpu(pointers, strides, to, source):  # type: ignore[no-untyped-def]
    """Move rows of every layer's cache; all are read before any is written."""
    for base, size in zip(pointers.tolist(), strides.tolist(), strict=True):
        held = [ctypes.string_at(base + row * size, size) for row in source.tolist()]
        for row, data in zip(to.tolist(), held, strict=True):
            ctypes.memmove(base + row * size, data, size)


def build_tree_kernel_efficient_cpu(  # type: ignore[no-untyped-def]
    parents, selected, lengths, mask, positions, index, next_token, next_sibling, topk, depth, n, mode
):
    """The tree of the selected drafts: its mask, positions, and links to first children and next siblings.

    Row 0 is the committed token, row i > 0 the draft `selected[b, i - 1]`; the draft numbered s came from the entry
    s // topk of `parents`, and s < topk from the committed token itself.
    """
    assert mode == _QLEN_ONLY, mode
    places, tree_masks = positions.view(-1, n), mask.view(-1)[: len(lengths) * n * n].view(-1, n, n)
    for b, length in enumerate(lengths.tolist()):
        row_of = {draft: row for row, draft in enumerate(selected[b].tolist(), start=1)}
        sees = torch.eye(n, dtype=torch.bool)
        children: list[list[int]] = [[] for _ in range(n)]
        for draft, row in row_of.items():
            parent = 0 if draft < topk else row_of[int(parents[b, draft // topk])]
            sees[row] |= sees[parent]
            children[parent].append(row)
        places[b] = length + sees.sum(1) - 1
        tree_masks[b] = sees
        index[b] = torch.arange(b * n, (b + 1) * n)
        for row, found in enumerate(children):
            for link, child in zip([(next_token, row), *((next_sibling, c) for c in found)], found, strict=False):
                link[0][b, link[1]] = child


def verify_tree_greedy_cpu(  # type: ignore[no-untyped-def]
    *, predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    target_predict,
):  # fmt: skip
    """Walk down from each committed token while the target's own choice is among the drafts."""
    batch, n = candidates.shape
    choices = target_predict.reshape(batch, n).tolist()
    tokens, child, sibling = (x.tolist() for x in (candidates, retrive_next_token, retrive_next_sibling))
    for b in range(batch):
        path, found = [0], 0
        while found >= 0 and len(path) <= accept_index.shape[1]:
            row = path[-1]
            predicts[b * n + row] = choices[b][row]
            found = child[b][row] if len(path) < accept_index.shape[1] else -1
            while found >= 0 and tokens[b][found] != choices[b][row]:
                found = sibling[b][found]
            if found >= 0:
                path.append(found)
        accept_index[b, : len(path)] = torch.tensor(path) + b * n
        accept_token_num[b] = len(path) - 1


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """query [q, heads, D], keys and values [t, KV heads, D], mask [q, t] -> [q, heads, D]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [heads, q, t]
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1)


def _decode_attention(  # type: ignore[no-untyped-def]
    query, k_cache, v_cache, k_scale, v_scale, out, key, value, slots, scratch, table, requests, lengths, scale, cap,
    cross, window, encoder_lengths, sinks,
):  # fmt: skip
    assert not cross and sinks is None and window <= 0
    if key is not None:
        k_cache[slots.long()] = key.view(-1, *k_cache.shape[1:]).to(k_cache.dtype)
        v_cache[slots.long()] = value.view(-1, *v_cache.shape[1:]).to(v_cache.dtype)
    for row, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist(), strict=True)):
        at = table[request, :length].long()
        whole = torch.ones((1, length), dtype=torch.bool)
        out[row : row + 1] = _attend(query[row : row + 1], k_cache[at], v_cache[at], whole, scale, cap).to(out.dtype)


def _extend_attention(  # type: ignore[no-untyped-def]
    query, key, value, out, k_cache, v_cache, k_scale, v_scale, table, requests, lengths, new, starts, longest, scale,
    cap, cross, window, encoder_lengths, sinks, tree_mask=None, is_causal=True,
):  # fmt: skip
    assert not cross and sinks is None and window <= 0 and is_causal
    used = 0
    for request, length, count, start in zip(*(x.tolist() for x in (requests, lengths, new, starts)), strict=True):
        mask = torch.ones((count, length), dtype=torch.bool)
        if tree_mask is None:
            mask = mask.tril(length - count)
        elif count:
            mask[:, length - count :] = tree_mask.flatten()[used : used + count**2].view(count, count)
            used += count**2
        if count:
            at, rows = table[request, :length].long(), slice(start, start + count)
            out[rows] = _attend(query[rows], k_cache[at], v_cache[at], mask, scale, cap).to(out.dtype)


torch.ops.sgl_kernel.decode_attention_cpu = _decode_attention
torch.ops.sgl_kernel.extend_attention_cpu = _extend_attention
