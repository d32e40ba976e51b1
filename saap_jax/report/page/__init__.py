"""What a report is made of, and one renderer of it each for HTML, Markdown, terminal and CSV."""
