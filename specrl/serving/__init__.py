"""SGLang servers from outside: what is asked of one that runs."""
