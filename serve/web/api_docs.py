"""The page `/docs`: Swagger UI from an installed package, so that nothing comes from elsewhere."""

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, HTTPException
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""Files of the package, with their media types."""


def add_docs(api: FastAPI) -> None:
    """Adds the page and its files. Its scripts may be those files and the one in the page, known
    by its hash; addresses are relative, for applications below a route prefix."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="valle",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="ui/icon.svg",
    )
    html = bytes(page.body).decode()
    policy = (
        f"default-src 'none'; script-src 'self' {_script_hashes(html)}; connect-src 'self'; "
        # Swagger UI sets styles from its script and draws with inline images
        "style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    folder = resources.files("fastapi_offline") / "static"

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """The documentation of the interface."""
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @api.get("/docs/{name}", include_in_schema=False)
    async def docs_asset(name: str) -> FileResponse:
        """A file of Swagger UI."""
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        return FileResponse(str(folder / name), media_type=ASSETS[name])


def _script_hashes(html: str) -> str:
    """The inline scripts of a page as sources of a content security policy."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
