"""Text: sources, windows of tokens cut from them, and scenarios, which are named calibration sets."""
