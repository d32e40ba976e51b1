"""A model that has never heard of this library, traced: gates by interpretation of its program.

`problem` what is pruned, its losses, the cut model · `observe` the calibration pass · `compensation` least squares ·
`saved` the cut model as a directory · `subject` all of it as a `Subject` · `pruned` all of the method as one call.
"""
