"""Chinese names in prose: what the tagger finds and leaves, its weights, and what holds without them."""

from __future__ import annotations

import logging
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from privacy_prose import sentences
from taggers import Weights, contents, path_score, random_weights, scores, write

from sllm.engine.tagger import Tagger
from sllm.errors import ModelLoadError
from sllm.privacy import (
    CensusDetector,
    Detector,
    Finding,
    NameDetector,
    PatternDetector,
    TaggerDetector,
    Vault,
    data,
    default_detectors,
)
from sllm.privacy import detect as detect_module
from sllm.privacy.names import census, lac

with_weights = pytest.mark.skipif(lac.installed() is None, reason="the extra names is not installed")


with_lists = pytest.mark.skipif(census.installed() is None, reason="the extra names is not installed")


def found(text: str, *kinds: str) -> list[tuple[str, str]]:
    return [(one.kind, text[one.start : one.end]) for one in TaggerDetector(kinds or ("NAME",)).detect(text)]


# ---- what is found -----------------------------------------------------------------------------------------


def test_the_names_are_in_no_list() -> None:
    names = [one.text[start:end] for one in sentences("zh", clean=False) for start, end in one.names]
    assert len(set(names)) >= 300
    folder = Path(data.__file__).parent
    lists = "\n".join(
        path.read_text(encoding="utf-8") for path in folder.glob("*.*") if path.suffix in (".txt", ".json")
    )
    known = set(lists.split())
    assert not known & set(names)


@with_weights
def test_recall_of_names_in_prose() -> None:
    detector = TaggerDetector()
    hit: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in sentences("zh", clean=False):
        inside = {at for finding in detector.detect(one.text) for at in range(finding.start, finding.end)}
        for start, end in one.names:
            total[one.style] += 1
            hit[one.style] += inside.issuperset(range(start, end))
    assert set(total) == {"news", "microblog", "chat", "resume", "minutes"}
    assert sum(hit.values()) >= 0.85 * sum(total.values()), (hit, total)
    # Minutes have the names that are most like words: 桂林生, 代红旗.
    assert all(hit[style] >= 0.75 * n for style, n in total.items()), (hit, total)


@with_weights
def test_sentences_without_names_are_left_alone() -> None:
    clean = sentences("zh", clean=True)
    wrong = [one.text for one in clean if TaggerDetector().detect(one.text)]
    assert len(clean) >= 150
    assert len(wrong) <= 0.04 * len(clean), wrong


@with_weights
def test_places_and_organisations_are_asked_for() -> None:
    text = "柯慧珊在中国建设银行杭州分行上班，老家在苏州。"
    assert found(text) == [("NAME", "柯慧珊")]
    assert found(text, "ORG") == [("ORG", "中国建设银行杭州分行")]
    assert found(text, "PLACE") == [("PLACE", "苏州")]
    assert found(text, "NAME", "ORG", "PLACE") == [
        ("NAME", "柯慧珊"),
        ("ORG", "中国建设银行杭州分行"),
        ("PLACE", "苏州"),
    ]
    with pytest.raises(ValueError, match=r"unknown kinds \['PHONE'\]"):
        TaggerDetector(["PHONE"])


@with_weights
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("买买提·艾力昨天到了乌鲁木齐。", ["买买提·艾力"]),
        ("記者採訪了鄒明遠，他說這個問題還沒有解決。", ["鄒明遠"]),  # traditional characters
        ("請問營業時間？", []),
        ("单号 773182930412345 一直没有物流信息", []),
        ("QQ群怎么建", []),
        ("Ask Desmond Hargrove.", []),  # another language
        ("", []),
    ],
)
def test_found(text: str, expected: list[str]) -> None:
    assert [name for _, name in found(text)] == expected


@with_weights
def test_offsets_are_those_of_the_original() -> None:
    text = (
        "昨天\u200b，邹\u200b明远和\n申屠国栋来了。" * 30
        + "没有句号的一行" * 80
        + "，柯慧珊告诉记者，她会来。"
    )
    names = {text[one.start : one.end].replace("\u200b", "") for one in TaggerDetector().detect(text)}
    assert names == {"邹明远", "申屠国栋", "柯慧珊"}


@with_weights
def test_what_is_masked_already_changes_nothing() -> None:
    text = "经审理查明，被告人褚大伟伙同谷小军先后在六个小区盗窃。"
    name = text.index("褚大伟")
    masked = text[:name] + "\0\0\0" + text[name + 3 :]
    assert [found for found in found_names(text) if found != "褚大伟"] == found_names(masked)


