"""What a report is made of, and a renderer each for HTML, Markdown and CSV; that for a terminal is `cli.blocks`."""
