"""Stages 2b and 2c: from scores to what is kept. Sees scores and costs; `calibrate` alone sees a model."""
