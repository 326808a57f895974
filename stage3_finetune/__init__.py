"""Stage 3: an encoder and labels in, a model and its scores on a test part that is touched once."""
