"""Print the dependencies of pyproject.toml (and of the extras named as arguments), one per line.

Lets an image install them in a layer of their own, before the source is copied in.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
lines = list(project["dependencies"])
for extra in sys.argv[1:]:
    lines += project["optional-dependencies"][extra]
print("\n".join(lines))
