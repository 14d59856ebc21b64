"""Tokens of an issuer that the tests start: who gets in, who does not and why, and what happens while it is away."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from joserfc import jwk, jwt
from starlette.testclient import TestClient

from medclip_lab.cli import main
from medclip_lab.errors import UserError
from medclip_lab.serving import Settings, create_app, keys, oidc

from .conftest import encoded, png, problem

AUDIENCE = "medclip"
RSA = jwk.RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
OTHER = jwk.RSAKey.generate_key(2048, {"kid": "one"})
CURVE = jwk.ECKey.generate_key("P-256", {"kid": "curve"})
BODIES: dict[str, dict[str, Any]] = {
    "classify": {"images": [{"data": encoded(png())}]},
    "embed": {"texts": ["heart"]},
    "search": {"text": "heart", "index": "reports"},
}


class Issuer:
    """An identity provider on this machine: its discovery document and keys, and how often it was asked."""

    def __init__(self) -> None:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                answer = issuer.pages.get(self.path)
                self.send_response(503 if answer is None or issuer.down else 200)
                self.end_headers()
                if answer is not None and not issuer.down:
                    self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/realm"
        self.asked: list[str] = []
        self.down = False
        self.pages: dict[str, Any] = {
            "/realm/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        }
        self.publish(RSA, CURVE)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, *public: Any) -> None:
        self.pages["/realm/keys"] = {"keys": [key.as_dict(private=False) for key in public]}

    def token(self, key: Any = RSA, alg: str = "RS256", header: dict[str, Any] | None = None, **changes: Any) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "user-7", "iat": now, "exp": now + 300, "scope": "classify"}
        claims = {name: value for name, value in (claims | changes).items() if value is not None}
        return jwt.encode({"alg": alg, "kid": key.kid} | (header or {}), claims, key, algorithms=[alg])


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    running = Issuer()
    yield running
    running.server.shutdown()
    running.server.server_close()


Service = Callable[..., TestClient]


@pytest.fixture(scope="module")
def served(toy_settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(toy_settings), base_url="http://hospital.example") as client:
        yield client


@pytest.fixture
def service(served: TestClient, toy_settings: Settings, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service, believing the issuer; one model serves all tests."""

    def start(**changes: Any) -> TestClient:
        house = served.app.state.house  # type: ignore[attr-defined]
        told = {"oidc_issuer": issuer.url, "oidc_audience": AUDIENCE} | changes
        settings = replace(toy_settings, host="0.0.0.0", **told)
        monkeypatch.setattr(house, "settings", settings)
        monkeypatch.setattr(house, "keys", None if settings.keys is None else keys.Keys(settings.keys))
        tokens = oidc.Tokens(issuer.url, AUDIENCE, settings.oidc_jwks, settings.oidc_scope_claim)
        monkeypatch.setattr(house, "tokens", tokens)
        return served

    return start


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def ask(client: TestClient, token: str, route: str = "embed") -> Any:
    return client.post(f"/v1/{route}", json=BODIES[route], headers=bearer(token))


@pytest.mark.parametrize("alg", oidc.ALGORITHMS)
def test_a_token_opens_what_its_scopes_say(service: Service, issuer: Issuer, alg: str) -> None:
    client = service()
    curve = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}.get(alg)
    key = jwk.ECKey.generate_key(curve, {"kid": "curve"}) if curve else RSA
    issuer.publish(key)
    assert ask(client, issuer.token(key, alg)).status_code == 200
    assert client.get("/v1/models", headers=bearer(issuer.token(key, alg))).json()["scopes"] == ["classify"]
    problem(ask(client, issuer.token(key, alg), "search"), 403, "scope")
    assert len(issuer.asked) == 2, "the keys are kept"


@pytest.mark.parametrize(
    ("claims", "settings", "found"),
    [
        ({"scope": "openid medclip:search medclip:text"}, {}, ["search", "text"]),
        ({"scope": ["classify", "search"]}, {}, ["classify", "search"]),
        ({"scope": None, "roles": ["search", 7]}, {"oidc_scope_claim": "roles"}, ["search"]),
        ({"aud": ["other", AUDIENCE]}, {}, ["classify"]),
    ],
)
def test_scopes_are_found_in_their_claim(
    service: Service, issuer: Issuer, claims: dict[str, Any], settings: dict[str, Any], found: list[str]
) -> None:
    client = service(**settings)
    assert client.get("/v1/models", headers=bearer(issuer.token(**claims))).json()["scopes"] == found


@pytest.mark.parametrize("scope", [None, "", "openid profile", ["admin"], 7, {"classify": True}, "reclassify medclip:"])
def test_a_token_without_a_scope_of_the_service_opens_nothing(service: Service, issuer: Issuer, scope: Any) -> None:
    client = service()
    for path in ("/v1/models", "/metrics", "/v1/labelsets"):
        told = problem(client.get(path, headers=bearer(issuer.token(scope=scope))), 403, "scope")
        assert "classify, search, text" in told


