"""`python -m docs.generator`: writes docs/reference and the diagrams from the code. `make reference` calls it."""

from __future__ import annotations

from pathlib import Path

from docs.generator.pages import pages

DOCS = Path(__file__).resolve().parents[1]


def main() -> None:
    for name, text in pages().items():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
