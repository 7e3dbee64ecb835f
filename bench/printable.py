"""Text from elsewhere on a terminal. Imports nothing."""


def printable(text: str) -> str:
    """Return the text with every character replaced that a terminal would obey or could not show, but for newlines."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def printable_line(text: str) -> str:
    """Return the same on one line."""
    return printable(text.replace("\n", " "))
