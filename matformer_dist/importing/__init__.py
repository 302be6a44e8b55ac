"""Dense models of others as universal models, to be trained on."""
