"""What of Python's standard library the tasks `stdlib` are made of."""

from __future__ import annotations

# Names of files and folders, as --exclude takes them: a model that is trained on the library's
# source is to leave them out, or it is asked for what it has read.
HELD_OUT = (
    "pydoc_data",  # the language reference, as text
    "calendar.py",
    "configparser.py",
    "mailbox.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
