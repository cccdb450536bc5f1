"""`specrl report`: runs on one HTML page."""
