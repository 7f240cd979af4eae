"""Training of aligned spaces: heads over a frozen model, and whole open_clip models."""
