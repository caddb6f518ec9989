"""Generate the man pages and the shell completions from the argument parser.

`python -m docs.manual` writes the files. They are checked in, so that building a wheel needs neither the package nor
shtab. tests/test_manual.py fails when they are out of date.
"""
