"""Training and studies on a Ray cluster."""
