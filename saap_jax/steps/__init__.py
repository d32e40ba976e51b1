"""Methods as chains of steps: `chain` reads them, `run` runs them, `base` says what a step is.

wanda > uniform > least_squares
"""
