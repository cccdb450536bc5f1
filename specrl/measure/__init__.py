"""Paired measurement of speculative against plain decoding."""
