"""Wanda's score, the ends protected, then least squares."""

AUTHOR = "saap_jax"
METHOD = "wanda > within(protect=(0.13, -0.07)) > uniform > least_squares"
