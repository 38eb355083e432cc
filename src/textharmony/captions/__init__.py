"""Captions for pictures of one's own, written by a multimodal model."""
