"""sllm.hub against a hub on loopback, with huggingface_hub as it is installed, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

import huggingface_hub
import pytest
from hub_server import HubClient, HubRefusedError, HubServer

import sllm
from sllm import embedded
from sllm.engine import hub
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BIG = bytes(range(256)) * 1200  # more than one network packet


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    assert not server.errors


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def client(server: HubServer, home: pathlib.Path) -> Iterator[HubClient]:
    """One process for most tests; each test uses a repository of its own, so their caches are apart."""
    with HubClient(server.endpoint, home) as client:
        yield client
    assert "ResourceWarning" not in client.stderr, (
        client.stderr
    )  # no socket, file or thread was left to the collector
    assert "Traceback" not in client.stderr, client.stderr


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        request.getfixturevalue("server").log()


def refusal(call: Callable[[], object], *words: str) -> str:
    """The text of the refusal: it holds ``words``, is one line, begins with the thing's name, has a cause."""
    with pytest.raises(HubRefusedError) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith("cannot download hf://")
    assert refused.value.cause != "NoneType"
    for word in words:
        assert word in text
    return text


# -- downloads


def test_first_download_then_cache(server: HubServer, client: HubClient, home: pathlib.Path) -> None:
    commit = server.repo("me/first").commit({"model.gguf": BIG})
    path = client.download("me/first", "model.gguf")
    assert path.read_bytes() == BIG
    assert path == home / "hub" / "models--me--first" / "snapshots" / commit / "model.gguf"
    url = "/me/first/resolve/main/model.gguf"
    assert server.log() == [f"HEAD {url}", f"GET {url}"]

    assert client.download("me/first", "model.gguf") == path
    assert server.log() == [f"HEAD {url}"]  # asks whether it is still the newest, and fetches nothing

    assert client.download("me/first", "model.gguf", local_files_only=True) == path
    assert server.log() == []


