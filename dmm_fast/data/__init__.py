"""Masks, frames, data sets and training clips."""
