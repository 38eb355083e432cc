"""Metrics of a model on the renderer's words and on public benchmarks."""