def test_a_new_commit_is_fetched(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/moving")
    repo.commit({"model.gguf": b"old"})
    assert client.download("me/moving", "model.gguf").read_bytes() == b"old"
    repo.commit({"model.gguf": b"new"})
    assert client.download("me/moving", "model.gguf").read_bytes() == b"new"


def test_cache_dir(server: HubServer, client: HubClient, tmp_path: pathlib.Path) -> None:
    server.repo("me/elsewhere").commit({"model.gguf": b"x"})
    path = client.download("me/elsewhere", "model.gguf", cache_dir=str(tmp_path))
    assert tmp_path in path.parents


def test_revisions(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/revised")
    first = repo.commit({"model.gguf": b"1"}, "v1", "refs/pr/7", "feature/long context")
    repo.commit({"model.gguf": b"2"}, "main")
    assert client.download("me/revised", "model.gguf").read_bytes() == b"2"
    for revision in ("v1", "refs/pr/7", "feature/long context", first):
        assert client.download("me/revised", "model.gguf", revision=revision).read_bytes() == b"1"
    server.log()
    client.download("me/revised", "model.gguf", revision=first)
    assert server.log() == []  # a commit never changes, so there is nothing to ask
    for at in ("v1", "refs/pr/7", "feature%2Flong context", first):
        assert client.resolve(f"hf://me/revised@{at}/model.gguf").read_bytes() == b"1"
    refusal(lambda: client.resolve("hf://me/revised@v9/model.gguf"), "no revision 'v9'")


def test_resolve_downloads(server: HubServer, client: HubClient) -> None:
    server.repo("me/folders").commit({"a.gguf": b"a", "sub/dir/模型 b.gguf": b"b"})
    assert client.resolve("hf://me/folders/a.gguf").read_bytes() == b"a"
    assert client.resolve("HF://me/folders/a.gguf").read_bytes() == b"a"
    assert client.resolve("hf://models/me/folders/a.gguf").read_bytes() == b"a"
    path = client.resolve("hf://me/folders/sub/dir/模型 b.gguf")
    assert path.read_bytes() == b"b"
    assert path.parts[-3:] == ("sub", "dir", "模型 b.gguf")


def test_redirect_within_the_hub_keeps_the_token(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/moved-here")
    repo.commit({"model.gguf": BIG})
    server.moved = "here"
    try:
        path = client.download("me/moved-here", "model.gguf", token="hf_secret")
    finally:
        server.moved = None
    assert path.read_bytes() == BIG
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer hf_secret"}
    assert any("resolve-cache" in line for line in server.log())


def test_redirect_to_another_host_does_not_leak_the_token(server: HubServer, client: HubClient) -> None:
    server.repo("me/moved-away").commit({"model.gguf": BIG})
    with HubServer() as storage:
        server.moved = storage
        try:
            path = client.download("me/moved-away", "model.gguf", token="hf_secret")
        finally:
            server.moved = None
        assert path.read_bytes() == BIG
        assert [request.method for request in storage.requests] == ["GET"]
        assert "authorization" not in storage.requests[0].headers
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in server.requests)


def test_a_broken_download_goes_on_where_it_stopped(server: HubServer, client: HubClient) -> None:
    server.repo("me/broken").commit({"model.gguf": BIG})
    server.drop_after = [100_000]
    try:
        path = client.download("me/broken", "model.gguf")
    except HubRefusedError:  # an older huggingface_hub goes on when it is called again
        path = client.download("me/broken", "model.gguf")
    assert path.read_bytes() == BIG
    ranges = [request.headers.get("range") for request in server.requests if request.method == "GET"]
    assert ranges == [None, "bytes=65536-"]


def test_a_download_that_never_finishes_leaves_no_file(
    server: HubServer, client: HubClient, tmp_path: pathlib.Path
) -> None:
    server.repo("me/hopeless").commit({"model.gguf": BIG})
    server.drop_after = [0] * 10
    try:
        refusal(lambda: client.download("me/hopeless", "model.gguf", cache_dir=str(tmp_path)))
    finally:
        server.drop_after = []
    assert not list(tmp_path.rglob("*.gguf"))
    assert client.download("me/hopeless", "model.gguf", cache_dir=str(tmp_path)).read_bytes() == BIG


# -- split models


def parts(count: int, stem: str = "q8/model") -> dict[str, bytes]:
    return {f"{stem}-{i:05d}-of-{count:05d}.gguf": bytes([i]) * 100 for i in range(1, count + 1)}


def test_all_parts_of_a_split_model_come_together(server: HubServer, client: HubClient) -> None:
    files = parts(3)
    server.repo("me/split").commit({**files, "other.gguf": b"x"})
    first = client.resolve("hf://me/split/q8/model-00001-of-00003.gguf")
    assert first.name == "model-00001-of-00003.gguf"
    assert sorted(path.name for path in first.parent.iterdir()) == sorted(name[3:] for name in files)
    assert all((first.parents[1] / name).read_bytes() == data for name, data in files.items())
    server.log()
    assert client.download("me/split", "q8/model-00001-of-00003.gguf") == first
    assert len(server.log()) == 1  # the parts are pinned to the first one's commit, so they cost nothing
    assert client.download("me/split", "q8/model-00001-of-00003.gguf", local_files_only=True) == first
    assert server.log() == []


def test_parts_come_from_one_commit(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/split-moving")
    old = repo.commit(parts(2, "m"))
    client.download("me/split-moving", "m-00001-of-00002.gguf")
    assert any(f"/resolve/{old}/m-00002-of-00002.gguf" in line for line in server.log())


def test_a_part_is_missing(server: HubServer, client: HubClient) -> None:
    files = parts(3, "m")
    del files["m-00003-of-00003.gguf"]
    server.repo("me/split-short").commit(files)
    refusal(
        lambda: client.resolve("hf://me/split-short/m-00001-of-00003.gguf"), "no file 'm-00003-of-00003.gguf'"
    )


def test_a_later_part_is_refused_before_any_request(server: HubServer, client: HubClient) -> None:
    with pytest.raises(
        HubRefusedError, match=r"part 2 of 3 .* hf://me/split@v1/q8/model-00001-of-00003\.gguf"
    ):
        client.resolve("hf://me/split@v1/q8/model-00002-of-00003.gguf")
    assert server.log() == []


def test_a_later_part_alone_can_be_downloaded(server: HubServer, client: HubClient) -> None:
    server.repo("me/split-one").commit(parts(2, "m"))
    path = client.download("me/split-one", "m-00002-of-00002.gguf")
    assert [entry.name for entry in path.parent.iterdir()] == ["m-00002-of-00002.gguf"]


# -- a repository, and which of its files

REPO = {
    "it-Q4_K_M.gguf": b"4",
    "it-Q8_0.gguf": b"8",
    "mmproj.gguf": b"x",
    "big/it-F16.gguf": b"16",
    "README.md": b"",
}


def test_a_quantisation_of_a_repository(server: HubServer, client: HubClient) -> None:
    server.repo("me/quants").commit(REPO)
    for name, data in [
        ("me/quants:Q4_K_M", b"4"),
        ("me/quants:q8_0", b"8"),
        ("hf.co/me/quants", b"4"),
        ("hf://me/quants:F16", b"16"),
        (f"{server.endpoint}/me/quants", b"4"),
        (f"{server.endpoint}/me/quants/tree/main/big", b"16"),
        (f"{server.endpoint}/me/quants/blob/main/it-Q8_0.gguf", b"8"),
        ("https://huggingface.co/me/quants/resolve/main/big/it-F16.gguf?download=true", b"16"),
    ]:
        assert client.resolve(name).read_bytes() == data, name
    server.log()
    client.resolve("me/quants:Q8_0")
    assert server.log() == ["GET /api/models/me/quants", "HEAD /me/quants/resolve/main/it-Q8_0.gguf"]
    with pytest.raises(HubRefusedError, match=r"has no GGUF file of Q6_K; .* me/quants:F16, Q4_K_M, Q8_0"):
        client.resolve("me/quants:Q6_K")


def test_all_parts_of_a_quantisation(server: HubServer, client: HubClient) -> None:
    server.repo("me/split-quant").commit({**parts(2, "F16/m-F16"), "m-Q8_0.gguf": b"8"})
    first = client.resolve("me/split-quant:F16")
    assert sorted(path.name for path in first.parent.iterdir()) == [
        "m-F16-00001-of-00002.gguf",
        "m-F16-00002-of-00002.gguf",
    ]


def test_the_revision_of_a_repository(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/revised-quants")
    repo.commit({"a-Q8_0.gguf": b"1"}, "v1", "refs/pr/3")
    repo.commit({"b-Q8_0.gguf": b"2"})
    assert client.resolve("me/revised-quants:Q8_0").read_bytes() == b"2"
    assert client.resolve("me/revised-quants@v1:Q8_0").read_bytes() == b"1"
    assert client.resolve("hf://me/revised-quants@refs/pr/3").read_bytes() == b"1"
    refusal(lambda: client.resolve("me/revised-quants@v9:Q8_0"), "no revision 'v9'")


def test_a_repository_that_is_refused(server: HubServer, client: HubClient, home: pathlib.Path) -> None:
    refusal(lambda: client.resolve("me/nobody:Q8_0"), "no repository me/nobody", "no token was sent")
    refusal(lambda: client.resolve("me/a--b:Q8_0"), "no repository name")
    repo = server.repo("me/gated-quants")
    repo.commit(REPO)
    repo.token, repo.gated = "hf_right", True
    page = f"{server.endpoint}/me/gated-quants"
    refusal(lambda: client.resolve("me/gated-quants:Q8_0"), "me/gated-quants is gated", page, "no token")
    repo.gated = False
    refusal(lambda: client.resolve("me/gated-quants:Q8_0"), "or it is private")
    with HubClient(server.endpoint, home, HF_TOKEN="hf_right") as allowed:
        assert allowed.resolve("me/gated-quants:Q8_0").read_bytes() == b"8"


def test_a_repository_without_its_hub(server: HubServer, client: HubClient, home: pathlib.Path) -> None:
    server.repo("me/cached-quants").commit(REPO)
    path = client.resolve("me/cached-quants:Q8_0")
    server.log()
    with HubClient(server.endpoint, home, HF_HUB_OFFLINE="1") as offline:
        assert offline.resolve("me/cached-quants:Q8_0") == path
        with pytest.raises(HubRefusedError, match="has no GGUF file of Q4_K_M"):  # not in the cache
            offline.resolve("me/cached-quants:Q4_K_M")
        refusal(lambda: offline.resolve("me/other-quants:Q8_0"), "in the cache", "HF_HUB_OFFLINE is set")
    assert server.log() == []
    server.status = 503
    try:
        assert client.resolve("me/cached-quants:Q8_0") == path
        refusal(lambda: client.resolve("me/other-quants:Q8_0"), "503", server.endpoint)
    finally:
        server.status = None
    server.plain = True
    try:
        refusal(lambda: client.resolve("me/other-quants:Q8_0"), "does not answer as a hub does")
    finally:
        server.plain = False


# -- tokens


def test_token_argument_and_environment(
    server: HubServer, home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    server.repo("me/open").commit({"model.gguf": b"x"})
    with HubClient(server.endpoint, tmp_path, HF_TOKEN="hf_from_environment") as client:
        for options, sent in (
            ({}, "Bearer hf_from_environment"),
            ({"token": True}, "Bearer hf_from_environment"),
            ({"token": "hf_given"}, "Bearer hf_given"),
            ({"token": False}, None),
        ):
            client.download("me/open", "model.gguf", **options)
            assert {request.headers.get("authorization") for request in server.requests} == {sent}
            server.log()
    assert "hf_" not in client.stderr


def test_no_token_by_default(server: HubServer, client: HubClient) -> None:
    server.repo("me/anonymous").commit({"model.gguf": b"x"})
    client.download("me/anonymous", "model.gguf")
    assert all("authorization" not in request.headers for request in server.requests)
    refusal(lambda: client.download("me/anonymous", "model.gguf", token=True), "not logged in")


def test_private_repository(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/private")
    repo.commit({"model.gguf": b"x"})
    repo.token = "hf_right"
    refusal(
        lambda: client.download("me/private", "model.gguf"),
        "no repository me/private",
        "no token was sent",
        "HF_TOKEN",
    )
    text = refusal(
        lambda: client.download("me/private", "model.gguf", token="hf_wrong"),
        "the token that was sent gives no access",
    )
    assert "hf_wrong" not in text
    assert client.download("me/private", "model.gguf", token="hf_right").read_bytes() == b"x"


def test_gated_repository(server: HubServer, client: HubClient) -> None:
    repo = server.repo("me/gated")
    repo.commit({"model.gguf": b"x"})
    repo.token, repo.gated = "hf_right", True
    refusal(
        lambda: client.resolve("hf://me/gated/model.gguf"),
        "is gated: access must be asked for",
        "no token was sent",
    )
    refusal(
        lambda: client.download("me/gated", "model.gguf", token="hf_wrong"),
        "must be asked for",
        "gives no access",
    )
    assert client.download("me/gated", "model.gguf", token="hf_right").read_bytes() == b"x"


@pytest.mark.parametrize("token", ["", "hf_x\n", " hf_x", "hf_密"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str) -> None:
    with pytest.raises(ModelLoadError, match="token is empty or holds") as refused:
        hub.download("me/any", "model.gguf", token=token)
    assert "hf_" not in str(refused.value)


# -- what is not there


def test_missing_repository(server: HubServer, client: HubClient) -> None:
    text = refusal(lambda: client.download("me/nowhere", "model.gguf"))
    assert text.startswith("cannot download hf://me/nowhere/model.gguf: there is no repository me/nowhere")


def test_missing_file(server: HubServer, client: HubClient) -> None:
    server.repo("me/small").commit({"model.gguf": b"x"})
    text = refusal(lambda: client.download("me/small", "Model.gguf", revision="main"))
    assert text == (
        "cannot download hf://me/small@main/Model.gguf: me/small has no file 'Model.gguf' at revision 'main';"
        " look at the repository's files"
    )


def test_a_name_the_hub_does_not_allow(client: HubClient) -> None:
    refusal(lambda: client.download("me/a--b", "model.gguf"), "no repository name")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble(server: HubServer, client: HubClient, status: int) -> None:
    server.repo("me/trouble").commit({"model.gguf": b"x"})
    server.status = status
    try:
        refusal(lambda: client.download("me/trouble", "model.gguf"), str(status), server.endpoint)
    finally:
        server.status = None


def test_a_web_server_that_is_no_hub(server: HubServer, client: HubClient) -> None:
    server.plain = True
    try:
        refusal(
            lambda: client.download("me/any", "model.gguf"), "does not answer as a hub does", "HF_ENDPOINT"
        )
    finally:
        server.plain = False


def test_a_hub_that_is_down(tmp_path: pathlib.Path) -> None:
    with HubServer() as server:
        server.repo("me/kept").commit({"model.gguf": b"x", "later.gguf": b"y"})
        client = HubClient(server.endpoint, tmp_path)
        path = client.download("me/kept", "model.gguf")
    with client:
        assert client.download("me/kept", "model.gguf") == path  # from the cache
        refusal(
            lambda: client.download("me/kept", "later.gguf"),
            "cannot be reached",
            "not in the cache",
            server.endpoint,
        )
    assert "ResourceWarning" not in client.stderr


def test_offline_mode(server: HubServer, client: HubClient, home: pathlib.Path) -> None:
    server.repo("me/offline").commit({**parts(2, "m"), "model.gguf": b"x"})
    path = client.download("me/offline", "model.gguf")
    first = client.download("me/offline", "m-00001-of-00002.gguf")
    server.log()
    with HubClient(server.endpoint, home, HF_HUB_OFFLINE="1") as offline:
        assert offline.resolve("hf://me/offline/model.gguf") == path
        assert offline.download("me/offline", "m-00001-of-00002.gguf") == first
        refusal(
            lambda: offline.resolve("hf://me/offline/other.gguf"), "not in the cache", "HF_HUB_OFFLINE is set"
        )
    assert server.log() == []
    refusal(
        lambda: client.download("me/offline", "other.gguf", local_files_only=True),
        "not in the cache",
        "local_files_only=True",
    )


# -- names, before anything is asked of the network


@pytest.mark.parametrize(
    "path",
    ["model.gguf", "/models/a b.gguf", "../up.gguf", "", "hf:/not/a/uri.gguf", "hf-x.gguf", "C:\\m.gguf"],
)
def test_everything_else_is_a_path(path: str) -> None:
    assert hub.resolve(path) == pathlib.Path(path)
    if not path.startswith("hf:/"):
        assert hub.resolve(pathlib.Path(path)) == pathlib.Path(path)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://me",
        "hf://me/repo/",
        "hf://me/repo:",
        "hf://me/repo@main:",
        "hf://me/:Q8_0",
        "hf:///repo/model.gguf",
        "hf://me//model.gguf",
        "hf://me/repo/sub/",
        "hf://me/repo/sub//model.gguf",
        "hf://me/repo/../other/model.gguf",
        "hf://me/repo/./model.gguf",
        "hf://me/repo/..",
        "hf://../../model.gguf",
        "hf://me/../model.gguf",
        "hf://me/repo/sub\\..\\model.gguf",
        "hf://me/repo/model.gguf\n",
        "hf://me/repo/mo\0del.gguf",
        "hf://me/repo@/model.gguf",
        "hf://me/@main/model.gguf",
        "hf://me/repo@../model.gguf",
        "hf://me/repo@..%2F..%2Fx/model.gguf",
        "hf://me/repo@%2Fetc/model.gguf",
        "hf://me/repo@a%00b/model.gguf",
        "hf://datasets/me/repo/model.gguf",
        "hf://buckets/me/repo/model.gguf",
    ],
)
def test_malformed_uris(uri: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        hub.resolve(uri)
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelLoadError):
        hub.resolve(pathlib.PurePosixPath("hf:/me"))  # a Path folds the two slashes into one


@pytest.mark.parametrize(
    "name", ["../x.gguf", "/x.gguf", "a/../x.gguf", "a//x", "", ".", "a\\x", "a\r", "a/"]
)
def test_malformed_file_names(name: str) -> None:
    with pytest.raises(ModelLoadError, match="filename"):
        hub.download("me/repo", name)


@pytest.mark.parametrize("repo_id", ["../x", "", "/", "a/b/c", "me/..", "me\\x", "me/"])
def test_malformed_repositories(repo_id: str) -> None:
    with pytest.raises(ModelLoadError, match="repo_id"):
        hub.download(repo_id, "model.gguf")


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="repo_id must be a string, not int"):
        hub.download(3, "model.gguf")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filename must be a string, not"):
        hub.download("me/repo", pathlib.Path("model.gguf"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="revision must be a string, not int"):
        hub.download("me/repo", "model.gguf", revision=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="token must be a string, a bool or None, not int"):
        hub.download("me/repo", "model.gguf", token=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hub.resolve(None)  # type: ignore[arg-type]


def test_importing_does_not_import_the_client() -> None:
    script = (
        "import sys, socket\n"
        "class No:\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = No\n"
        "from sllm.engine import hub\n"
        "assert str(hub.resolve('model.gguf')) == 'model.gguf'\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- layers alone


def test_layers_of_a_quantisation(
    server: HubServer, client: HubClient, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    server.repo("me/layer-quants").commit({"a-Q8_0.gguf": model.read_bytes(), "a-F16.gguf": b"x"})
    server.n_bytes = 0
    path = client.export("me/layer-quants:Q8_0", tmp_path / "part.gguf", 3, 4)
    assert path.read_bytes() == exported(model, tmp_path, 3, 4)
    assert server.n_bytes < model.stat().st_size
    lines = server.log()
    assert lines[0] == "GET /api/models/me/layer-quants"
    assert not any("F16" in line for line in lines)


def test_the_command_fetches_layers_alone(
    server: HubServer, model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repo("me/command").commit({"m.gguf": model.read_bytes()})
    args = ["split", f"{server.endpoint}/me/command/resolve/main/m.gguf", "--layers", "3:4"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    # and one that wants the whole, by another name
    shown = subprocess.run(
        [sys.executable, "-m", "sllm", "inspect", "hf.co/me/command"],
        check=True,
        env=environment,
        capture_output=True,
    )
    assert b"/m.gguf" in shown.stdout
    server.n_bytes = 0
    subprocess.run([sys.executable, "-m", "sllm", *args], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "m-layers-3-4.gguf").read_bytes() == exported(model, tmp_path, 3, 4)
    assert server.n_bytes < model.stat().st_size


@pytest.fixture(scope="module")
def model() -> pathlib.Path:
    return embedded.TARGET


def exported(model: pathlib.Path, folder: pathlib.Path, start: int, stop: int) -> bytes:
    out = folder / "expected.gguf"
    sllm.export_layers(model, out, start, stop)
    return out.read_bytes()


def test_layers_are_fetched_alone(
    server: HubServer, client: HubClient, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = model.read_bytes()
    commit = server.repo("me/layers").commit({"q8/model.gguf": data})
    server.n_bytes = 0
    path = client.export("hf://me/layers/q8/model.gguf", tmp_path / "part.gguf", 3, 5)
    assert path.read_bytes() == exported(model, tmp_path, 3, 5)
    log = server.log()
    assert log[0] == "HEAD /me/layers/resolve/main/q8/model.gguf"
    assert {line.split()[0] for line in log} == {"HEAD", "GET"}
    assert not any("/main/" in line for line in log if line.startswith("GET"))  # one commit for all pieces
    assert any(commit in line for line in log)


def test_layers_from_another_host_and_with_a_token(
    server: HubServer, home: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    repo = server.repo("me/secret-layers")
    repo.token = "hf_let_me_in"
    repo.commit({"model.gguf": model.read_bytes()})
    uri = "hf://me/secret-layers/model.gguf"
    with HubServer() as store, HubClient(server.endpoint, home, HF_TOKEN="hf_let_me_in") as allowed:
        server.moved = store
        try:
            path = allowed.export(uri, tmp_path / "part.gguf", 0, 1)
        finally:
            server.moved = None
        assert path.read_bytes() == exported(model, tmp_path, 0, 1)
        assert all("authorization" not in request.headers for request in store.requests)
        assert len(store.requests) > 1
    with (
        HubClient(server.endpoint, home) as stranger,
        pytest.raises(HubRefusedError, match="no token was sent"),
    ):
        stranger.export(uri, tmp_path / "other.gguf", 0, 1)
    assert not (tmp_path / "other.gguf").exists()


def test_layers_over_a_connection_that_breaks(
    server: HubServer, client: HubClient, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    server.repo("me/broken-layers").commit({"model.gguf": model.read_bytes()})
    server.drop_after += [1000, 0]
    path = client.export("hf://me/broken-layers/model.gguf", tmp_path / "part.gguf", 1, 2)
    assert server.drop_after == []
    assert path.read_bytes() == exported(model, tmp_path, 1, 2)


def test_layers_from_a_server_without_ranges(
    server: HubServer, client: HubClient, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    server.repo("me/whole").commit({"model.gguf": model.read_bytes()})
    server.no_ranges = True
    try:
        path = client.export("hf://me/whole/model.gguf", tmp_path / "part.gguf", 1, 2)
    finally:
        server.no_ranges = False
    assert path.read_bytes() == exported(model, tmp_path, 1, 2)


class Reply(BaseHTTPRequestHandler):
    """A mirror: a hub for HEAD, and for GET what a test makes of it."""

    protocol_version = "HTTP/1.1"
    size: ClassVar[int]
    answer: ClassVar[Callable[[Reply, int, int], None]]
    n_bytes: ClassVar[int]
    n_gets: ClassVar[int]

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.head(200, {"X-Repo-Commit": "0" * 40, "ETag": '"a"', "Content-Length": self.size})

    def do_GET(self) -> None:
        if "/resolve/" not in self.path:  # huggingface_hub asks for more than files
            return self.head(404, {"Content-Length": 0})
        type(self).n_gets += 1
        begin, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has left
            type(self).answer(self, int(begin), int(last) + 1)
        return None

    def head(self, status: int, headers: Mapping[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def body(self, n: int) -> None:
        while n > 0:
            self.wfile.write(b"x" * min(n, 1 << 16))
            type(self).n_bytes += min(n, 1 << 16)
            n -= 1 << 16

    def part(self, begin: int, end: int, sent: int | None = None, **headers: object) -> None:
        shown = {"Content-Range": f"bytes {begin}-{end - 1}/{self.size}", "Content-Length": end - begin}
        replaced = {name.replace("_", "-"): value for name, value in headers.items()}
        both = {name: value for name, value in {**shown, **replaced}.items() if value is not None}
        self.head(206, both)
        self.body(end - begin if sent is None else sent)


class Mirror:
    """Runs :class:`Reply` on loopback, and reads from it in this process."""

    def __init__(self, size: int, answer: Callable[[Reply, int, int], None]) -> None:
        attributes = {"size": size, "answer": answer, "n_bytes": 0, "n_gets": 0}
        self.handler: type[Reply] = type("Handler", (Reply,), attributes)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Mirror:
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        huggingface_hub.close_session()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def read_from(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """What is read of a file on a mirror."""

    def read(mirror: Mirror, begin: int, size: int) -> bytes:
        monkeypatch.setattr("time.sleep", lambda _seconds: None)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", mirror.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            mirror.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with hub.HubFile("hf://me/it/model.gguf", token=False).open() as file:
            file.seek(begin)
            return file.read(size)

    return read


GIB = 1 << 30


@pytest.mark.parametrize("announced", [True, False])
def test_a_mirror_without_ranges_fills_no_memory(read_from: Callable[..., bytes], announced: bool) -> None:
    def whole(reply: Reply, _begin: int, _end: int) -> None:
        reply.head(200, {"Content-Length": 64 * GIB} if announced else {"Connection": "close"})
        reply.body(64 * GIB)

    with Mirror(64 * GIB, whole) as mirror:
        with pytest.raises(ModelLoadError, match="ignores the Range header") as caught:
            read_from(mirror, 10 * GIB, 100)
        assert mirror.endpoint in str(caught.value)
        assert "HF_ENDPOINT" in str(caught.value)
        assert mirror.handler.n_gets == 1  # it will not be another time
        assert mirror.handler.n_bytes < 64 << 20


def test_a_small_file_comes_from_a_mirror_without_ranges(read_from: Callable[..., bytes]) -> None:
    data = bytes(range(256)) * 1000

    def whole(reply: Reply, _begin: int, _end: int) -> None:
        reply.head(200, {"Content-Length": len(data)})
        reply.wfile.write(data)

    with Mirror(len(data), whole) as mirror:
        assert read_from(mirror, 70_001, 100) == data[70_001:70_101]
        assert read_from(mirror, len(data) - 3, 100) == data[-3:]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda r, b, e: r.part(b, e, 5), "peer closed|bytes"),
        (lambda r, b, e: r.part(b, e, 5, Content_Length=5), "announced 5 bytes"),
        (lambda r, b, e: r.part(b, e, 5, Content_Length=None), "sent more or less than"),
        (lambda r, b, e: r.part(b, e, 8 * GIB, Content_Length=8 * GIB), "announced 8589934592 bytes"),
        (lambda r, b, e: r.part(b, e, 8 * GIB, Content_Length=None), "sent more or less than"),
        (lambda r, b, e: r.part(b + 1, e + 1), "sent another range"),
        (lambda r, b, e: r.part(b, e, Content_Range=f"bytes 0-{e - b - 1}/9"), "sent another range"),
        (lambda r, b, e: r.part(b, e, Content_Range=None), "sent another range"),
        (lambda r, b, e: r.part(b, e, Content_Range="bytes"), "sent another range"),
        (lambda r, b, e: r.part(b, e, Content_Range=f"bytes {'9' * 5000}-1/*"), "sent another range"),
        (lambda r, b, e: r.part(b, e, Content_Encoding="gzip"), "compresses what it sends"),
        (lambda r, b, e: r.head(204, {}), "sent another range"),
        (lambda r, b, e: r.head(416, {"Content-Length": 0}), "416"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for(
    read_from: Callable[..., bytes], answer: Callable[[Reply, int, int], None], words: str
) -> None:
    with Mirror(64 * GIB, answer) as mirror:
        with pytest.raises(ModelLoadError, match=words) as caught:
            read_from(mirror, 10 * GIB, 100)
        assert mirror.endpoint in str(caught.value)
        assert "\n" not in str(caught.value)
        assert mirror.handler.n_bytes < 64 << 20


def test_a_mirror_that_is_right_the_second_time(read_from: Callable[..., bytes]) -> None:
    turns = iter([5, None, None])
    with Mirror(64 * GIB, lambda r, b, e: r.part(b, e, next(turns))) as mirror:
        assert read_from(mirror, 10 * GIB, 100) == b"x" * 100
        assert mirror.handler.n_gets == 2


def test_layers_that_are_not_there(server: HubServer, client: HubClient, tmp_path: pathlib.Path) -> None:
    server.repo("me/none").commit({"model.gguf": b"GGUF\x03"})
    for uri, words in [
        ("hf://me/none/other.gguf", "no file 'other.gguf'"),
        ("hf://me/none@v2/model.gguf", "no revision 'v2'"),
        ("hf://me/nobody/model.gguf", "no repository me/nobody"),
        ("hf://me/none/model.gguf", "ends in its header"),
    ]:
        with pytest.raises(HubRefusedError, match=words):
            client.export(uri, tmp_path / "part.gguf", 0, 1)
        assert not (tmp_path / "part.gguf").exists()


def test_a_file_on_the_hub_says_where_it_is() -> None:
    file = hub.HubFile("hf://me/it@v1/folder/model-00001-of-00002.gguf")
    assert file.name == "model-00001-of-00002.gguf"
    assert str(file.with_name("b.gguf")) == "hf://me/it@v1/folder/b.gguf"
    assert "hf://me/it" in repr(file)
    assert hub.is_uri("hf://a/b/c")
    assert hub.is_uri(pathlib.Path("hf://a/b/c"))
    assert not hub.is_uri("a/b.gguf")
    with pytest.raises(ModelLoadError, match="owner, repository or file is missing"):
        hub.HubFile("hf://me")
    with pytest.raises(ModelLoadError, match="is not on the hub; expected hf://"):
        hub.HubFile("me/it.gguf")
