"""The step `mask_pii`: e-mail addresses and public IP addresses become fixed words; nothing else is touched."""

from __future__ import annotations

import ipaddress
import re
from typing import ClassVar

from llmtrain.config.sections.quality import MaskPiiStep
from llmtrain.data.prepare.quality.step import Dropped

_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]++@(?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,}(?![\w-])")
"""Local part and domain as people write them; quoted local parts and bare hosts (RFC 5321) are not looked for.

The local part begins where such characters begin and is never tried again from its middle: linear in the text.
"""
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|::)(?:[0-9A-Fa-f]{0,4}:){0,6}[0-9A-Fa-f]{0,4}(?![\w:])")


class MaskPii:
    """Replaces addresses. A second pass changes nothing.

    Private, loopback and documentation addresses name no person, and stay; so do numbers that are no address.
    """

    version: ClassVar[int] = 1
    rules: tuple[str, ...] = ()
    alters = True

    def __init__(self, options: MaskPiiStep, *, key: str) -> None:
        self._email = options.email
        self._ip = options.ip

    def apply(self, text: str) -> str | Dropped:
        """Return the text with its addresses masked."""
        if self._email is not None and "@" in text:
            email = self._email
            text = _EMAIL.sub(lambda _: email, text)
        if self._ip is not None:
            text = _IPV4.sub(self._masked, text)
            if ":" in text:
                text = _IPV6.sub(self._masked, text)
        return text

    def _masked(self, found: re.Match[str]) -> str:
        assert self._ip is not None
        return self._ip if _is_public(found[0]) else found[0]


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and int(address) >> 125 != 1:
        return False  # 2000::/3 is all that is assigned (RFC 4291, section 2.4); `a::b` is C++
    return address.is_global and not address.is_multicast
