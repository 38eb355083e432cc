"""Captions for your own pictures, written by a multimodal model."""
