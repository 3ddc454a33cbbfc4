"""Where a teacher is, and the key that it takes: checked before a run begins."""

import os
import re
from urllib.parse import urlsplit

import httpx2

from common.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
KEY_NAME = "OPENAI_API_KEY"


def checked_url(url: str) -> str:
    """The URL without a slash at its end. Raises UserError if it is none, or holds more than an address."""
    try:
        parts = urlsplit(url)
        httpx2.URL(url)
        host = parts.hostname or ""
        host.encode("idna")  # a label that is empty, or longer than 63 characters
        valid = parts.scheme in ("http", "https") and host and parts.port != 0 and not re.search(r"\s", host)
    except (ValueError, httpx2.InvalidURL):
        valid = False
    if not valid:
        raise UserError(f"the teacher's URL {url:.200} is not of the form http://HOST:PORT/v1; fix it")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"the teacher's URL at {parts.hostname} holds more than an address; API keys go in the environment"
        )
    return url.rstrip("/")


def checked_urls(urls: str) -> list[str]:
    """Several URLs, separated by spaces. Raises UserError as `checked_url` does, and for one that is given twice."""
    found = [checked_url(url) for url in urls.split()] or [checked_url(urls)]
    for url in found:
        if found.count(url) > 1:
            raise UserError(f"the teacher's URL {url} is given twice; name each endpoint once")
    return found


def key_for(url: str, name: str = KEY_NAME) -> str:
    """The API key for a URL, or an empty one. name: of the environment variable. Raises UserError where it lacks."""
    key = os.environ.get(name, "")
    if not key and url == OPENAI_URL:
        raise UserError(f"{url} needs a key, and {name} is not set in the environment; export it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {name} holds characters that no header can; export it again")
    return key
