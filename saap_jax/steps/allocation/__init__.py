"""How a budget is shared: `allocation` is what all have in common, `blocks` the solver, `allocations` the ways."""
