"""Stage 2, pretrain: images and a frozen region store -> encoder."""
