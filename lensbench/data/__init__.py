"""Texts and images: read, split, tokenised, sampled."""
