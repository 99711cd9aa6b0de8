"""Whether a server answers, and which models it names: two plain requests, which the environment's proxies have no part in."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

_ASK_S = 5.0
_ENOUGH = 2**20  # bytes of an answer that are read


def answers(url: str) -> bool:
    """Whether a server is ready: by `/health`, or, where it has no such page, by its list of models."""
    for path in ("/health", "/v1/models"):
        try:
            with _opener().open(url + path, timeout=_ASK_S) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            if path == "/health" and error.code in (404, 405, 501):
                continue
            return error.code in (401, 403) and path != "/health"  # it is there, and asks for a key
        except (OSError, ValueError):
            return False
    return False


def models_at(url: str, key: str) -> list[str]:
    """The names of a server's models; empty where it can't be asked."""
    try:
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        with _opener().open(request, timeout=_ASK_S) as answer:
            content = json.loads(answer.read(_ENOUGH))
        return [str(model["id"]) for model in content["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _opener() -> urllib.request.OpenerDirector:
    """Asks without proxies: they know nothing of this machine's own addresses, nor of a cluster's."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
