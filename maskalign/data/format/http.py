"""Requests for files of data sets over http(s)."""

import os
import urllib.request

TOKEN = "MASKALIGN_DATA_TOKEN"


def open_http(url, timeout, start=0):
    """The open answer of a server, from byte `start` of the file on where the server can.

    The environment variable MASKALIGN_DATA_TOKEN is sent as a bearer token, to the host of the URL alone: where that
    redirects to another one, as hubs do to their storage, the token stays behind.

    Raises:
        What `urllib.request.urlopen` raises.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get(TOKEN, "").strip()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=timeout)


def refusal(code):
    """ "status 403; ..." for people: what to do where a server wants to know who asks."""
    return f"status {code}; give a bearer token in {TOKEN}" if not os.environ.get(TOKEN) else f"status {code}"
