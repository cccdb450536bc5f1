"""The client of a running SGLang server: requests, plans, traces and weight updates."""
