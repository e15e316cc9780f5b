"""The pages of the documentation and the code that they show."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def python_blocks(page: pathlib.Path) -> list[str]:
    """The Python code that a Markdown page shows, block by block."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def shown(example: str) -> list[str]:
    """What a page says that an example prints."""
    blocks = [block.strip().splitlines() for page in DOCS.glob("*.md") for block in page.read_text().split("```")[1::2]]
    return blocks[blocks.index([f"python -m examples.{example}"]) + 1]


def without_numbers(lines: list[str]) -> list[str]:
    return [re.sub(r"[0-9][0-9.]*(e[-+][0-9]+)?", "#", line) for line in lines]
