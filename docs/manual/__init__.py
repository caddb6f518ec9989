"""The man pages and the completions of shells, made from the parser of `--help`.

`python -m docs.manual` writes them; they are kept with the source, so that building a wheel needs neither the package
nor shtab, and tests/test_manual.py says when they are old.
"""
