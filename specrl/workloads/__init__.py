"""Where prompts come from: texts, JSON lines and mixtures of them."""
