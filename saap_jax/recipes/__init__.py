"""Published methods by name, and ours as `default`: named chains of steps with their sources and deviations.

`registry` has all of them by name. A new one is an entry of a file here, a file that exports `RECIPES`, or a call of
`registry.register` in a CONFIG.py.
"""
