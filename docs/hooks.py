"""Shows the roles that docstrings use, such as ``:class:`~lightning.pytorch.Trainer```, as code: `Trainer`."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    html = ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
    return html.replace("::</p>", ":</p>")
