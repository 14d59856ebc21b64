"""HTTP over a bundle and its indexes: findings, similar cases, embeddings, and a page to look at them.

`create_app(Settings(bundle=...))` makes the ASGI application; `medclip-lab serve` runs it.
"""

from medclip_lab.serving.app import create_app
from medclip_lab.serving.settings import Settings

__all__ = ["Settings", "create_app"]
