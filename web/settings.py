"""Settings of the web application: where the backend is, and how Streamlit is told to behave."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

DEFAULT_BACKEND_URL = "http://127.0.0.1:8080"

# Streamlit keeps an upload in memory until the script has passed it on, so the page's own limit
# is the backend's.
UPLOAD_LIMIT_MB = 50

# Source Sans and Source Code come with Streamlit; Chinese is left to the system's fonts.
_SANS = (
    "'Source Sans', system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Hiragino Sans GB', "
    "'Microsoft YaHei', 'Noto Sans SC', 'Noto Sans CJK SC', 'Source Han Sans SC', sans-serif"
)
_MONO = (
    "'Source Code', ui-monospace, 'SF Mono', 'Cascadia Code', 'JetBrains Mono', Menlo, Consolas, "
    "'Noto Sans Mono CJK SC', 'DejaVu Sans Mono', monospace"
)
# One palette for both themes; the charts take their colours from the same list.
SERIES_COLOURS = ["#4263eb", "#12b886", "#f59f00", "#e64980", "#7950f2", "#15aabf"]

_LIGHT = {
    "primaryColor": "#3b5bdb",
    "backgroundColor": "#ffffff",
    "secondaryBackgroundColor": "#f3f5f9",
    "textColor": "#1c2333",
    "linkColor": "#3b5bdb",
    "borderColor": "#dde2ec",
    "codeBackgroundColor": "#f3f5f9",
    "codeTextColor": "#1c2333",
}
_DARK = {
    "primaryColor": "#5c7cfa",
    "backgroundColor": "#12151c",
    "secondaryBackgroundColor": "#1b202b",
    "textColor": "#e6e9f0",
    "linkColor": "#91a7ff",
    "borderColor": "#2d3443",
    "codeBackgroundColor": "#1b202b",
    "codeTextColor": "#e6e9f0",
}


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """What a running web application needs to know.

    `backend_url` is where this process reaches the backend; `api_base_url` is what a student
    writes into an `openai` client, which differs when a proxy stands in front.
    """

    backend_url: str = DEFAULT_BACKEND_URL
    api_base_url: str = DEFAULT_BACKEND_URL + "/v1"

    @classmethod
    def from_environment(cls) -> WebSettings:
        backend = os.environ.get("LECTERN_BACKEND_URL", DEFAULT_BACKEND_URL).rstrip("/")
        return cls(
            backend_url=backend,
            api_base_url=os.environ.get("LECTERN_API_BASE_URL", f"{backend}/v1").rstrip("/"),
        )


def streamlit_options(host: str, port: int) -> dict[str, Any]:
    """Options given to Streamlit at start, keyed as its configuration names them."""
    options: dict[str, Any] = {
        "global.developmentMode": False,
        "server.address": host,
        "server.port": port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.enableXsrfProtection": True,
        "server.xsrfCookieSameSite": "lax",
        "server.enableCORS": True,
        "server.enableStaticServing": False,
        "server.enableAgentApi": False,
        "server.maxUploadSize": UPLOAD_LIMIT_MB,
        "server.trustedUserHeaders": {"x-lectern-identity": "identity"},
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "minimal",
        "client.disableDataExport": False,
        "logger.hideWelcomeMessage": True,
        "logger.level": "warning",
        "theme.font": _SANS,
        "theme.headingFont": _SANS,
        "theme.codeFont": _MONO,
        "theme.baseRadius": "0.6rem",
        "theme.buttonRadius": "0.5rem",
        "theme.showWidgetBorder": True,
        "theme.showSidebarBorder": True,
        "theme.linkUnderline": False,
        "theme.headingFontSizes": ["1.75rem", "1.4rem", "1.15rem", "1rem", "1rem", "1rem"],
        "theme.headingFontWeights": [700, 600, 600, 600, 600, 600],
        "theme.metricValueFontSize": "1.7rem",
        "theme.chartCategoricalColors": SERIES_COLOURS,
    }
    for name, palette in (("light", _LIGHT), ("dark", _DARK)):
        options.update({f"theme.{name}.{key}": value for key, value in palette.items()})
        options[f"theme.{name}.sidebar.backgroundColor"] = palette["secondaryBackgroundColor"]
        options[f"theme.{name}.sidebar.secondaryBackgroundColor"] = palette["backgroundColor"]
    return options
