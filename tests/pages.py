"""The pages of the documentation and the code that they show."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def python_blocks(page: pathlib.Path) -> list[str]:
    """The Python code that a Markdown page shows, block by block."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
