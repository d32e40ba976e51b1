"""How important is each unit? Statistics from one calibration pass, formulas on top."""
