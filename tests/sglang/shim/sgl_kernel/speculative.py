"""Imported by SGLang's n-gram worker, which these tests do not run."""


def reconstruct_indices_from_tree_mask(*args):  # type: ignore[no-untyped-def]
    raise NotImplementedError("n-gram drafts are not covered by these tests")
