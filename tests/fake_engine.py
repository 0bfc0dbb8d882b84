"""A serving engine on loopback over a model of ours: the HTTP of vLLM, SGLang and llama-server, as far as
:class:`sllm.EngineTarget` uses it, and what can go wrong with it.

The numbers are those of a context with the exactness conditions, so the text of a target over it is that of
:func:`oracles.one_by_one`.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
from oracles import EXACT, log_softmax, select

import sllm

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

APIS = ("vllm", "sglang", "llama-server")
FLOOR = float(np.finfo(np.float32).min)


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class FakeEngine:
    """An engine of one kind on a free port; a context manager.

    Args:
        model: computes.
        api: ``"vllm"``, ``"sglang"`` or ``"llama-server"``.
        max_logprobs: vLLM refuses more.
        slots: of llama-server.
        pace: seconds of one pass, in which all prompts of a request take part.
        n_ctx: positions of a text.
        api_key: what requests have to bring.
        keep_alive: seconds after which an idle connection is closed.

    Attributes:
        faults: what goes wrong with the next requests for log-probabilities, one entry each; None: nothing.
        n_requests, n_passes, n_computed: requests for log-probabilities, passes, and tokens computed.
        n_connections: that were accepted.
        hung_up: is set where a client leaves a request that ``"hang"`` keeps waiting, or a stream.
        shown: what of itself the engine shows otherwise than it is, by address.
        errors: what has gone wrong in here.

    """

    def __init__(
        self,
        model: sllm.Model,
        api: str,
        *,
        max_logprobs: int = 20,
        slots: int = 8,
        pace: float = 0.0,
        n_ctx: int = 1024,
        api_key: str | None = None,
        keep_alive: float = 30.0,
        plugin: bool = False,
    ) -> None:
        self.plugin = plugin
        self.model, self.api, self.pace, self.n_ctx = model, api, pace, n_ctx
        self.max_logprobs, self.slots, self.api_key, self.keep_alive = (
            max_logprobs,
            slots,
            api_key,
            keep_alive,
        )
        self.faults: list[str | None] = []
        self.shown: dict[str, Any] = {}
        self.bodies: list[dict[str, Any]] = []
        self.n_requests = self.n_passes = self.n_computed = self.n_connections = 0
        self.hung_up = threading.Event()
        self.errors: list[BaseException | None] = []
        self.connections: set[socket.socket] = set()
        self._context = model.context(n_ctx=n_ctx, **EXACT)
        self._rows: dict[tuple[int, ...], np.ndarray] = {}
        self._prompts: list[tuple[int, ...]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def drop_connections(self) -> None:
        """Close what is idle, as an engine does after some seconds."""
        for connection in list(self.connections):
            connection.shutdown(2)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(2)
        self._server.server_close()
        self._context.close()
        assert self.errors == []

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # ---- the numbers

    def logprobs(self, text: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the token after a text, float32 (n_vocab,)."""
        key = tuple(text)
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                logits = self._context.decode(np.array(key, dtype=np.int32), pos=0, logits="last")
                assert logits is not None
                row = self._rows[key] = log_softmax(logits).astype(np.float32)
                if len(self._rows) > 20_000:
                    self._rows.clear()
        return row

    def top(self, text: Sequence[int], k: int) -> list[tuple[int, float]]:
        """The k likeliest, equal ones in the order of their ids."""
        row = self.logprobs(text)
        best = np.lexsort((np.arange(len(row)), -row))[:k]
        return [(int(token), float(row[token])) for token in best]

    def n_cached(self, prompt: Sequence[int]) -> int:
        """How much of a prompt was computed before; from now on all of it was."""
        key, best = tuple(prompt), 0
        with self._lock:
            for other in self._prompts:
                n = 0
                while n < min(len(other), len(key) - 1) and other[n] == key[n]:
                    n += 1
                best = max(best, n)
            self._prompts = [*self._prompts[-63:], key]
            self.n_computed += len(key) - best
        return best

    def one_pass(self) -> None:
        with self._lock:
            self.n_passes += 1
        if self.pace:
            self._closing.wait(self.pace)

    def greedy(self, text: Sequence[int], n: int, ends: Sequence[int]) -> Iterator[int]:
        """The engine's own tokens, one for each pass."""
        grown = list(text)
        for _ in range(n):
            self.one_pass()
            token = self.top(grown, 1)[0][0]
            grown.append(token)
            yield token
            if token in ends:
                return

    def drawn(
        self, text: Sequence[int], n: int, ends: Sequence[int], sampling: sllm.SamplingParams
    ) -> Iterator[int]:
        """Tokens that the engine selects with its own noise, one for each pass."""
        grown = list(text)
        for _ in range(n):
            self.one_pass()
            token, _ = select(self.model, sampling, self.logprobs(grown), len(grown), grown, with_prob=False)
            grown.append(token)
            yield token
            if token in ends or self.model.vocab.is_eog(token):
                return

    # ---- what is answered

    def check(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, list) or not prompt or not all(type(t) is int for t in prompt):
            raise RefusalError(400, "a prompt is a list of token ids here")
        if not all(0 <= t < self.model.vocab.n_tokens for t in prompt):
            raise RefusalError(400, "Token id is out of vocabulary")
        if len(prompt) >= self.n_ctx:
            raise RefusalError(400, f"the prompt has {len(prompt)} tokens")
        return prompt

    def get(self, path: str) -> Any:
        """What stands at an address."""
        if path in self.shown:
            return self.shown[path]
        if path == "/v1/models":
            owner = {"vllm": "vllm", "sglang": "sglang", "llama-server": "llamacpp"}[self.api]
            more = {"max_model_len": self.n_ctx} if self.api == "vllm" else {}
            return {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner, **more}]}
        if (self.api, path) == ("vllm", "/version"):
            return {"version": "0.32.0"}
        if (self.api, path) == ("sglang", "/get_model_info"):
            return {"model_path": "the/model", "is_generation": True}
        if (self.api, path) == ("sglang", "/get_server_info"):
            return {
                "version": "0.5.9",
                "context_length": self.n_ctx,
                "disable_radix_cache": False,
                "enable_deterministic_inference": True,
            }
        if (self.api, path) == ("llama-server", "/props"):
            return {
                "default_generation_settings": {"n_ctx": self.n_ctx},
                "total_slots": self.slots,
                "model_path": "the/model.gguf",
                "build_info": "b9999-0000000",
            }
        raise RefusalError(404, "Not Found")

    def post(self, path: str, body: Any) -> Any:
        """The answer to a request; a generator: of events."""
        if path == "/tokenize":
            text = body["content"] if self.api == "llama-server" else body["prompt"]
            return {"tokens": self.model.vocab.encode(text, add_special=False).tolist()}
        self.bodies.append(body)
        if (self.api, path) == ("vllm", "/v1/completions"):
            return self._vllm(body)
        if (self.api, path) == ("sglang", "/generate"):
            return self._sglang(body)
        if (self.api, path) == ("llama-server", "/completion"):
            return self._llama(body)
        raise RefusalError(404, "Not Found")

    # vLLM

    def _vllm(self, body: dict[str, Any]) -> Any:
        xargs = body.get("vllm_xargs", {}) if self.plugin else {}
        if xargs.get("sllm_seed") == "?":
            raise RefusalError(400, "sllm_seed is '?', expected an integer from 0 to 18446744073709551615")
        if body["temperature"] > 0 or "sllm_seed" in xargs:
            return self._vllm_drawn(body)
        assert body["temperature"] == 0
        k = body["logprobs"]
        if k is not None and k > self.max_logprobs:
            raise RefusalError(
                400,
                f"Requested sample logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
                f" (parameter=logprobs, value={k})",
            )
        given = body["prompt"]
        prompts = [self.check(p) for p in (given if isinstance(given[0], list) else [given])]
        cached = [self.n_cached(p) for p in prompts]
        if body.get("prompt_logprobs"):
            return self._vllm_scores(prompts[0])
        ends = [] if body.get("ignore_eos") else body.get("stop_token_ids", [])

        def logprobs(text: list[int], tokens: Sequence[int]) -> dict[str, Any]:
            tops = []
            for i, token in enumerate(tokens):
                grown = [*text, *tokens[:i]]
                # The sampled token comes with the others where it is not among them.
                pairs = dict([*self.top(grown, k), (token, float(self.logprobs(grown)[token]))])
                tops.append({f"token_id:{t}": max(v, -9999.0) for t, v in pairs.items()})
            return {"tokens": [f"token_id:{t}" for t in tokens], "top_logprobs": tops}

        if body.get("stream"):

            def events() -> Iterator[Any]:
                grown = list(prompts[0])
                for token in self.greedy(prompts[0], self._room(prompts[0], body["max_tokens"]), ends):
                    rows = logprobs(grown, [token]) if k is not None else None
                    ids = {"token_ids": [token]} if body.get("return_token_ids") else {}
                    yield {"choices": [{"index": 0, "text": "", "logprobs": rows, **ids}]}
                    grown.append(token)
                yield {"choices": [], "usage": {}}

            return events()
        made = []
        if body["max_tokens"] == 1:
            self.one_pass()
            made = [[self.top(p, 1)[0][0]] for p in prompts]
        else:
            made = [list(self.greedy(p, self._room(p, body["max_tokens"]), ends)) for p in prompts]
        choices = [
            {"index": i, "text": "", "logprobs": logprobs(p, tokens)}
            for i, (p, tokens) in enumerate(zip(prompts, made, strict=True))
        ]
        return {
            "choices": choices,
            "usage": {"prompt_tokens_details": {"cached_tokens": cached[0] // 16 * 16}},
        }

    def _vllm_drawn(self, body: dict[str, Any]) -> Iterator[Any]:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        if "vllm_xargs" in body:
            given = {name: body["vllm_xargs"][f"sllm_{name}"] for name in names}
            sampling = sllm.SamplingParams(**{**given, "seed": int(given["seed"])})
        else:
            sampling = sllm.SamplingParams(noise="vllm", **{name: body[name] for name in names})
        prompt = self.check(body["prompt"])
        self.n_cached(prompt)
        for token in self.drawn(prompt, self._room(prompt, body["max_tokens"]), [], sampling):
            yield {"choices": [{"index": 0, "text": "", "logprobs": None, "token_ids": [token]}]}

    def _room(self, prompt: list[int], n: int) -> int:
        return min(n, self.n_ctx - len(prompt))

    def _vllm_scores(self, prompt: list[int]) -> Any:
        self.one_pass()
        rows: list[Any] = [None]
        for i in range(1, len(prompt)):
            row = self.logprobs(prompt[:i])
            value = float(row[prompt[i]])
            rows.append({str(prompt[i]): {"logprob": value, "rank": 1 + int((row > value).sum())}})
        return {"choices": [{"index": 0, "text": "", "prompt_logprobs": rows}]}

    # SGLang

    def _sglang(self, body: dict[str, Any]) -> Any:
        params, k = body["sampling_params"], body["top_logprobs_num"]
        if params["temperature"] > 0:
            return self._sglang_drawn(body)
        assert params["temperature"] == 0
        prompt = self.check(body["input_ids"])
        cached = self.n_cached(prompt)
        n = min(params["max_new_tokens"], self.n_ctx - len(prompt))
        ends = [] if params.get("ignore_eos") else params.get("stop_token_ids", [])

        def entry(text: Sequence[int], token: int) -> list[Any]:
            return [float(self.logprobs(text)[token]), token, None]

        def meta(tokens: list[int]) -> dict[str, Any]:
            grown = [[*prompt, *tokens[:i]] for i in range(len(tokens))]
            found: dict[str, Any] = {
                "completion_tokens": len(tokens),
                "cached_tokens": cached,
                "output_token_logprobs": [entry(g, t) for g, t in zip(grown, tokens, strict=True)],
                "output_top_logprobs": [[[v, t, None] for t, v in self.top(g, k)] for g in grown],
            }
            if body["logprob_start_len"] >= 0:
                places = range(body["logprob_start_len"] + 1, len(prompt))
                first = [[None, prompt[body["logprob_start_len"]], None]]
                found["input_token_logprobs"] = [*first, *(entry(prompt[:i], prompt[i]) for i in places)]
                found["input_top_logprobs"] = [
                    None,
                    *([[v, t, None] for t, v in self.top(prompt[:i], k)] for i in places),
                ]
            return found

        if body["stream"]:

            def events() -> Iterator[Any]:
                made: list[int] = []
                for token in self.greedy(prompt, n, ends):
                    made.append(token)
                    yield {"text": "", "output_ids": list(made), "meta_info": meta(made)}

            return events()
        tokens = list(self.greedy(prompt, n, ends))
        return {"text": "", "output_ids": tokens, "meta_info": meta(tokens)}

    def _sglang_drawn(self, body: dict[str, Any]) -> Iterator[Any]:
        params = body["sampling_params"]
        names = ("temperature", "top_k", "top_p", "min_p")
        given = {name: params[name] for name in names}
        sampling = sllm.SamplingParams(noise="sglang", seed=params["sampling_seed"], **given)
        prompt = self.check(body["input_ids"])
        self.n_cached(prompt)
        made: list[int] = []
        n = min(params["max_new_tokens"], self.n_ctx - len(prompt))
        for token in self.drawn(prompt, n, [], sampling):
            made.append(token)
            yield {"text": "", "output_ids": list(made), "meta_info": {"completion_tokens": len(made)}}

    # llama-server

    def _llama(self, body: dict[str, Any]) -> Any:
        assert body["temperature"] == 0
        k = body.get("n_probs", 0)
        biased = [token for token, _ in body.get("logit_bias", [])]
        given = body["prompt"]
        prompts = [self.check(p) for p in (given if isinstance(given[0], list) else [given])]
        cached = [self.n_cached(p) for p in prompts]
        vocab = self.model.vocab

        def entry(text: Sequence[int], token: int) -> dict[str, Any]:
            tops = [
                {"id": t, "token": "", "logprob": v if v > FLOOR else FLOOR} for t, v in self.top(text, k)
            ]
            return {"id": token, "token": "", "logprob": 0.0, "top_logprobs": tops}

        def whole(tokens: Sequence[int]) -> bool:
            data = b"".join(vocab.piece(t) for t in tokens)
            try:
                data.decode()
            except UnicodeDecodeError as error:
                return error.reason != "unexpected end of data"
            return True

        def made_of(prompt: list[int]) -> Iterator[int]:
            n = min(body["n_predict"], self.n_ctx - len(prompt))
            if not biased:
                for token in self.greedy(prompt, n, []):
                    yield token
                    if vocab.is_eog(token):
                        return
            else:
                yield from biased[:1]

        if body.get("stream"):

            def events() -> Iterator[Any]:
                made: list[int] = []
                for token in made_of(prompts[0]):
                    text = [*prompts[0], *made]
                    made.append(token)
                    if whole(made):
                        yield {
                            "index": 0,
                            "tokens": [token],
                            "stop": False,
                            "tokens_predicted": len(made),
                            **({"completion_probabilities": [entry(text, token)]} if k else {}),
                        }
                yield {"index": 0, "tokens": [], "stop": True, "tokens_predicted": len(made)}

            return events()
        if biased:  # a pass for as many prompts as there are slots
            for _ in range(-(-len(prompts) // self.slots)):
                self.one_pass()
        results = []
        for i, prompt in enumerate(prompts):
            tokens = list(made_of(prompt))
            shown = [j for j in range(len(tokens)) if whole(tokens[: j + 1])]
            result = {
                "index": i,
                "tokens": tokens,
                "completion_probabilities": [entry([*prompt, *tokens[:j]], tokens[j]) for j in shown],
                "timings/cache_n": cached[i],
            }
            results.append({name: result[name] for name in body["response_fields"] if name in result})
        return results if len(results) > 1 else results[0]


# ---- faults: each takes a good answer and makes a bad one


def spoilt(api: str, fault: str, value: Any) -> Any:
    """An answer with something wrong in it."""
    if fault == "shuffled":  # is none: places say where the rows belong
        rows = value.get("choices") if isinstance(value, dict) else value
        if isinstance(rows, list):
            rows.reverse()
        return value
    if fault == "fewer":
        if api == "sglang":
            value["meta_info"]["output_top_logprobs"] = []
            value["meta_info"]["input_top_logprobs"] = (value["meta_info"].get("input_top_logprobs") or [])[
                :1
            ]
        elif isinstance(value, dict):
            for name in ("choices", "tokens"):
                value.pop(name, None)
        else:
            value.pop()
        return value
    if fault == "same place twice":
        rows = value.get("choices", []) if isinstance(value, dict) else value
        for row in rows if isinstance(rows, list) else []:
            row["index"] = 0
        if api == "sglang" or not isinstance(rows, list) or len(rows) < 2:
            return spoilt(api, "fewer", value)
        return value
    if fault in ("nan", "missing", "twice", "stranger", "positive"):
        return _with_row(api, value, fault)
    raise AssertionError(fault)


def _with_row(api: str, value: Any, fault: str) -> Any:
    def change(pairs: list[list[Any]]) -> list[list[Any]]:
        if fault == "nan":
            pairs[0][1] = float("nan")
        if fault == "positive":
            pairs[0][1] = 3.0
        if fault == "missing":
            pairs = pairs[:-1]
        if fault == "twice":
            pairs[-1][0] = pairs[0][0]
        if fault == "stranger":
            pairs[-1][0] = 1 << 30
        return pairs

    if api == "vllm":
        row = value["choices"][0]["logprobs"]["top_logprobs"]
        pairs = change([[int(t.split(":")[1]), v] for t, v in row[0].items()])
        row[0] = {f"token_id:{t}": v for t, v in pairs}
    elif api == "sglang":
        row = value["meta_info"]["output_top_logprobs"]
        row[0] = [[v, t, None] for t, v in change([[t, v] for v, t, _ in row[0]])]
    else:
        result = value[0] if isinstance(value, list) else value
        row = result["completion_probabilities"][0]
        pairs = change([[top["id"], top["logprob"]] for top in row["top_logprobs"]])
        row["top_logprobs"] = [{"id": t, "token": "", "logprob": v} for t, v in pairs]
    return value


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 64

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.engine = engine

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client may leave within an answer
            self.engine.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.engine = self.server.engine
        self.timeout = self.engine.keep_alive  # type: ignore[misc]
        self.engine.n_connections += 1
        self.engine.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.engine.connections.discard(self.request)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: Any) -> None:
        engine = self.engine
        path = self.path.partition("?")[0]
        asks = body is not None and path != "/tokenize"
        fault = engine.faults.pop(0) if asks and engine.faults else None
        engine.n_requests += asks
        try:
            if engine.api_key is not None and self.headers["authorization"] != f"Bearer {engine.api_key}":
                raise RefusalError(401, "Unauthorized")
            if fault is not None and self._failed(fault):
                return
            value = engine.get(path) if body is None else engine.post(path, body)
            if fault is not None and fault.startswith("spoil ") and not hasattr(value, "__next__"):
                value = spoilt(engine.api, fault.removeprefix("spoil "), value)
        except RefusalError as refusal:
            self._send(
                refusal.status,
                json.dumps({"error": {"message": refusal.message, "code": refusal.status}}).encode(),
                refusal.headers,
            )
            return
        if hasattr(value, "__next__"):
            self._stream(value, fault)
        else:
            data = json.dumps(value).encode()
            if fault == "cut":
                self._send(200, data[: len(data) // 2], length=len(data))
                self.close_connection = True
            else:
                self._send(200, data)

    def _failed(self, fault: str) -> bool:
        """Whether a fault was all that there is to answer."""
        word, _, rest = fault.partition(" ")
        if word in ("429", "503"):
            raise RefusalError(int(word), "later", **({"Retry-After": rest} if rest else {}))
        if word.isdigit():
            raise RefusalError(int(word), rest)
        if word == "close":
            self.close_connection = True
            return True
        if word == "garbage":
            self._send(200, b"<html>{no JSON</html>")
            return True
        if word == "huge":
            self._send(200, b"[" + b" " * 2_000_000 + b"]")
            return True
        if word == "hang":
            self.connection.settimeout(60)
            if self.rfile.read(1) == b"":
                self.engine.hung_up.set()
            self.close_connection = True
            return True
        return False

    def _send(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterator[Any], fault: str | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        try:
            for n, event in enumerate(events):
                if fault == "cut" and n == 3:
                    self.close_connection = True
                    return
                if fault == "event garbage" and n == 3:
                    send(b"data: {no JSON\n\n")
                if n == 0 and fault is not None and fault.startswith("spoil "):
                    event = spoilt(self.engine.api, fault.removeprefix("spoil "), event)
                send(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.engine.api != "llama-server":
                send(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.engine.hung_up.set()
            raise
