"""Every figure, drawn once by matplotlib, in a style for the screen and one for papers."""