def hour(number: int) -> int:
    return int(time.time()) + 3600 * number


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"exp": hour(-1)}, "has expired"),
        ({"exp": None}, "claim `exp`"),
        ({"exp": "soon"}, "claim `exp`"),
        ({"nbf": hour(1)}, "claim `nbf`"),
        ({"aud": "another"}, "claim `aud`"),
        ({"aud": ["another"]}, "claim `aud`"),
        ({"aud": None}, "claim `aud`"),
        ({"iss": "https://evil.example"}, "claim `iss`"),
        ({"iss": None}, "claim `iss`"),
        ({"sub": None}, "claim `sub`"),
        ({"key": OTHER}, "wrong signature"),
        ({"key": CURVE, "alg": "ES256", "header": {"kid": "one"}}, "cannot be read"),
        ({"header": {"kid": "unknown"}}, "does not name"),
    ],
)
def test_wrong_tokens(service: Service, issuer: Issuer, changes: dict[str, Any], why: str) -> None:
    client = service()
    refused = ask(client, issuer.token(**changes))
    assert why in problem(refused, 401, "token")
    assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert ask(client, issuer.token()).status_code == 200


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_signatures_that_anybody_could_make(service: Service, issuer: Issuer) -> None:
    client = service()
    header, claims, signature = issuer.token().split(".")
    for alg in ("none", "None", "NONE", ""):
        unsigned = f"{part({'alg': alg, 'kid': 'one'})}.{claims}."
        assert "not signed by" in problem(ask(client, unsigned), 401, "token")
    for secret in (
        RSA.as_pem(private=False),
        RSA.as_der(private=False),
        json.dumps(RSA.as_dict(private=False)).encode(),
    ):
        text = f"{part({'alg': 'HS256', 'kid': 'one'})}.{claims}"
        mac = hmac.new(secret, text.encode(), hashlib.sha256).digest()
        assert "not signed by" in problem(ask(client, f"{text}.{part(mac)}"), 401, "token")
    own = part({"alg": "RS256", "kid": "one", "jwk": OTHER.as_dict(private=False)})
    forged = issuer.token(OTHER, header={"jwk": OTHER.as_dict(private=False), "jku": "http://127.0.0.1:1/keys"})
    problem(ask(client, f"{own}.{claims}.{signature}"), 401, "token")
    problem(ask(client, forged), 401, "token")
    changed = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"scope": "classify search text"}
    assert "wrong signature" in problem(ask(client, f"{header}.{part(changed)}.{signature}"), 401, "token")


@pytest.mark.parametrize(
    "token", ["a.b.c", "..", "e30.e30.e30", part(b"[" * 20000) + ".e30.e30", part([1]) + ".e30.e30", "a.b", "x" * 30]
)
def test_what_is_no_token(service: Service, token: str) -> None:
    client = service()
    assert ask(client, token).status_code == 401


