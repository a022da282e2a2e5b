"""Who may do what: an admin, several clients, and nobody in particular."""

from __future__ import annotations

import asyncio

import pytest

A, B, ADMIN = "key-a", "key-b", "key-of-the-admin"


def bearer(key):
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {None: 202, A: 202}),
        ({"api_key": A}, {None: 401, A: 202, B: 401}),
        ({"api_key": f"{A}\n{B}"}, {None: 401, A: 403, B: 403, f"{A}\t{B}": 401}),
        ({"api_key": A, "admin_key": ADMIN}, {None: 401, A: 403, B: 401, ADMIN: 202}),
        ({"api_key": f"{A}\n{B}", "admin_key": ADMIN}, {None: 401, A: 403, B: 403, ADMIN: 202}),
        ({"admin_key": ADMIN}, {None: 403, A: 403, ADMIN: 202}),
    ],
)
async def test_who_may_stop_the_worker(world, settings, expected):
    for key, status in expected.items():
        w = world(**settings)
        async with w.http() as http:
            response = await http.post("/shutdown", headers=bearer(key))
            served = (await http.get("/health", headers=bearer(key))).status_code
        assert response.status_code == status, key
        assert w.shutdowns == ([True] if status == 202 else [])
        assert served == (401 if status == 401 else 200)
        if status == 403:
            assert response.json()["error"]["code"] == "UNAUTHORIZED"
            assert "www-authenticate" not in response.headers


@pytest.mark.parametrize("owner", [A, B, ADMIN])
async def test_a_job_is_cancelled_by_its_owner_or_an_admin(world, eventually, events_of, owner):
    """To others it is as if there were none, so that they do not learn of it either."""
    w = world(api_key=f"{A}\n{B}", admin_key=ADMIN)
    w.engine.go.clear()
    async with w.http() as http:
        body = {"job_id": "j", "prompt": "x"}
        running = asyncio.create_task(http.post("/execute", json=body, headers=bearer(owner)))
        await eventually(lambda: w.engine.submitted)
        for other in {A, B} - {owner}:
            response = await http.post("/cancel", json={"job_id": "j"}, headers=bearer(other))
            assert (response.status_code, response.json()) == (202, {"job_id": "j", "running": False})
        assert not w.engine.cancelled
        who = {A: A, B: ADMIN, ADMIN: ADMIN}[owner]
        response = await http.post("/cancel", json={"job_id": "j"}, headers=bearer(who))
        assert response.json() == {"job_id": "j", "running": True}
        w.engine.go.set()
        assert events_of((await running).text)[-1][1]["code"] == "CANCELLED"


async def test_job_ids_are_each_callers_own(world, eventually):
    w = world(api_key=f"{A}\n{B}", admin_key=ADMIN)
    w.engine.go.clear()
    async with w.http() as http:
        body = {"job_id": "j", "prompt": "x"}
        tasks = [asyncio.create_task(http.post("/execute", json=body, headers=bearer(k))) for k in (A, B)]
        await eventually(lambda: len(w.engine.submitted) == 2)
        assert (await http.post("/execute", json=body, headers=bearer(A))).status_code == 409
        await http.post("/cancel", json={"job_id": "j"}, headers=bearer(A))
        await eventually(lambda: w.engine.cancelled)
        assert len(w.engine.cancelled) == 1
        await http.post("/cancel", json={"job_id": "j"}, headers=bearer(ADMIN))
        await eventually(lambda: len(w.engine.cancelled) == 2)
        w.engine.go.set()
        await asyncio.gather(*tasks)
    assert w.client.num_admitted == 0


async def test_callers_share_no_cached_prefix(world):
    w = world(api_key=f"{A}\n{B}", admin_key=ADMIN)
    salts = []
    async with w.http() as http:
        for key in (A, B, ADMIN, A):
            for salt in ({}, {"cache_salt": "s"}):
                for path, body in (
                    ("/execute", {"job_id": "j", "prompt": "x"}),
                    ("/v1/completions", {"prompt": "x"}),
                    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
                ):
                    assert (await http.post(path, json=body | salt, headers=bearer(key))).status_code == 200
                salts.append({submit.cache_salt for submit in w.engine.submitted[-3:]})
    assert all(len(found) == 1 for found in salts)  # whichever way it came by
    assert salts[:2] == salts[6:] and len(set.union(*salts)) == 6
