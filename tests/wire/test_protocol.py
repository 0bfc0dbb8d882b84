"""What both ends of the link share: message sizes, sampling parameters, errors, and generated code that is
current.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples, select

import sllm
from sllm.engine.sampling import SamplingParams
from sllm.targets.tree import TokenTree
from sllm.wire import protocol
from sllm.wire.protocol import (
    OtherModelError,
    abort,
    failure,
    from_sampling,
    hint_parents,
    is_ending,
    not_offered,
    padded,
    pb,
    to_hint,
    to_sampling,
)
from sllm.worker.server import Limits

if TYPE_CHECKING:
    from sllm.engine.model import Model

WIRE = Path(protocol.__file__).parent

# ---- sizes -------------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=400)


def without_padding(message: Any) -> Any:
    bare = type(message)()
    bare.CopyFrom(message)
    bare.ClearField("padding")
    return bare


@examples(150)
@given(
    message=st.one_of(
        st.builds(
            lambda t, p, i: pb.Up(hint=pb.Hint(pos=p, tokens=t, id=i)), tokens, *[st.integers(0, 2**31)] * 2
        ),
        st.builds(lambda t: pb.Up(open=pb.Open(tokens=t)), tokens),
        st.builds(lambda t: pb.Down(commit=pb.Commit(tokens=t)), tokens),
        st.builds(lambda g: pb.Up(open=pb.Open(sampling=pb.Sampling(grammar=g))), st.text()),
        st.builds(lambda n: pb.EchoRequest(reply_bytes=n), st.integers(0, 2**32 - 1)),
        st.just(pb.Up(cancel=pb.Cancel())),
        st.just(pb.InfoRequest()),
    ),
    before=st.binary(max_size=200),
)
def test_a_message_takes_64_bytes_or_a_power_of_two(message: Any, before: bytes) -> None:
    bare = without_padding(message)
    message.padding = before  # what is there already counts for nothing
    data = padded(message).SerializeToString()
    assert len(data) >= 64
    assert len(data).bit_count() == 1
    assert len(data) <= max(64, 4 * bare.ByteSize())
    assert not any(message.padding)
    assert without_padding(type(message).FromString(data)) == bare
    assert padded(message).SerializeToString() == data


def test_every_size_can_be_padded() -> None:
    for size in [*range(400), *range(8150, 8200), *range(16340, 16400)]:
        message = padded(pb.InfoReply(software="x" * size))
        assert message.ByteSize().bit_count() == 1
        assert message.software == "x" * size


def test_the_largest_prompt_fits_under_the_limit_of_a_message() -> None:
    for n_ctx in (1, 256, 4096, 131072):
        opening = pb.Open(
            tokens=[2**31 - 1] * n_ctx,
            start=n_ctx,
            model_id="f" * 64,
            sampling=pb.Sampling(grammar="x" * Limits().max_grammar),
        )
        assert padded(pb.Up(open=opening)).ByteSize() <= protocol.size_limit(n_ctx)


# ---- sampling ----------------------------------------------------------------------------------------------

TINIEST = 2.0**-149  # float32 has no less

samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1e6) | st.sampled_from([0.0, 0.7, 1.0, 1e-44, 1e-60]),
    top_k=st.integers(0, 2**31 - 1) | st.sampled_from([0, 1, 40]),
    top_p=st.floats(TINIEST, 1),
    min_p=st.floats(0, 1),
    penalty_last_n=st.integers(0, 2**20),
    penalty_repeat=st.floats(TINIEST, 1e6) | st.sampled_from([1.0, 1.2]),
    penalty_freq=st.floats(-1e6, 1e6),
    penalty_present=st.floats(-1e6, 1e6),
    logit_bias=st.dictionaries(st.integers(0, 2559), st.floats(-1e6, 1e6) | st.just(-math.inf), max_size=8),
    grammar=st.sampled_from([None, None, 'root ::= [a-z ]{0,40} "。"?']),
    seed=st.integers(0, 2**64 - 1),
) | st.builds(SamplingParams, json_schema=st.sampled_from([{}, {"enum": ["é", 1]}, '{"type": "null"}']))


@examples(100)
@given(params=samplings, rng=st.integers(0, 2**32 - 1))
def test_sampling_parameters_select_the_same_after_the_wire(
    draft_model: Model, params: SamplingParams, rng: int
) -> None:
    data = to_sampling(params).SerializeToString()
    crossed = from_sampling(pb.Sampling.FromString(data))
    noise = np.random.default_rng(rng)
    history = noise.integers(0, draft_model.vocab.n_tokens, 20).tolist()
    for scale in (0.1, 5.0):
        logits = noise.normal(0, scale, draft_model.vocab.n_tokens).astype(np.float32)
        wanted, _ = select(draft_model, params, logits, 20, history, 20)
        assert select(draft_model, crossed, logits, 20, history, 20)[0] == wanted
    assert to_sampling(crossed).SerializeToString() == data  # a second crossing changes nothing


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -0.1},
        {"top_k": 2**32 - 1},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"penalty_last_n": 2**32 - 1},
        {"penalty_repeat": 0.0},
        {"penalty_freq": -math.inf},
        {"penalty_present": math.nan},
        {"bias_tokens": [1, 2]},
        {"bias_values": [1.0]},
        {"bias_tokens": [1], "bias_values": [math.nan]},
        {"bias_tokens": [1], "bias_values": [math.inf]},
        {"bias_tokens": [2**31], "bias_values": [1.0]},
        {"grammar": "  "},
        {"grammar": "a\0b"},
    ],
)
def test_sampling_parameters_out_of_range_are_value_errors(change: dict[str, Any]) -> None:
    message = to_sampling(SamplingParams())
    for name, value in change.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises(ValueError, match=next(iter(change)).partition("_")[0]):
        from_sampling(message)


def test_an_empty_sampling_message_is_refused() -> None:
    with pytest.raises(ValueError, match="top_p"):
        from_sampling(pb.Sampling())


# ---- hints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "parents"),
    [
        (TokenTree(), []),
        (TokenTree.chain([7, 7, 9]), []),
        (TokenTree((7, 8, 9, 7), (-1, -1, 1, 0)), [0, 0, 2, 1]),
    ],
)
def test_a_hint_is_the_same_after_the_wire(tree: TokenTree, parents: list[int]) -> None:
    given = None if tree.is_chain else tree.parents
    message = pb.Hint.FromString(to_hint(2**32 - 1, tree.tokens, given, 5).SerializeToString())
    assert (message.pos, list(message.tokens), message.id) == (2**32 - 1, list(tree.tokens), 5)
    assert list(message.parents) == parents
    assert TokenTree.of(message.tokens, hint_parents(message)) == tree


# ---- generated code ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What sllm.proto says, by the compiler of protobuf itself."""
    folder = tmp_path_factory.mktemp("proto")
    subprocess.run(
        [
            sys.executable,
            *("-W", "ignore"),
            *("-m", "grpc_tools.protoc"),
            f"-Isllm/wire={WIRE}",
            f"--descriptor_set_out={folder / 'set'}",
            f"--pyi_out={folder}",
            "sllm/wire/sllm.proto",
        ],
        check=True,
        timeout=120,
    )
    # Only the compiler writes what JSON calls a field.
    files = descriptor_pb2.FileDescriptorSet.FromString((folder / "set").read_bytes()).file
    assert len(files) == 1
    for message in files[0].message_type:
        for field in message.field:
            field.ClearField("json_name")
    return files[0], (folder / "sllm" / "wire" / "sllm_pb2.pyi").read_text()


