"""Secrets in addresses: find them, hide them from messages, and fill them in from the environment at the point of use.

An address may hold a password (https://user:password@host/...), a token in its stead, or a signature in its query
(S3's X-Amz-Signature, Azure's sig, Google's X-Goog-Signature). None of these may get into files or messages. A recipe
names an environment variable instead: https://user:${PASSWORD}@host/train, https://host/train?${SIGNATURE}.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

_CHAIN = r"(?!::[\w+.-]+://)"
"""Where the next address of a chain begins: zip://a.zip::https://..."""
_IN_TEXT = re.compile(rf"(?<=://)(?:{_CHAIN}\S)*")
_ALONE = re.compile(rf"(?<=://)(?:{_CHAIN}.)*", re.DOTALL)
_PORT = r"\d*(?:[/?#]|$)"
_PASSWORD = re.compile(
    rf"(?P<user>[^/@:?#]*):(?:(?!{_PORT})(?:(?P<plain>[^/?#]*)@|(?P<odd>[^@]*)@)|(?P<port>\d+/[^@?#]*)@)"
)
"""A password may hold an unescaped slash; one that looks like a port and a path with an @ counts as one too."""
_NAME = re.compile(r"(?P<user>[^/@:?#]+)@")
_QUERY = re.compile(r"[?#][^'\"<>]*[^'\"<>;,:.)\]]")
_SECRET_KEY = re.compile(r"sig|token|key|secret|passw|pwd|auth|credential|session|jwt", re.IGNORECASE)
_BARE = 16
"""A query of one word counts as a token from this many characters on."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FROM_VARIABLES = re.compile(rf"\?(?:[^=&?#]*={_VARIABLE.pattern}&?|{_VARIABLE.pattern}&?)+[;,:.)\]]*$")


def masked(text: str) -> str:
    """Remove the secrets of all addresses in a text: passwords, tokens, and everything after a `?`."""
    return _IN_TEXT.sub(_masked, text) if "://" in text else text


def shown(address: str) -> str:
    """One address without its password and its query."""
    return _ALONE.sub(_masked, address).removesuffix("?…")


def _masked(found: re.Match) -> str:
    rest = found[0]
    if user := _PASSWORD.match(rest):
        if not _VARIABLE.fullmatch(user["plain"] or ""):
            rest = f"{user['user']}@{rest[user.end() :]}"
    elif (user := _NAME.match(rest)) and _is_web(found) and not _VARIABLE.fullmatch(user["user"]):
        rest = f"…@{rest[user.end() :]}"
    return rest if _FROM_VARIABLES.search(rest) else _QUERY.sub("?…", rest, count=1)


def _is_web(found: re.Match) -> bool:
    """Whether the scheme before it is http or https: there, a name without a password is a token."""
    return re.search(r"https?://$", found.string[: found.start()], re.IGNORECASE) is not None


def secret(address: str) -> str | None:
    """Name the secret that an address holds; None if it holds none, or names variables instead."""
    for found in _ALONE.finditer(_VARIABLE.sub("", address)):
        rest = found[0]
        user = _PASSWORD.match(rest)
        if user and (user["plain"] or user["odd"] or user["port"]):
            return "a password"
        if not user and _NAME.match(rest) and _is_web(found):
            return "a token"
        for part in re.split(r"[?&;#]", rest)[1:]:
            key, equals, value = part.partition("=")
            if equals and value and _SECRET_KEY.search(unquote(key)):
                return f"a secret ({unquote(key)[:40]})"
            if not equals and len(part) >= _BARE:
                return "a token"
    return None


def variables(address: str) -> list[str]:
    """Names of the environment variables from which an address takes its secrets."""
    return _VARIABLE.findall(address) if "://" in address else []


def filled(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """Fill in the values of an address's variables: percent-encoded before a `?`, unchanged after it.

    Raises:
        KeyError: a variable is not set; the argument is its name.
    """
    if not variables(address):
        return address
    head, question, query = address.partition("?")
    head = _VARIABLE.sub(lambda found: quote(environment[found[1]], safe=""), head)
    return head + question + _VARIABLE.sub(lambda found: environment[found[1]].removeprefix("?"), query)
