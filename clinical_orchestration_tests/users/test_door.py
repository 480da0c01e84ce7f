"""The door over a small application: session, basic authentication, token, CSRF, websocket, users by the API."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from clinical_orchestration.api.app import IdentityGate, create_api
from clinical_orchestration.audit.trail import AuditEntry, AuditError, AuditTrail
from clinical_orchestration.page import turned_away
from clinical_orchestration.page.__main__ import main
from clinical_orchestration.page.app import create_app
from clinical_orchestration.page.dagster_ui import DagsterUi
from clinical_orchestration.page.door import Door
from clinical_orchestration.page.keeper import Keeper
from clinical_orchestration.page.settings import PageSettings
from clinical_orchestration.page.turned_away import TurnedAway
from clinical_orchestration.platform.store import PlatformStore
from clinical_orchestration.users.first_user import DEFAULT_PASSWORD
from clinical_orchestration.users.proof import LOOK_SECONDS
from clinical_orchestration.users.store import UserStore
from clinical_orchestration_tests.audit.memory import TrailInMemory
from clinical_orchestration_tests.users.conftest import Clock

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("quick_hashes")]

SERVICE = "a-service-token-of-enough-characters"
HTML = {"accept": "text/html"}


async def who(request: Request) -> JSONResponse:
    body = (await request.body()).decode()
    identity = getattr(request.state, "identity", None)
    return JSONResponse(
        {"name": identity and identity.name, "how": identity and identity.how, "body": body,
         "csrf": getattr(request.state, "csrf_token", None)}
    )  # fmt: skip


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            await socket.send_text(f"{socket.state.identity.name}: {await socket.receive_text()}")
    except WebSocketDisconnect:
        pass


class World:
    """A page behind its door, and what is in its database."""

    def __init__(self, url: str, users: UserStore, clock: Clock, home: Path) -> None:
        self.users, self.clock = users, clock
        self.trail = AuditTrail(url)
        store = PlatformStore(url)
        api = create_api(cast(Any, None), lambda: store, gate=IdentityGate(), trail=self.trail, users=users)
        self.keeper = Keeper(users, self.trail, service_token=SERVICE, clock=clock.seconds)
        routes = [
            Mount("/api/v1", api),
            WebSocketRoute("/dagster/graphql", echo),
            Route("/{path:path}", who, methods=["GET", "POST", "DELETE"]),
        ]
        self.app = Starlette(routes=routes, middleware=[Middleware(Door, keeper=self.keeper)])

    def client(self, *auth: str, **options: Any) -> TestClient:
        client = TestClient(self.app, follow_redirects=False, **options)
        if len(auth) == 1:
            client.headers["authorization"] = f"Bearer {auth[0]}"
        elif auth:
            client.auth = (auth[0], auth[1])
        return client

    def browser(self, name: str = "admin", password: str = DEFAULT_PASSWORD, **options: Any) -> TestClient:
        """A client that has logged in by the form."""
        client = self.client(**options)
        answer = client.post("/login", data={"username": name, "password": password})
        assert answer.status_code == 303, answer.text
        return client

    def events(self) -> list[tuple[str, str, str]]:
        return [(row.event, row.who, row.origin) for row in self.trail.rows()]


@pytest.fixture
def world(database: str, users: UserStore, clock: Clock, tmp_path: Path) -> World:
    return World(database, users, clock, tmp_path)


@pytest.fixture
def viewer(world: World) -> tuple[str, str]:
    world.client("admin", "admin").get("/")
    world.users.create_user("vera", "see", ["Viewer"], email="vera@example.org")
    return "vera", "see"


def csrf(client: TestClient) -> str:
    found: str = client.get("/somewhere").json()["csrf"]
    return found


def test_open_paths_need_no_login_and_everything_else_does(world: World) -> None:
    client = world.client()
    for path in ("/health", "/metrics", "/static/page.css", "/login", "/api/v1/version"):
        assert client.get(path).status_code == 200, path
    for path in ("/", "/alerts.json", "/dagster/", "/api/v1/users", "/health/", "/metricsx", "/static"):
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["content-type"] == "application/problem+json"
        assert "www-authenticate" not in answer.headers
        assert answer.json()["title"] == "Unauthorized"
    assert client.get("/api/v1/users", headers=HTML).status_code == 401


def test_a_browser_is_sent_to_the_login_and_back(world: World) -> None:
    client = world.client()
    answer = client.get("/runs/a?task=b&c=d", headers=HTML)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/login?next=%2Fruns%2Fa%3Ftask%3Db%26c%3Dd"
    form = client.get(answer.headers["location"], headers=HTML)
    target = re.search(r'name="next" value="([^"]+)"', form.text)
    assert target is not None
    assert target[1] == "/runs/a?task=b&amp;c=d"
    answer = client.post("/login", data={"username": "admin", "password": "admin", "next": "/runs/a?task=b&c=d"})
    assert answer.headers["location"] == "/runs/a?task=b&c=d"
    assert client.get("/runs/a").json()["name"] == "admin"
    evil = client.post("/login", data={"username": "admin", "password": "admin", "next": "//evil.example"})
    assert evil.headers["location"] == "/"


def test_the_login_page_works_without_script_and_names_its_fields(world: World) -> None:
    page = world.client().get("/login")
    assert not re.search(r"<script(?! src=)", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for field in ("username", "password"):
        assert f'<label for="{field}">' in page.text
        assert f'id="{field}"' in page.text
    wrong = world.client().post("/login", data={"username": "admin", "password": "no", "next": "/<b>"})
    assert wrong.status_code == 401
    assert 'role="alert"' in wrong.text
    assert "Invalid login" in wrong.text
    assert "<b>" not in wrong.text


def test_the_cookie_is_out_of_reach_of_scripts_and_secure_over_https(world: World) -> None:
    for scheme, secure in (("http", False), ("https", True)):
        client = world.client(base_url=f"{scheme}://testserver")
        cookie = client.post("/login", data={"username": "admin", "password": "admin"}).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=lax" in cookie.lower()
        assert ("Secure" in cookie) is secure


def test_a_login_gives_a_new_session_and_ends_the_old_one(world: World) -> None:
    client = world.browser()
    old = dict(client.cookies)
    client.post("/login", data={"username": "admin", "password": "admin"})
    assert dict(client.cookies) != old
    stolen = world.client(cookies=old)
    assert stolen.get("/").status_code == 401
    assert client.get("/").status_code == 200


def test_a_session_changes_nothing_without_its_csrf_token(world: World) -> None:
    client, other = world.browser(), world.browser()
    assert client.post("/x").status_code == 403
    assert client.post("/x", headers={"x-csrftoken": csrf(other)}).status_code == 403
    assert client.post("/x", headers={"x-csrftoken": "ü".encode("latin-1")}).status_code == 403
    assert client.post("/x", headers={"x-csrftoken": csrf(client)}).status_code == 200
    form = client.post("/x", data={"a": "b", "csrf_token": csrf(client)})
    assert form.status_code == 200
    assert form.json()["body"].startswith("a=b&csrf_token="), "who is behind the door reads the body too"
    assert client.post("/x", data={"csrf_token": csrf(client), "a": "b" * 70_000}).status_code == 403
    assert client.delete("/api/v1/users/nobody").status_code == 403
    assert client.delete("/api/v1/users/nobody", headers={"x-csrftoken": csrf(client)}).status_code == 404


def test_the_dagster_ui_has_no_token_so_that_its_requests_must_come_from_this_site(world: World) -> None:
    client = world.browser()
    path = "/dagster/graphqlx"
    assert client.post(path).status_code == 403
    assert client.post(path, headers={"origin": "http://localhost:5000"}).status_code == 403
    assert client.post(path, headers={"sec-fetch-site": "same-site"}).status_code == 403
    assert client.post(path, headers={"origin": "http://testserver"}).status_code == 200
    assert client.post(path, headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert client.get("/dagster/x/graphql?query=mutation").status_code == 403
    assert client.get("/dagster/x").status_code == 200


def test_basic_authentication_and_tokens_need_no_csrf_token(world: World) -> None:
    assert world.client("admin", "admin").post("/x").json()["how"] == "basic"
    secret, token = world.users.create_token("admin", "script")
    assert world.client(secret).post("/x").json() == {"name": "admin", "how": "token", "body": "", "csrf": ""}
    service = world.client(SERVICE).post("/x").json()
    assert (service["name"], service["how"]) == ("pipeline-manager", "token")
    world.users.revoke_token(token.id)
    world.clock.pass_by(seconds=LOOK_SECONDS)
    assert world.client(secret).get("/x").status_code == 401


def test_an_authorization_that_makes_no_sense_is_401(world: World) -> None:
    client = world.browser()
    coded = [base64.b64encode(text).decode() for text in (b"admin", b"admin\x00:admin", b"\xff:\xfe")]
    for header in ("Basic", "Basic !!!", "Bearer", "Bearer x", "Negotiate abc", "", *(f"Basic {one}" for one in coded)):
        assert client.get("/x", headers={"authorization": header}).status_code == 401, header


def test_a_password_is_hashed_once_not_for_each_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    client = world.client("admin", "admin")
    assert client.get("/").status_code == 200

    def never(*_: object) -> None:
        raise AssertionError("the password was checked again")

    monkeypatch.setattr(UserStore, "authenticate", never)
    for _ in range(20):
        assert client.get("/").status_code == 200


@pytest.mark.parametrize("how", ["basic", "session", "token"])
def test_a_changed_password_or_role_acts_within_a_second(world: World, how: str) -> None:
    world.client("admin", "admin").get("/")
    world.users.create_user("ann", "old", ["Admin"], email="ann@example.org")
    secret, _ = world.users.create_token("ann", "script")
    made = {"basic": ["ann", "old"], "token": [secret], "session": []}[how]
    client = world.client(*made) if made else world.browser("ann", "old")
    assert client.get("/api/v1/users").status_code == 200
    world.users.change_user("ann", roles=["Viewer"])
    world.clock.pass_by(seconds=LOOK_SECONDS)
    assert client.get("/api/v1/users").status_code == 403
    world.users.change_user("ann", password="new", active=how != "token")
    world.clock.pass_by(seconds=LOOK_SECONDS)
    assert client.get("/api/v1/users").status_code == 401


def test_logging_out_ends_the_session_at_once(world: World) -> None:
    client = world.browser()
    cookies = dict(client.cookies)
    assert client.post("/logout").status_code == 403
    assert client.get("/x").status_code == 200
    page = client.get("/logout")
    token = re.search(r'name="csrf_token" value="(\w+)"', page.text)
    assert token is not None
    answer = client.post("/logout", data={"csrf_token": token[1]})
    assert answer.headers["location"] == "/login"
    assert not client.cookies
    assert world.client(cookies=cookies).get("/x").status_code == 401
    assert [event for event, _, _ in world.events()] == ["login", "logout"]


def test_a_locked_out_name_hears_when_to_come_again_and_an_open_session_goes_on(world: World) -> None:
    client = world.browser()
    for _ in range(5):
        answer = world.client("admin", "wrong").get("/api/v1/users")
        assert answer.status_code == 401
    assert answer.headers["retry-after"] == "30"
    assert world.client("admin", "admin").get("/api/v1/users").status_code == 401
    form = world.client().post("/login", data={"username": "admin", "password": "admin"})
    assert form.status_code == 429
    assert "Try again in" in form.text
    assert client.get("/x").status_code == 200
    events = [event for event, _, _ in world.events()]
    assert events == ["login", *["login_failed"] * 4, "login_locked"], "what comes while it lasts is not recorded"
    world.clock.pass_by(seconds=31)
    assert world.client("admin", "admin").get("/api/v1/users").status_code == 200


def test_logins_are_recorded_and_what_was_typed_is_not(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.browser()
    world.client("admin", "typed-wrong").get("/x")
    world.client("typed-in-the-wrong-field", "x").get("/x")
    assert world.events() == [
        ("login", "admin", "page"), ("login_failed", "admin", "api"), ("login_failed", "?", "api"),
    ]  # fmt: skip
    everything = caplog.text + str(list(world.trail.rows()))
    for secret in ("typed-wrong", "typed-in-the-wrong-field", SERVICE):
        assert secret not in everything


def test_a_login_that_cannot_be_recorded_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(*_: object) -> int:
        raise AuditError("full")

    monkeypatch.setattr(AuditTrail, "record", broken)
    assert world.client("admin", "admin").get("/x").status_code == 503
    answer = world.client().post("/login", data={"username": "admin", "password": "admin"})
    assert answer.status_code == 503
    assert "set-cookie" not in answer.headers


def test_a_websocket_is_behind_the_same_door(world: World) -> None:
    with pytest.raises(WebSocketDisconnect), world.client().websocket_connect("/dagster/graphql"):
        pass
    client = world.browser()
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/dagster/graphql"):
        pass  # a browser always says where it comes from
    foreign = {"origin": "http://localhost:5000"}
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/dagster/graphql", headers=foreign):
        pass
    with client.websocket_connect("/dagster/graphql", headers={"origin": "http://testserver"}) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "admin: hello"
        world.users.change_user("admin", password="new")
        world.clock.pass_by(seconds=LOOK_SECONDS)
        socket.send_text("still there?")
        with pytest.raises(WebSocketDisconnect) as raised:
            socket.receive_text()
        assert raised.value.code == 1008


def test_who_has_no_role_sees_nothing_and_may_log_out(world: World) -> None:
    world.client("admin", "admin").get("/")
    world.users.create_user("nora", "x", ["Public"], email="nora@example.org")
    client = world.browser("nora", "x")
    for path in ("/", "/dagster/", "/alerts.json", "/api/v1/users"):
        assert client.get(path).status_code == 403, path
    refused = client.get("/", headers=HTML)
    assert (refused.status_code, refused.headers["content-type"]) == (403, "text/html; charset=utf-8")
    assert "nora" in refused.text
    page = client.get("/login/")
    assert "nora" in page.text
    assert 'action="/logout"' in page.text


def test_a_viewer_changes_nothing_by_the_api(world: World, viewer: tuple[str, str]) -> None:
    client = world.client(*viewer)
    for method, path, body in (
        ("POST", "dags/clinical_data_pipeline/dagRuns", {}),
        ("PATCH", "dags/clinical_data_pipeline", {"is_paused": True}),
        ("POST", "variables", {"key": "a", "value": "b"}),
        ("GET", "variables", None),
        ("POST", "users", {}),
        ("PATCH", "users/vera", {}),
        ("GET", "eventLogs", None),
    ):
        answer = client.request(method, f"/api/v1/{path}", json=body)
        assert answer.status_code == 403, (method, path)
        assert answer.json()["title"] == "Forbidden"
    assert world.client("vera", "wrong").get("/api/v1/pools").status_code == 401


def user_body(name: str, **values: Any) -> dict[str, Any]:
    return {
        "username": name, "email": f"{name}@example.org", "first_name": "First", "last_name": "Last", **values,
    }  # fmt: skip


def test_users_by_the_api_have_airflows_shape_and_no_password(world: World) -> None:
    client = world.client("admin", "admin")
    made = client.post("/api/v1/users", json=user_body("ann", password="hidden", roles=[{"name": "Op"}]))
    assert made.status_code == 200, made.text
    assert "hidden" not in made.text
    shown = made.json()
    assert set(shown) == {
        "first_name", "last_name", "username", "email", "active", "last_login", "login_count", "failed_login_count",
        "fail_login_count", "roles", "created_on", "changed_on",
    }  # fmt: skip
    assert shown["roles"] == [{"name": "Op"}]
    assert (shown["active"], shown["last_login"], shown["login_count"]) == (True, None, 0)
    assert client.get("/api/v1/users/ann").json() == shown
    listed = client.get("/api/v1/users", params={"order_by": "-id", "limit": 1}).json()
    assert [user["username"] for user in listed["users"]] == ["ann"]
    assert listed["total_entries"] == 2
    changed = client.patch("/api/v1/users/ann", json=user_body("anna", roles=[{"name": "Viewer"}]))
    assert changed.json()["username"] == "anna"
    assert changed.json()["roles"] == [{"name": "Viewer"}]
    masked = client.patch(
        "/api/v1/users/anna", json=user_body("x", first_name="Other"), params={"update_mask": "first_name"}
    )
    assert (masked.json()["username"], masked.json()["first_name"]) == ("anna", "Other")
    assert client.delete("/api/v1/users/anna").status_code == 204
    assert client.get("/api/v1/users/anna").status_code == 404
    assert client.post("/api/v1/users", json=user_body("bob", password="x")).json()["roles"] == [{"name": "Public"}]
    assert "hidden" not in str(list(world.trail.rows()))
    assert ("post_user", "admin", "api") in world.events()


MISTAKES: list[tuple[str, str, Any, int, str | None]] = [
    ("POST", "users", user_body("admin", password="x"), 409, "`admin` already exists. Use PATCH to update."),
    ("POST", "users", user_body("a", email="ADMIN@example.com", password="x"), 409, "is already taken"),
    ("POST", "users", {"username": "a"}, 400, "Missing data for required field."),
    ("POST", "users", user_body("a", password="x", roles=[{"name": "Boss"}]), 400, "Unknown roles: 'Boss'"),
    ("POST", "users", user_body("a", password="x", active=False), 400, "Unknown field."),
    ("POST", "users", user_body("a", password="x", roles=[None]), 400, "name"),
    ("POST", "users", user_body("", password="x"), 400, "Length"),
    ("POST", "users", user_body("os:root", password="x"), 400, "no colon"),
    ("POST", "users", user_body("Pipeline-Manager", password="x"), 400, "the platform's own"),
    ("PATCH", "users/admin", user_body("a\nb"), 400, "printable"),
    ("PATCH", "roles/Op", {"name": "User"}, 400, "stays as it is"),
    ("POST", "users", user_body("a\x00", password="x"), 400, "NUL"),
    ("POST", "users", user_body("a", password=""), 400, "Length"),
    ("PATCH", "users/nobody", user_body("nobody"), 404, "The User with username `nobody` was not found"),
    ("PATCH", "users/admin", {"username": "admin"}, 400, "Missing data for required field."),
    ("PATCH", "users/admin?update_mask=colour", user_body("admin"), 400, "Unknown update masks: 'colour'"),
    ("DELETE", "users/nobody", None, 404, "was not found"),
    ("GET", "users/%00", None, 400, "NUL"),
    ("GET", "users?order_by=password", None, 400, "Ordering with 'password' is disallowed"),
    ("GET", "users?limit=-1", None, 400, None),
    ("POST", "roles", {"name": "Viewer", "actions": []}, 400, "already exists"),
    ("POST", "roles", {"actions": []}, 400, "Missing data"),
    ("POST", "roles", {"name": "R", "actions": [{"action": {"name": "can_fly"}, "resource": {"name": "DAGs"}}]},
     400, "The specified action: 'can_fly' was not found"),
    ("POST", "roles", {"name": "R", "actions": [{"action": {"name": "can_read"}, "resource": {"name": "X"}}]},
     400, "The specified resource: 'X' was not found"),
    ("POST", "roles", {"name": "R", "actions": [None]}, 400, "Invalid type"),
    ("PATCH", "roles/Viewer", {"name": "Seer"}, 400, "stays as it is"),
    ("DELETE", "roles/Admin", None, 400, "stays as it is"),
    ("DELETE", "roles/R", None, 404, "Role with name 'R' was not found"),
    ("GET", "roles?order_by=colour", None, 400, "disallowed"),
]  # fmt: skip


def test_mistakes_are_answered_as_airflow_does(world: World) -> None:
    client = world.client("admin", "admin")
    client.get("/")
    for method, path, body, status, detail in MISTAKES:
        answer = client.request(method, f"/api/v1/{path}", json=body)
        assert answer.status_code == status, (method, path, body, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert detail is None or detail in answer.json()["detail"], (method, path, body, answer.text)


def test_roles_and_permissions_by_the_api(world: World) -> None:
    client = world.client("admin", "admin")
    pair = {"action": {"name": "can_read"}, "resource": {"name": "Users"}}
    assert client.post("/api/v1/roles", json={"name": "Reader", "actions": [pair]}).json() == {
        "name": "Reader", "actions": [pair],
    }  # fmt: skip
    names = [role["name"] for role in client.get("/api/v1/roles").json()["roles"]]
    assert names == ["Admin", "Op", "Public", "Reader", "User", "Viewer"]
    renamed = client.patch("/api/v1/roles/Reader", json={"name": "Seer", "actions": []}, params={"update_mask": "name"})
    assert renamed.json() == {"name": "Seer", "actions": [pair]}
    assert client.get("/api/v1/roles/Reader").status_code == 404
    assert client.delete("/api/v1/roles/Seer").status_code == 204
    actions = client.get("/api/v1/permissions").json()
    assert {action["name"] for action in actions["actions"]} == {
        "can_create", "can_read", "can_edit", "can_delete", "menu_access",
    }  # fmt: skip
    assert actions["total_entries"] == 5


def test_without_the_database_nobody_is_let_in_and_it_is_said_why() -> None:
    keeper = Keeper(UserStore("postgresql://me:hidden@127.0.0.1:9/x"))
    app = Starlette(routes=[Route("/{path:path}", who)], middleware=[Middleware(Door, keeper=keeper)])
    client = TestClient(app, follow_redirects=False)
    assert client.get("/health").status_code == 200
    assert client.get("/x").status_code == 401
    answer = client.get("/x", auth=("admin", "admin"))
    assert answer.status_code == 503
    assert "hidden" not in answer.text
    assert client.post("/login", data={"username": "admin", "password": "admin"}).status_code == 503


def test_where_others_reach_the_page_the_well_known_password_opens_nothing(world: World) -> None:
    world.client("admin", "admin").get("/")
    keeper = Keeper(world.users, remote=True)
    app = Starlette(routes=[Route("/{path:path}", who)], middleware=[Middleware(Door, keeper=keeper)])
    assert TestClient(app).get("/x", auth=("admin", "admin")).status_code == 503


def test_the_page_does_not_start_where_others_reach_it_with_the_well_known_password(
    database: str, users: UserStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CLINICAL_PAGE_ALLOW_REMOTE", "true")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("CLINICAL_ADMIN_PASSWORD", raising=False)
    served: list[object] = []
    monkeypatch.setattr("uvicorn.run", lambda *_, **options: served.append(options["host"]))
    assert main(["--host", "0.0.0.0"]) == 2  # noqa: S104
    said = capsys.readouterr().err
    assert "there is no user" in said
    assert "clinical users create" in said
    users.create_first_user("admin", "admin")
    assert main(["--host", "0.0.0.0"]) == 2  # noqa: S104
    said = capsys.readouterr().err
    assert "well-known password" in said
    assert "CLINICAL_ADMIN_PASSWORD" in said
    assert not served
    monkeypatch.setenv("CLINICAL_ADMIN_PASSWORD", "my own")
    assert main(["--host", "0.0.0.0"]) == 0  # noqa: S104
    assert served == ["0.0.0.0"]  # noqa: S104
    assert users.has_password("admin", "my own")


def test_there_is_an_administrator_as_soon_as_the_page_runs(database: str, users: UserStore, tmp_path: Path) -> None:
    def no_workspace(stack: ExitStack) -> Any:
        raise ConnectionError("no code server")

    settings = PageSettings(DAGSTER_HOME=str(tmp_path), POSTGRES_URL=database, CLINICAL_HOME="")
    with TestClient(create_app(settings, DagsterUi(no_workspace))):
        end = time.monotonic() + 10
        while not users.users():  # nobody has asked the page for anything
            assert time.monotonic() < end
            time.sleep(0.05)
    # so that whoever adds a user by a command, before the first login, does not lock the administrator out
    users.create_user("vera", "see", ["Viewer"], email="vera@example.org")
    assert users.has_password("admin", DEFAULT_PASSWORD)


def test_only_a_session_changes_things_as_the_page(world: World) -> None:
    browser = world.browser()
    token = {"x-csrftoken": csrf(browser)}
    answer = browser.post(
        "/api/v1/variables", json={"key": "a", "value": "1"}, headers={**token, "x-requested-with": "page"}
    )
    assert answer.status_code == 200, answer.text
    assert browser.post("/api/v1/variables", json={"key": "b", "value": "1"}, headers=token).status_code == 200
    script = world.client("admin", DEFAULT_PASSWORD)
    body = {"key": "c", "value": "1"}
    assert script.post("/api/v1/variables", json=body, headers={"x-requested-with": "page"}).status_code == 200
    origins = [(json.loads(row.new or "{}")["key"], row.origin) for row in world.trail.rows()
               if row.event == "variable.create"]  # fmt: skip
    assert origins == [("a", "page"), ("b", "api"), ("c", "api")]


class Rows(TrailInMemory):
    """A trail in memory, whose rows come from other threads."""

    def wait(self, count: int) -> list[AuditEntry]:
        end = time.monotonic() + 10
        while len(self.entries) < count:
            assert time.monotonic() < end, self.entries
            time.sleep(0.01)
        return self.entries


def test_requests_without_a_login_leave_a_row_and_no_flood(
    world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turned_away, "LOOK_SECONDS", 0.01)
    rows = Rows()
    refusals = TurnedAway(rows, clock.seconds)
    world.app = Starlette(
        routes=[Route("/{path:path}", who)],
        middleware=[Middleware(Door, keeper=Keeper(world.users, clock=clock.seconds, refusals=refusals))],
    )
    client = world.client()
    assert client.get("/api/v1/dags?password=tiger").status_code == 401
    (first,) = rows.wait(1)
    assert (first.event, first.who, first.origin, first.address) == (
        "unauthenticated", "anonymous", "api", "testclient",
    )  # fmt: skip
    assert first.extra == {"status": 401, "requests": 1, "newest": "GET /api/v1/dags"}
    for _ in range(20):
        assert client.get("/dagster/graphql").status_code == 401
    assert world.client("wrong-token").get("/").status_code == 401
    assert client.get("/", headers=HTML).status_code == 303, "to be sent to the login is no refusal"
    assert client.post("/login", data={"username": "x", "password": "y"}).status_code == 401
    time.sleep(0.1)
    assert len(rows.entries) == 1, "at most one row a minute and address"
    clock.pass_by(seconds=61)
    second = rows.wait(2)[1]
    assert (second.origin, second.extra["requests"], second.extra["newest"]) == ("page", 21, "GET /")
    client.get("/api/v1/dags")
    refusals.close()
    assert rows.entries[2].extra["requests"] == 1, "what was counted is written before the process ends"


def test_addresses_without_end_are_counted_together(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_away, "MOST_ADDRESSES", 3)
    monkeypatch.setattr(turned_away, "LOOK_SECONDS", 0.01)
    rows = Rows()
    refusals = TurnedAway(rows, clock.seconds)
    for number in range(10):
        refusals.note(f"2001:db8:0:{number}::1", "api", "GET /")
        refusals.note(f"2001:db8:0:{number}::2", "api", "GET /")
    refusals.close()
    counts = {}
    for entry in rows.entries:
        counts[entry.address] = counts.get(entry.address, 0) + entry.extra["requests"]
    assert counts == {"2001:db8::/64": 2, "2001:db8:0:1::/64": 2, "2001:db8:0:2::/64": 2, "others": 14}


def test_a_trail_that_fails_lets_nobody_in_and_stops_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()
    rows.broken = True
    refusals = TurnedAway(rows, clock.seconds)
    refusals.note("192.0.2.1", "api", "GET /")
    refusals.close()
    assert "1 requests without a login from 192.0.2.1 were not recorded" in caplog.text
