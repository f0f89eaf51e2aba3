import pytest

from dreamer4.play.guard import Guard, is_local

OWN = "127.0.0.1:8000"
ELSEWHERE = Guard(names=("laptop",), token="secret")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("laptop", False),
    ],
)
def test_what_only_this_machine_reaches(host, local):
    assert is_local(host) is local


@pytest.mark.parametrize(
    "host", [OWN, "127.0.0.1", "127.0.0.2:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "[::1]", "laptop:8000"]
)
def test_its_own_names_are_known(host):
    assert Guard(names=("laptop",)).knows_host([host])
    assert ELSEWHERE.knows_host([host])


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "evil.example/localhost",
        "localhost/",
        "localhost?",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost:x",
        "localhost:99999",
        "localhost, evil.example",
        " localhost",
        "local\thost",
        "localhost.",
        "[::1",
        "[localhost]",
        "127.1",
        "0x7f000001",
        "laptop.lan",
    ],
)
def test_strange_names_are_not(host):
    assert not Guard(names=("laptop",)).knows_host([host])
    assert not ELSEWHERE.knows_host([host])


def test_addresses_are_known_where_a_token_is_asked_for():
    for host in ("192.168.1.2:8000", "[2001:db8::1]:8000", "0.0.0.0"):
        assert ELSEWHERE.knows_host([host])
        assert not Guard().knows_host([host])


def test_one_host_is_said():
    assert not Guard().knows_host([])
    assert not Guard().knows_host([OWN, OWN])
    assert not Guard().knows_origin([f"http://{OWN}"], [])
    assert not Guard().knows_origin([f"http://{OWN}"], [OWN, OWN])


def test_pages_of_its_own_are_known():
    assert Guard().knows_origin([f"http://{OWN}"], [OWN])
    assert Guard().knows_origin([f"https://{OWN}"], [OWN])
    assert Guard().knows_origin(["http://LocalHost:8000"], ["localhost:8000"])


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://world.example", "world.example:443"),
        ("http://world.example", "world.example:80"),
        ("https://world.example:443", "world.example"),
        ("https://World.Example", "world.example:443"),
        ("https://world.example:8443", "world.example:8443"),
        ("http://[::1]", "[::1]:80"),
    ],
)
def test_a_port_that_goes_without_saying_may_be_said(origin, host):
    assert Guard().knows_origin([origin], [host])


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://world.example", "world.example:80"),
        ("http://world.example", "world.example:443"),
        ("https://world.example", "world.example:8443"),
        ("https://world.example:8443", "world.example"),
        ("https://world.example", "other.example:443"),
        ("https://world.example:443/", "world.example"),
        ("https://a@world.example", "world.example"),
        ("ftp://world.example", "world.example"),
        ("://world.example", "world.example"),
        ("https://", ""),
        ("https://world.example:x", "world.example:x"),
    ],
)
def test_another_port_or_scheme_is_another_page(origin, host):
    assert not Guard().knows_origin([origin], [host])


@pytest.mark.parametrize(
    "origins",
    [
        [],
        [""],
        ["null"],
        [OWN],
        ["http://evil.example"],
        ["http://127.0.0.1:9000"],
        ["http://127.0.0.1"],
        ["http://localhost:8000"],
        ["ws://127.0.0.1:8000"],
        ["file://127.0.0.1:8000"],
        ["http://127.0.0.1:8000/"],
        ["http://127.0.0.1:8000.evil.example"],
        ["http://127.0.0.1:8000", "http://127.0.0.1:8000"],
        ["http://127.0.0.1:8000", "http://evil.example"],
        ["http://127.0.0.1:8000, http://evil.example"],
    ],
)
def test_other_pages_are_not(origins):
    assert not Guard().knows_origin(origins, [OWN])


def test_the_token_is_asked_for():
    assert ELSEWHERE.knows_token(["secret"])
    for tokens in ([], [""], ["Secret"], ["secre"], ["secret "], ["secret", "secret"], ["wrong", "secret"], ["\u20ac"]):
        assert not ELSEWHERE.knows_token(tokens)
    assert Guard(token="\u00e9t\u00e9").knows_token(["\u00e9t\u00e9"])
    assert Guard().knows_token([])
    assert Guard().knows_token(["any"])
