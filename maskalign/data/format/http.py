"""HTTP(S) requests for the files of data sets."""

import os
import urllib.request

TOKEN = "MASKALIGN_DATA_TOKEN"


def open_http(url, timeout, start=0):
    """Open a URL and return the response, from byte `start` on if the server supports ranges.

    The environment variable MASKALIGN_DATA_TOKEN is sent as a bearer token, but only to the host of the URL: if that
    redirects to another host, as hubs do to their storage, the token is not sent there.

    Args:
        url: an http(s) URL.
        timeout: in seconds.
        start: the first byte that is requested.

    Raises:
        OSError: as `urllib.request.urlopen`.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get(TOKEN, "").strip()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=timeout)


def refusal(code):
    """The reason for an error message where a server answers with status 401 or 403, with a hint about the token."""
    return f"status {code}; give a bearer token in {TOKEN}" if not os.environ.get(TOKEN) else f"status {code}"