def outline(source: str) -> dict[str, dict[str, str]]:
    """The classes of a stub file, with their annotated fields."""
    return {
        node.name: {
            ast.unparse(item.target): ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def test_the_generated_code_is_that_of_the_proto_file(descriptor: Any) -> None:
    wanted, _ = descriptor
    found = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(found)
    found.name = wanted.name
    assert found == wanted


def test_the_generated_types_are_those_of_the_proto_file(descriptor: Any) -> None:
    _, wanted = descriptor
    assert outline((WIRE / "sllm_pb2.pyi").read_text()) == outline(wanted)


def test_field_numbers_are_used_once_and_services_are_complete() -> None:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        numbers = [field.number for field in message.fields]
        assert len(set(numbers)) == len(numbers)
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert service.full_name == protocol.SERVICE
    assert protocol.method("Info") == "/sllm.v1.Worker/Info"


# ---- errors ------------------------------------------------------------------------------------------------


class AbortedError(Exception):
    """How a call ends."""


class Call:
    """The methods of a server's call that matter here."""

    trailing: tuple[tuple[str, str], ...] = ()

    def set_trailing_metadata(self, pairs: tuple[tuple[str, str], ...]) -> None:
        self.trailing = pairs

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise AbortedError(code, details)


class Failed(grpc.RpcError):
    """A call's failure, as a client sees it."""

    def __init__(
        self, code: grpc.StatusCode, details: str | None, trailing: tuple[tuple[str, Any], ...] = ()
    ) -> None:
        self._code, self._details, self._trailing = code, details, trailing

    def trailing_metadata(self) -> Any:
        return self._trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


def crossed(error: Exception) -> tuple[grpc.StatusCode, str, Exception | None]:
    """The status that an error becomes, and the error that this becomes."""
    call = Call()
    with pytest.raises(AbortedError) as caught:
        abort(call, error)  # type: ignore[arg-type]
    code, details = caught.value.args
    return code, details, failure(Failed(code, details, call.trailing), "host:1")


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (sllm.AuthError("wrong"), "UNAUTHENTICATED", sllm.AuthError),
        (sllm.BusyError("full"), "RESOURCE_EXHAUSTED", sllm.BusyError),
        (sllm.ContextFullError("long"), "OUT_OF_RANGE", sllm.ContextFullError),
        (not_offered(["tree"]), "UNIMPLEMENTED", sllm.UnsupportedModelError),
        (sllm.RemoteError("other"), "FAILED_PRECONDITION", sllm.RemoteError),
        (OtherModelError("other"), "FAILED_PRECONDITION", OtherModelError),
        (sllm.InferenceError("nan"), "ABORTED", sllm.InferenceError),
        (ValueError("no"), "INVALID_ARGUMENT", ValueError),
        (TypeError("no"), "INVALID_ARGUMENT", ValueError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), "INVALID_ARGUMENT", ValueError),
    ],
)
def test_a_refusal_comes_out_as_the_error_that_went_in(
    error: Exception, code: str, kind: type[Exception]
) -> None:
    status, details, found = crossed(error)
    assert status.name == code
    assert details == str(error)
    assert type(found) is kind
    assert str(error) in str(found)


