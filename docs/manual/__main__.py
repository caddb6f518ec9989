"""Write the generated files, and delete the files of commands that no longer exist: `python -m docs.manual`."""

from __future__ import annotations

from docs.manual.generated import ROOT, generate, stale


def main() -> None:
    """Update the generated files that are out of date, and delete those that are no longer needed."""
    wanted = generate()
    for path in map(type(ROOT), stale()):
        text = wanted.get(path)
        if text is None:
            (ROOT / path).unlink()
        else:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text)
        print(f"{'removed' if text is None else 'written'}: {path}")  # noqa: T201 - a script for developers


main()