def found_names(text: str) -> list[str]:
    return [name for _, name in found(text)]


@with_weights
def test_the_vault_masks_and_restores_them() -> None:
    vault = Vault()
    text = "昨天下午，柯慧珊告诉记者，她和邹明远已经谈妥了。柯慧珊还说下周签合同。"
    masked = vault.mask(text)
    assert "柯慧珊" not in masked.text and "邹明远" not in masked.text
    assert vault.counts == {"NAME": 2}
    assert vault.restore(masked.text) == text


# ---- English -----------------------------------------------------------------------------------------------


@with_lists
def test_recall_of_english_names_in_prose() -> None:
    detectors = (NameDetector(), CensusDetector())
    n_hit = n_all = 0
    for one in sentences("en", clean=False):
        ranges = [(each.start, each.end) for detector in detectors for each in detector.detect(one.text)]
        inside = {at for start, end in ranges for at in range(start, end)}
        for start, end in one.names:
            n_all += 1
            n_hit += all(at in inside or not one.text[at].isalnum() for at in range(start, end))
    assert n_all >= 130
    assert n_hit >= 0.75 * n_all
    clean = sentences("en", clean=True)
    wrong = [one.text for one in clean if any(detector.detect(one.text) for detector in detectors)]
    assert len(clean) >= 100
    assert len(wrong) <= 0.08 * len(clean), wrong


@with_lists
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I think Dwight Pomeroy broke it.", ["Dwight Pomeroy"]),
        ("I met Jennifer Lopez-Garcia yesterday", ["Jennifer Lopez-Garcia"]),
        ("We saw Keisha at the market.", ["Keisha"]),
        ("昨天 Dwight Pomeroy 来了。", ["Dwight Pomeroy"]),
        ("It was in April, in Georgia, near Victoria Street.", []),
        ("United Airlines cancelled flights.", []),
        ("def dwight(): return 1", []),
        ("", []),
    ],
)
def test_found_by_lists(text: str, expected: list[str]) -> None:
    assert [text[one.start : one.end] for one in CensusDetector().detect(text)] == expected


@with_lists
def test_other_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in census._FILES:
        (tmp_path / name).write_text("WILL 1 1 1\n")
    monkeypatch.setattr(census, "installed", lambda: tmp_path)
    census._lists.cache_clear()
    with pytest.raises(ImportError, match=r"not those of names 0\.3\.0"):
        CensusDetector()


