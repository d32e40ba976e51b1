"""This process, the others of its job, files, devices: no model, no method."""