@pytest.mark.parametrize("seconds", [None, 0.0, 0.25, 61.5])
def test_when_to_try_again_crosses(seconds: float | None) -> None:
    busy = sllm.BusyError("full")
    busy.retry_after = seconds
    _, _, found = crossed(busy)
    assert isinstance(found, sllm.BusyError)
    assert found.retry_after == seconds


@pytest.mark.parametrize("value", ["", "-5", "1.5", "nan", "9" * 40, "\u0663x", b"12", "soon"])
def test_nonsense_about_when_to_try_again_is_ignored(value: str | bytes) -> None:
    trailing = (("other", "1"), ("sllm-retry-after-ms", value))
    found = failure(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailing), "host:1")
    assert isinstance(found, sllm.BusyError)
    assert found.retry_after is None


def test_a_worker_that_ends_is_a_lost_link() -> None:
    status, _, found = crossed(sllm.ClosedError("the worker is ending"))
    assert status is grpc.StatusCode.UNAVAILABLE
    assert found is None


@pytest.mark.parametrize("error", [sllm.ClosedError("ending"), sllm.BusyError("full")])
def test_a_worker_says_itself_that_it_ends(error: Exception) -> None:
    call = Call()
    with pytest.raises(AbortedError) as caught:
        abort(call, error)  # type: ignore[arg-type]
    code, details = caught.value.args
    failed = Failed(code, details, call.trailing)
    assert is_ending(failed) == isinstance(error, sllm.ClosedError)
    # A proxy that has lost the worker says the same, but for that.
    assert not is_ending(Failed(grpc.StatusCode.UNAVAILABLE, "the worker is ending", ()))


def test_what_is_not_meant_for_clients_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    def look_up(name: str) -> NoReturn:
        raise KeyError(name)

    with pytest.raises(KeyError) as caught:
        look_up("a secret")
    status, details, found = crossed(caught.value)
    assert status is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert "KeyError" in details
    assert type(found) is sllm.RemoteError
    assert "KeyError at test_protocol.py" in caplog.text  # "see its log"
    assert "look_up" in caplog.text
    assert "secret" not in caplog.text  # a client may have sent it


def test_a_long_error_is_cut_to_what_fits_into_a_header() -> None:
    _, details, found = crossed(ValueError("ä" * 100_000))
    assert len(details) < 500
    assert details.endswith(" ...")
    assert isinstance(found, ValueError)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
@pytest.mark.parametrize("details", ["why", "", None])
def test_every_status_is_a_lost_link_or_an_error_of_this_package(
    code: grpc.StatusCode, details: str | None
) -> None:
    found = failure(Failed(code, details), "host:1")
    lost = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "DATA_LOSS"}
    assert (found is None) == (code.name in lost)
    assert found is None or type(found) is ValueError or isinstance(found, sllm.SllmError)


@pytest.mark.parametrize("details", ["Method not found!", "unknown service sllm.v1.Worker", ""])
def test_another_service_is_not_a_worker(details: str) -> None:
    found = failure(Failed(grpc.StatusCode.UNIMPLEMENTED, details), "host:1")
    assert isinstance(found, sllm.RemoteError)
    assert "not an sllm worker" in str(found)


@pytest.mark.parametrize(
    "details", ["Received message larger than max (9 vs. 4)", "SERVER: Sent message larger than max (9 vs 4)"]
)
def test_a_message_that_is_too_large_is_not_a_busy_worker(details: str) -> None:
    found = failure(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, details), "host:1")
    assert type(found) is ValueError
    assert (
        failure(Failed(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), "host:1") is None
    )


def test_a_missing_package_names_its_extra() -> None:
    """Without grpc sllm itself can be imported, and the part that needs it says what to install."""
    code = """
import sys
sys.modules["grpc"] = None
import sllm
try:
    sllm.connect
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the package grpc is missing" in ran.stdout
    assert "pip install 'sllm[remote]'" in ran.stdout
