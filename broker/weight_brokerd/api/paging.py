"""Pages of lists whose members have an id that does not change."""

from __future__ import annotations

import base64
import binascii
import bisect
import enum
from collections.abc import Sequence

from weight_broker.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 100
MAXIMUM_PAGE_SIZE = 1000


class Listing(enum.Enum):
    """What is listed; a token of one list is not one of another."""

    WEIGHT_SETS = "w"
    INSTANCES = "i"
    TRANSFERS = "t"


def page(listing: Listing, ids: Sequence[str], page_size: int, page_token: str) -> tuple[Sequence[str], str]:
    """The ids of one page and the token of the next. `ids` are sorted; those of transfers by their number, the newest
    first. The token names the last id of the page before, so that members that come and go between two pages neither
    repeat nor hide others. Raises `InvalidArgument`."""
    if not 0 <= page_size <= MAXIMUM_PAGE_SIZE:
        raise InvalidArgument("page_size", page_size, f"0 (for {DEFAULT_PAGE_SIZE}) to {MAXIMUM_PAGE_SIZE}")
    size = page_size or DEFAULT_PAGE_SIZE
    start = 0
    if page_token:
        try:
            start = _start(listing, ids, _last_id(listing, page_token))
        except ValueError:
            raise InvalidArgument(
                "page_token", page_token, "the next_page_token of an earlier answer of the same list, unchanged"
            ) from None
    chosen = ids[start : start + size]
    return chosen, _token(listing, chosen[-1]) if start + size < len(ids) else ""


def _start(listing: Listing, ids: Sequence[str], last: str) -> int:
    if listing is Listing.TRANSFERS:
        return bisect.bisect_right(ids, -_number(last), key=lambda one: -_number(one))
    return bisect.bisect_right(ids, last)


def _number(transfer_id: str) -> int:
    return int(transfer_id.rpartition("-")[2])


def _token(listing: Listing, last: str) -> str:
    return base64.urlsafe_b64encode(f"{listing.value}:{last}".encode()).decode()


def _last_id(listing: Listing, token: str) -> str:
    """The id in a token; raises ValueError (as its kinds binascii.Error and UnicodeError) if that is none."""
    name, _, last = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().partition(":")
    if name != listing.value:
        raise binascii.Error("a token of another list")
    return last
