"""What people elsewhere are shown of a recipe names no machine of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_serving import RECIPE

from distill.recipe.reading import load_recipe
from distill.recipe.servers import Server
from distill.reporting.public import published_recipe


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({"kind": "vllm", "url": "http://node7.cluster:8000/v1"}, "http://server:8000"),
        ({"kind": "vllm", "url": ["http://n1:8000", "http://n2:8000"]}, ["http://server-1:8000", "http://server-2:8000"]),
        ({"kind": "openai", "url": "http://10.0.0.7/v1"}, "http://server:8000"),
        ({"kind": "openai", "url": "https://host.example/v1"}, "https://host.example/v1"),
        ({"kind": "deepseek"}, None),
        ({"kind": "vllm", "python": "/home/me/vllm/bin/python"}, None),
    ],
)
def test_addresses_of_hosts_stay_and_those_of_machines_go(server: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.teacher is not None
    teacher = recipe.teacher.model_copy(update={"server": Server.model_validate(server)})
    shown = published_recipe(recipe.model_copy(update={"teacher": teacher}))
    assert shown.teacher is not None and shown.teacher.server is not None
    assert shown.teacher.server.url == expected and shown.teacher.server.kind == server["kind"]
    assert not any(word in shown.model_dump_json() for word in ("node7", "n1", "10.0.0.7", "/home/me"))
