"""Every figure, drawn by matplotlib: curves, maps, ranks, couplings."""
