"""How a budget is shared, a file an allocation; `search` is the solver of all of them."""
