"""``ms://`` names against a ModelScope on loopback. The real one has not been asked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from modelscope_server import ModelScopeServer

import sllm
from sllm import embedded
from sllm.engine import hub
from sllm.errors import ModelLoadError

DATA = bytes(range(256)) * 1200
URI = "ms://me/it/model.gguf"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelScopeServer]:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with ModelScopeServer() as site:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", site.endpoint)
        try:
            yield site
        finally:
            huggingface_hub.close_session()


def put(
    site: ModelScopeServer, files: dict[str, bytes], name: str = "me/it", revision: str = "master"
) -> None:
    site.repos[name, revision] = files


def refusal(uri: str, *words: str) -> str:
    """The text of the refusal, which is one line with ``words``."""
    with pytest.raises(ModelLoadError) as refused:
        hub.resolve(uri)
    text = str(refused.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


def test_a_file_comes_once(site: ModelScopeServer, tmp_path: Path) -> None:
    put(site, {"model.gguf": DATA, "README.md": b"x"})
    shares: list[float] = []
    path = hub.resolve(URI, progress=shares.append)
    assert path == tmp_path / "cache/modelscope/me/it/master/model.gguf"
    assert path.read_bytes() == DATA
    digest = hashlib.sha256(DATA).hexdigest()
    assert path.with_name("model.gguf.sha256").read_text(encoding="utf-8") == f"{digest}  model.gguf\n"
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert site.paths() == ["/api/v1/models/me/it/repo/files", "/api/v1/models/me/it/repo"]
    assert hub.resolve(Path(URI)) == path  # which has lost a slash
    assert site.paths() == ["/api/v1/models/me/it/repo/files"]  # is it still the same?
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.gguf", "model.gguf.sha256"]


def test_a_model_is_loaded_by_its_name(site: ModelScopeServer) -> None:
    put(site, {"folder/a b.gguf": embedded.DRAFT.read_bytes()})
    with sllm.Model("ms://me/it/folder/a b.gguf") as model:
        assert model.n_layer > 0
        assert model.path.name == "a b.gguf"


def test_another_file_of_the_same_name_is_fetched(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": b"old" * 9})
    assert hub.resolve(URI).read_bytes() == b"old" * 9
    put(site, {"model.gguf": b"new" * 9})
    assert hub.resolve(URI).read_bytes() == b"new" * 9


def test_revisions_and_quantisations(site: ModelScopeServer) -> None:
    put(site, {"it-Q4_K_M.gguf": b"4", "it-Q8_0.gguf": b"8"})
    put(site, {"it-Q8_0.gguf": b"later"}, revision="v1/b")
    assert hub.resolve("ms://me/it").read_bytes() == b"4"
    assert hub.resolve("ms://me/it:q8_0").read_bytes() == b"8"
    assert hub.resolve("ms://me/it@v1%2Fb:Q8_0").read_bytes() == b"later"
    text = refusal("ms://me/it:Q5_K_M", "has no GGUF file of Q5_K_M")
    assert text.endswith("name one of its own: ms://me/it:Q4_K_M, Q8_0")
    refusal("ms://me/it@v2:Q8_0", "no revision 'v2'")


def test_all_parts_of_a_split_model(site: ModelScopeServer) -> None:
    files = {f"q8/m-{i:05d}-of-00003.gguf": bytes([i]) * 1000 for i in (1, 2, 3)}
    put(site, {**files, "m-00001-of-00002.gguf": b"x"})
    shares: list[float] = []
    path = hub.resolve("ms://me/it/q8/m-00001-of-00003.gguf", progress=shares.append)
    assert all((path.parents[1] / name).read_bytes() == data for name, data in files.items())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert site.paths().count("/api/v1/models/me/it/repo/files") == 1
    refusal("ms://me/it/q8/m-00002-of-00003.gguf", "name the first part, ms://me/it/q8/m-00001-of-00003.gguf")
    refusal("ms://me/it/m-00001-of-00002.gguf", "no file 'm-00002-of-00002.gguf'")


def test_a_broken_download_goes_on_where_it_stopped(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    site.drop_after = [100_000, 150_000]
    assert hub.resolve(URI).read_bytes() == DATA
    ranges = [headers.get("range") for path, headers in site.requests if "FilePath" in path]
    assert ranges[0] is None
    begins = [int(found.removeprefix("bytes=").rstrip("-")) for found in ranges[1:] if found]
    assert len(begins) == 2
    assert 0 < begins[0] <= 100_000 < begins[1] <= 250_000


def test_a_download_that_was_given_up_goes_on_another_day(site: ModelScopeServer, tmp_path: Path) -> None:
    put(site, {"model.gguf": DATA})
    site.drop_after = [100_000] + [0] * 20
    refusal(URI, "MODELSCOPE_ENDPOINT")
    assert not list(tmp_path.rglob("model.gguf"))
    site.drop_after = []
    site.requests.clear()
    assert hub.resolve(URI).read_bytes() == DATA
    (found,) = [headers.get("range") for path, headers in site.requests if "FilePath" in path]
    assert found is not None and found != "bytes=0-"


def test_a_server_without_ranges_starts_again(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    site.drop_after, site.no_ranges = [100_000], True
    assert hub.resolve(URI).read_bytes() == DATA


def test_what_is_not_what_was_listed_is_refused(site: ModelScopeServer, tmp_path: Path) -> None:
    put(site, {"model.gguf": DATA})
    site.sums["model.gguf"] = "0" * 64
    refusal(URI, "SHA-256", "0" * 64, hashlib.sha256(DATA).hexdigest())
    assert not list(tmp_path.rglob("model.gguf"))
    del site.sums["model.gguf"]
    assert hub.resolve(URI).read_bytes() == DATA


def test_a_file_without_a_sum(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    site.sums["model.gguf"] = ""
    assert hub.resolve(URI).read_bytes() == DATA
    site.paths()
    hub.resolve(URI)
    assert site.paths() == ["/api/v1/models/me/it/repo/files"]


def test_two_at_once_download_once(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(hub.resolve(URI))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert site.paths().count("/api/v1/models/me/it/repo") == 1


def test_the_token_goes_to_the_site_alone(site: ModelScopeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site, {"model.gguf": DATA})
    site.tokens["me/it"] = "ms-secret"
    refusal(URI, "no repository me/it", "MODELSCOPE_API_TOKEN")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-other")
    assert "ms-other" not in refusal(URI, "no repository me/it")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    with ModelScopeServer() as store:
        store.stored[f"/store/{hashlib.sha256(DATA).hexdigest()}"] = DATA
        site.moved = store.endpoint
        site.drop_after, store.drop_after = [], [1000]
        assert hub.resolve(URI).read_bytes() == DATA
        assert len(store.requests) == 2
        for _, headers in store.requests:
            assert not headers.keys() & {"authorization", "cookie"}
    site.requests.clear()
    with pytest.raises(ModelLoadError):
        hub.HubFile(URI, token=False).open()
    assert all("ms-secret" not in str(headers) for _, headers in site.requests)
    with pytest.raises(ModelLoadError, match="the token is empty or holds"):
        hub.HubFile(URI, token="a\nb")


@pytest.mark.parametrize("status", [401, 403])
def test_access_refused(site: ModelScopeServer, status: int) -> None:
    site.status = status
    refusal(URI, "refused access, and no token was sent; set MODELSCOPE_API_TOKEN")


def test_what_is_not_there(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    refusal("ms://me/none/model.gguf", "no repository me/none")
    refusal("ms://me/it@v9/model.gguf", "no revision 'v9'")
    refusal("ms://me/it/other.gguf", "me/it has no file 'other.gguf' at revision 'master'")
    refusal("ms://me/it/../model.gguf", "'.' or '..'")
    refusal("ms://me", "owner, repository or file is missing")


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>",
        b"[]",
        b'{"Code": 200, "Data": {"Files": 3}}',
        b'{"Code": 200, "Data": null, "Message": "busy"}',
        b'{"Data": {"Files": [{"Path": "model.gguf", "Size": "big", "Type": "blob"}]}}',
        b'{"Data": {"Files": [{"Path": "model.gguf", "Size": 1e999, "Type": "blob"}]}}',
        b'{"Data": {"Files": [7]}}',
    ],
)
def test_a_site_that_is_another(site: ModelScopeServer, listing: bytes) -> None:
    put(site, {})
    site.listing = listing
    refusal(URI, "does not answer as ModelScope does", "MODELSCOPE_ENDPOINT")


@pytest.mark.parametrize(
    "path",
    [
        "../../it-Q8_0.gguf",
        "/it-Q8_0.gguf",
        "a/../../it-Q8_0.gguf",
        "a//it-Q8_0.gguf",
        "./it-Q8_0.gguf",
        "..\\it-Q8_0.gguf",
        "c:it-Q8_0.gguf",
        "it-Q8_0.gguf\0",
        "it\n-Q8_0.gguf",
    ],
)
def test_a_file_that_would_lie_elsewhere(site: ModelScopeServer, tmp_path: Path, path: str) -> None:
    """The site names the files, and must not choose where they are written."""
    put(site, {path: b"8", "fine-F16.gguf": b"16"})
    before = sorted(tmp_path.rglob("*"))
    for uri in ("ms://me/it:Q8_0", "ms://me/it:F16", f"ms://me/it/{path}"):
        with pytest.raises(sllm.ModelLoadError):
            hub.resolve(uri)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../it", "me/..", "../..", "./it", "me/."])
def test_a_repository_that_would_lie_elsewhere(site: ModelScopeServer, name: str) -> None:
    with pytest.raises(sllm.ModelLoadError):
        hub.resolve(f"ms://{name}/model.gguf")
    assert site.requests == []


def test_a_size_below_nothing(site: ModelScopeServer) -> None:
    put(site, {})
    site.listing = b'{"Data": {"Files": [{"Path": "model.gguf", "Size": -1, "Type": "blob"}]}}'
    refusal(URI, "-1 bytes")


def test_a_site_in_trouble_and_the_cache(site: ModelScopeServer) -> None:
    put(site, {"it-Q8_0.gguf": b"8"})
    path = hub.resolve("ms://me/it/it-Q8_0.gguf")
    site.status = 503
    assert hub.resolve("ms://me/it/it-Q8_0.gguf") == path
    assert hub.resolve("ms://me/it:Q8_0") == path
    refusal("ms://me/it/other.gguf", "HTTP status 503", "it is not in the cache")
    refusal("ms://me/none:Q8_0", "HTTP status 503")


def test_nobody_there(site: ModelScopeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:1")  # https, as a host alone means
    refusal(URI, "https://127.0.0.1:1 cannot be reached")


def test_a_folder_that_cannot_be_written(site: ModelScopeServer, tmp_path: Path) -> None:
    put(site, {"model.gguf": DATA})
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    refusal(URI, "cannot be written")


def test_layers_are_fetched_alone(site: ModelScopeServer, tmp_path: Path) -> None:
    data = embedded.TARGET.read_bytes()
    put(site, {"model.gguf": data})
    sllm.export_layers(URI, tmp_path / "part.gguf", 3, 4)
    sllm.export_layers(embedded.TARGET, tmp_path / "expected.gguf", 3, 4)
    assert (tmp_path / "part.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    asked = [headers["range"] for path, headers in site.requests if "FilePath" in path]
    assert asked
    n_bytes = 0
    for found in asked:
        begin, _, last = found.removeprefix("bytes=").partition("-")
        n_bytes += int(last) + 1 - int(begin)
    assert n_bytes < len(data)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_replaced_while_it_is_read(site: ModelScopeServer) -> None:
    put(site, {"model.gguf": DATA})
    with hub.HubFile(URI).open() as file:
        assert file.read(10) == DATA[:10]
        put(site, {"model.gguf": DATA[::-1]})
        site.drop_after = [0]
        file.seek(200_000)
        with pytest.raises(ModelLoadError, match="replaced by another file"):
            file.read(10)


def test_a_file_says_where_it_is(site: ModelScopeServer) -> None:
    file = hub.HubFile("ms://me/it@v1/folder/model-00001-of-00002.gguf")
    assert str(file.with_name("b.gguf")) == "ms://me/it@v1/folder/b.gguf"
    assert hub.is_uri(URI)
    assert site.requests == []


def test_a_page_of_the_site_is_told_what_is_meant() -> None:
    for uri in ("https://modelscope.cn/models/me/it", "https://www.modelscope.cn/models/me/it/summary"):
        with pytest.raises(ModelLoadError, match="ms:// in place of hf://"):
            hub.resolve(uri)