def test_an_unknown_key_asks_the_issuer_once_a_minute(
    service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service()
    assert ask(client, issuer.token()).status_code == 200
    asked = len(issuer.asked)
    for number in range(5):
        problem(ask(client, issuer.token(header={"kid": f"unknown-{number}"})), 401, "token")
    assert len(issuer.asked) == asked, "within a minute of the last time nobody is asked"
    new = jwk.RSAKey.generate_key(2048, {"kid": "two"})
    issuer.publish(new)
    problem(ask(client, issuer.token(new)), 401, "token")
    now = time.monotonic()
    monkeypatch.setattr(oidc.time, "monotonic", lambda: now + 61)
    assert ask(client, issuer.token(new)).status_code == 200
    assert "does not name" in problem(ask(client, issuer.token()), 401, "token"), "the old key was withdrawn"
    assert len(issuer.asked) == asked + 2


def test_an_issuer_that_hangs_holds_up_one_request(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, go = oidc.Tokens(issuer.url, AUDIENCE, None, "scope"), Event()

    async def several() -> None:
        await tokens.caller(issuer.token())
        now, read = time.monotonic() + 7200, tokens._source.read
        monkeypatch.setattr(oidc.time, "monotonic", lambda: now)
        monkeypatch.setattr(tokens._source, "read", lambda: go.wait(20) and read())
        asking = asyncio.create_task(tokens.caller(issuer.token()))
        while not tokens._lock.locked():
            await asyncio.sleep(0)
        try:
            for _ in range(3):
                assert (await asyncio.wait_for(tokens.caller(issuer.token()), 10)).subject == "user-7"
            assert not asking.done()
        finally:
            go.set()
        assert (await asking).subject == "user-7"

    asyncio.run(several())


def test_while_the_issuer_is_away(service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = service()
    issuer.down = True
    refused = ask(client, issuer.token())
    problem(refused, 503, "issuer")
    assert refused.headers["retry-after"] == "5"
    asked = len(issuer.asked)
    problem(ask(client, issuer.token()), 503, "issuer")
    assert len(issuer.asked) == asked, "it is not asked by every request"
    for path in ("/healthz", "/readyz", "/"):
        assert client.get(path, headers=bearer(issuer.token())).status_code == 200
    now, later = time.monotonic(), 0.0
    monkeypatch.setattr(oidc.time, "monotonic", lambda: now + later)
    issuer.down, later = False, 6.0
    assert ask(client, issuer.token()).status_code == 200
    issuer.down, later = True, 7200.0
    assert ask(client, issuer.token()).status_code == 200, "keys that were good are good for a while"
    later = 90000.0
    problem(ask(client, issuer.token()), 503, "issuer")


@pytest.mark.parametrize(
    "page",
    [
        {"issuer": "https://evil.example", "jwks_uri": "KEYS"},
        {"issuer": "URL", "jwks_uri": "https://evil.example/keys"},
        {"issuer": "URL", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "URL"},
        [],
        b"<html>",
        b"[" * 20000,
    ],
)
def test_a_strange_discovery_document_opens_nothing(service: Service, issuer: Issuer, page: Any) -> None:
    if isinstance(page, dict):
        page = json.loads(json.dumps(page).replace("URL", issuer.url).replace("KEYS", f"{issuer.url}/keys"))
    issuer.pages["/realm/.well-known/openid-configuration"] = page
    client = service()
    problem(ask(client, issuer.token()), 503, "issuer")
    assert issuer.asked == ["/realm/.well-known/openid-configuration"]


@pytest.mark.filterwarnings("ignore:Key size should be")
def test_keys_that_do_not_serve_are_left_out() -> None:
    short = jwk.RSAKey.generate_key(1024, {"kid": "short"}).as_dict(private=False)
    secret = {"kty": "oct", "k": "AAAA", "kid": "secret"}
    sealing = RSA.as_dict(private=False) | {"kid": "sealing", "use": "enc"}
    private = OTHER.as_dict(private=True) | {"kid": "private"}
    entries = [short, secret, sealing, private, {"kty": "RSA", "kid": "broken", "n": 1}, "key", {}]
    found = oidc.public_keys({"keys": entries})
    assert set(found) == {"private"}
    assert not found["private"].is_private
    for value in ({}, [], {"keys": {}}, {"keys": [secret, short]}):
        with pytest.raises(ValueError, match=r"Key Set|no RSA"):
            oidc.public_keys(value)


def test_keys_from_a_file(service: Service, issuer: Issuer, tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(issuer.pages["/realm/keys"]))
    client = service(oidc_jwks=path)
    assert ask(client, issuer.token()).status_code == 200
    assert not issuer.asked


def test_keys_and_tokens_beside_each_other(service: Service, issuer: Issuer, tmp_path: Path) -> None:
    key = keys.new_key(tmp_path / "keys.json", ["search"])
    client = service(keys=tmp_path / "keys.json")
    assert client.get("/v1/models", headers=bearer(key)).json()["scopes"] == ["search"]
    assert client.get("/v1/models", headers=bearer(issuer.token())).json()["scopes"] == ["classify"]
    problem(client.get("/v1/models"), 401, "key")
    problem(client.get("/v1/models", headers=bearer(key[:-1])), 401, "key")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--oidc-issuer", "https://sso.example"], "--oidc-audience"),
        (["--oidc-audience", "medclip"], "belong to --oidc-issuer"),
        (["--host", "0.0.0.0"], "anyone could ask"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for issuer in ("http://sso.example", "sso.example", "https://", "https://a@b", "https://a?b", "file:///etc"):
        with pytest.raises(UserError, match="not of the form https"):
            oidc.Tokens(issuer, AUDIENCE, None, "scope")
    (tmp_path / "jwks.json").write_text("{}")
    for path, told in ((tmp_path / "none.json", "cannot read"), (tmp_path / "jwks.json", "no JSON Web Key Set")):
        with pytest.raises(UserError, match=told):
            oidc.Tokens("https://sso.example", AUDIENCE, path, "scope")


def test_the_audit_log_names_the_subject_and_no_other_log_does(
    toy_settings: Settings, issuer: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(toy_settings, oidc_issuer=issuer.url, oidc_audience=AUDIENCE, host="0.0.0.0")
    caplog.set_level("INFO")
    app = create_app(replace(settings, audit=tmp_path / "audit.jsonl"))
    with TestClient(app, base_url="http://hospital.example") as client:
        assert ask(client, issuer.token()).status_code == 200
        problem(client.get("/v1/models"), 401, "key")
        problem(ask(client, issuer.token(OTHER, sub="forged")), 401, "token")
    told = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["key"], line["subject"], line["status"]) for line in told] == [
        ("oidc", "user-7", 200),
        ("none", None, 401),
    ]
    assert not any("user-7" in str(vars(record)) for record in caplog.records)
