"""Pages of lists whose members have an id that does not change."""

from __future__ import annotations

import base64
import binascii
import bisect
from collections.abc import Sequence

from weight_broker.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAXIMUM_PAGE_SIZE = 1000


def page(
    ids: Sequence[str], page_size: int, page_token: str, *, newest_first: bool = False
) -> tuple[Sequence[str], str]:
    """The ids of one page and the token of the next. The ids are sorted, or `newest_first` with only the oldest ones
    vanishing. The token names the last id of the page before, so that members that come and go between two pages
    neither repeat nor hide others. Raises `InvalidArgument`."""
    if not 0 <= page_size <= MAXIMUM_PAGE_SIZE:
        raise InvalidArgument("page_size", page_size, f"0 (for {DEFAULT_PAGE_SIZE}) to {MAXIMUM_PAGE_SIZE}")
    size = page_size or DEFAULT_PAGE_SIZE
    start = 0
    if page_token:
        last = _last_id(page_token)
        if newest_first:
            start = ids.index(last) + 1 if last in ids else len(ids)
        else:
            start = bisect.bisect_right(ids, last)
    chosen = ids[start : start + size]
    return chosen, _token(chosen[-1]) if start + size < len(ids) else ""


def _token(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _last_id(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise InvalidArgument("page_token", token, "the next_page_token of an earlier answer, unchanged") from None
