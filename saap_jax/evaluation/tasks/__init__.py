"""Tasks: multiple choice from local files, and those of lm-evaluation-harness, scored by one core.

`likelihood` is the core: log-likelihoods of continuations of tokens. `encode` makes tokens of text, `local` reads
items from JSON lines and scores them, `results` says what came out. `harness` and `names` of harness tasks need the
package lm-eval and are imported only when they are asked for.
"""