@with_lists
@with_weights
def test_a_program_may_have_modules_of_the_same_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("names", "jieba"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert [type(one) for one in default_detectors()][2:] == [TaggerDetector, CensusDetector]


# ---- the weights -------------------------------------------------------------------------------------------


def reference() -> Weights:
    """The package's files, read without our converter: their numbers are at the end of each."""
    folder = lac.installed()
    assert folder is not None

    def numbers(name: str, *shape: int) -> np.ndarray:
        raw = (folder / "model_baseline" / name).read_bytes()
        return np.frombuffer(raw[-4 * int(np.prod(shape)) :], dtype="<f4").reshape(shape)

    def lines(name: str) -> dict[int, str]:
        split = [line.split("\t") for line in (folder / name).read_text(encoding="utf-8").split("\n")]
        return {int(line[0]): line[1] for line in split if len(line) == 2}

    labels, chars = lines("tag.dic"), {char: row for row, char in lines("word.dic").items()}
    width, n_in = 128, 128
    layers = []
    for layer in range(2):
        directions = []
        for n in (2 * layer, 2 * layer + 1):
            flat = numbers(f"gru_{n}.w_0", 3 * width * width)
            recurrent = np.concatenate(
                [
                    flat[: 2 * width * width].reshape(width, 2 * width),
                    flat[2 * width * width :].reshape(width, width),
                ],
                axis=1,
            )
            bias = numbers(f"fc_{n}.b_0", 3 * width) + numbers(f"gru_{n}.b_0", 3 * width)
            directions.append((numbers(f"fc_{n}.w_0", n_in, 3 * width).T, bias, recurrent.T))
        layers.append(directions)
        n_in = 2 * width
    crf = numbers("crfw", len(labels) + 2, len(labels))
    return Weights(
        labels=[labels[n] for n in range(len(labels))],
        rows={ord(char): row for char, row in chars.items() if len(char) == 1},
        unknown=chars["OOV"],
        embd=numbers("word_emb", max(chars.values()) + 1, 128),
        layers=layers,
        out=numbers("fc_4.w_0", 2 * width, len(labels)).T,
        out_bias=numbers("fc_4.b_0", len(labels)),
        crf=(crf[0], crf[1], crf[2:]),
    )


@with_weights
def test_labels_are_those_of_the_package_in_numpy() -> None:
    weights = reference()
    tagger = Tagger(lac.weights())
    assert tagger.labels == tuple(weights.labels)
    signs = str.maketrans({pair[0]: pair[1] for pair in data.words("chars_zh_same")})
    n_same = n_all = 0
    for one in [*sentences("zh", clean=False), *sentences("zh", clean=True)]:
        labels = tagger.run(one.text, [len(one.text)]).tolist()
        plain = one.text.translate(signs)
        plain = "".join(
            unicodedata.normalize("NFKC", char) if len(unicodedata.normalize("NFKC", char)) == 1 else char
            for char in plain
        )
        said = scores(weights, plain)
        best = path_score(weights, said)
        n_all += 1
        n_same += path_score(weights, said, labels) >= best - 1e-3 * abs(best)
    assert n_all >= 380
    assert n_same == n_all


@with_weights
def test_weights_are_made_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path))
    path = lac.weights()
    assert path.is_relative_to(tmp_path)
    made = path.stat().st_mtime_ns
    assert lac.weights().stat().st_mtime_ns == made
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    assert lac.weights().read_bytes() == whole  # a damaged one is made anew
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@with_weights
def test_a_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lac.installed()
    assert folder is not None
    shutil.copytree(folder, tmp_path / "lac_small")
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lac, "installed", lambda: tmp_path / "lac_small")
    target = tmp_path / "lac_small" / "model_baseline" / "crfw"
    raw = bytearray(target.read_bytes())
    raw[-1] ^= 1
    target.write_bytes(raw)
    with pytest.raises(ModelLoadError, match=r"not those of jieba 0\.42\.1"):
        lac.weights()
    for damaged in (b"", raw[:30], raw[:-4], b"\1" + raw[1:]):
        target.write_bytes(damaged)
        with pytest.raises(ModelLoadError, match="crfw is not a float32 tensor"):
            lac.weights()
    target.unlink()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        lac.weights()
    (tmp_path / "lac_small" / "word.dic").write_text("x\ty\n")
    with pytest.raises(ModelLoadError, match="not a numbered list"):
        lac.weights()
    assert not (tmp_path / "cache" / "taggers").exists()


# ---- without them ------------------------------------------------------------------------------------------


def test_without_the_packages_the_log_says_what_is_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(lac, "installed", lambda: None)
    monkeypatch.setattr(census, "installed", lambda: None)
    detect_module._tell_missing.cache_clear()
    census._lists.cache_clear()
    with caplog.at_level(logging.INFO, logger="sllm"):
        for _ in range(2):
            assert [type(one) for one in default_detectors()] == [PatternDetector, NameDetector]
    assert [record.message for record in caplog.records if "sllm[names]" in record.message] == [
        (
            "names are found only where a label, a title or 'my name is' announces them; those in prose need "
            "pip install 'sllm[names]'"
        )
    ]
    with pytest.raises(ImportError, match=r"jieba is missing, .* pip install 'sllm\[names\]'"):
        lac.weights()
    with pytest.raises(ImportError, match=r"names is missing, .* pip install 'sllm\[names\]'"):
        CensusDetector()


@with_weights
@with_lists
def test_with_the_packages_both_are_used() -> None:
    assert [type(one) for one in default_detectors()] == [
        PatternDetector,
        NameDetector,
        TaggerDetector,
        CensusDetector,
    ]


def test_weights_of_ones_own(tmp_path: Path) -> None:
    weights = random_weights(3)
    weights.labels = ["PER-B", "PER-I", "O", "LOC-B", "ORG-B"]
    path = write(tmp_path / "own.gguf", *contents(weights))
    detector = TaggerDetector(weights=path)
    assert isinstance(detector, Detector)
    text = "王一王二。" * 20
    for one in detector.detect(text):
        assert isinstance(one, Finding) and one.kind == "NAME" and 2 <= one.end - one.start <= 8
    with pytest.raises(ModelLoadError):
        TaggerDetector(weights=tmp_path / "nowhere.gguf")
