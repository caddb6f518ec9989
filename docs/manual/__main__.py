"""`python -m docs.manual`: writes what is generated, and removes the files of commands that are gone."""

from __future__ import annotations

from docs.manual.generated import ROOT, generate, stale


def main() -> None:
    """Write what is stale, and nothing else."""
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
