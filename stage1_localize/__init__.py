"""Stage 1: text prompts and images in, a frozen store of region probability maps out."""
