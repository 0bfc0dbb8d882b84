from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ("protocol", "padding")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    padding: bytes
    def __init__(self, protocol: _Optional[int] = ..., padding: _Optional[bytes] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("protocol", "features", "software", "model_name", "model_id", "vocab_fingerprint", "n_vocab", "n_ctx", "sessions", "n_params", "size_bytes", "max_prompt", "max_hint", "chat_template", "padding", "layers")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    N_VOCAB_FIELD_NUMBER: _ClassVar[int]
    N_CTX_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    N_PARAMS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_HINT_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    features: _containers.RepeatedScalarFieldContainer[str]
    software: str
    model_name: str
    model_id: str
    vocab_fingerprint: str
    n_vocab: int
    n_ctx: int
    sessions: int
    n_params: int
    size_bytes: int
    max_prompt: int
    max_hint: int
    chat_template: str
    padding: bytes
    layers: LayersInfo
    def __init__(self, protocol: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ..., model_name: _Optional[str] = ..., model_id: _Optional[str] = ..., vocab_fingerprint: _Optional[str] = ..., n_vocab: _Optional[int] = ..., n_ctx: _Optional[int] = ..., sessions: _Optional[int] = ..., n_params: _Optional[int] = ..., size_bytes: _Optional[int] = ..., max_prompt: _Optional[int] = ..., max_hint: _Optional[int] = ..., chat_template: _Optional[str] = ..., padding: _Optional[bytes] = ..., layers: _Optional[_Union[LayersInfo, _Mapping]] = ...) -> None: ...

class LayersInfo(_message.Message):
    __slots__ = ("n_layer", "n_embd", "start", "stop", "fixed", "output", "max_rows")
    N_LAYER_FIELD_NUMBER: _ClassVar[int]
    N_EMBD_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    n_layer: int
    n_embd: int
    start: int
    stop: int
    fixed: bool
    output: bool
    max_rows: int
    def __init__(self, n_layer: _Optional[int] = ..., n_embd: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., fixed: bool = ..., output: bool = ..., max_rows: _Optional[int] = ...) -> None: ...

class VocabularyRequest(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Up(_message.Message):
    __slots__ = ("open", "hint", "cancel", "padding")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    open: Open
    hint: Hint
    cancel: Cancel
    padding: bytes
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("tokens", "start", "sampling", "max_tokens", "run_ahead", "model_id", "require", "text_id")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUN_AHEAD_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_FIELD_NUMBER: _ClassVar[int]
    TEXT_ID_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    start: int
    sampling: Sampling
    max_tokens: int
    run_ahead: bool
    model_id: str
    require: _containers.RepeatedScalarFieldContainer[str]
    text_id: int
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., run_ahead: bool = ..., model_id: _Optional[str] = ..., require: _Optional[_Iterable[str]] = ..., text_id: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "penalty_last_n", "penalty_repeat", "penalty_freq", "penalty_present", "bias_tokens", "bias_values", "grammar", "seed", "json_schema", "noise")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PENALTY_LAST_N_FIELD_NUMBER: _ClassVar[int]
    PENALTY_REPEAT_FIELD_NUMBER: _ClassVar[int]
    PENALTY_FREQ_FIELD_NUMBER: _ClassVar[int]
    PENALTY_PRESENT_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalty_last_n: int
    penalty_repeat: float
    penalty_freq: float
    penalty_present: float
    bias_tokens: _containers.RepeatedScalarFieldContainer[int]
    bias_values: _containers.RepeatedScalarFieldContainer[float]
    grammar: str
    seed: int
    json_schema: str
    noise: str
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., penalty_last_n: _Optional[int] = ..., penalty_repeat: _Optional[float] = ..., penalty_freq: _Optional[float] = ..., penalty_present: _Optional[float] = ..., bias_tokens: _Optional[_Iterable[int]] = ..., bias_values: _Optional[_Iterable[float]] = ..., grammar: _Optional[str] = ..., seed: _Optional[int] = ..., json_schema: _Optional[str] = ..., noise: _Optional[str] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("pos", "tokens", "id", "parents")
    POS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    pos: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    id: int
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pos: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., id: _Optional[int] = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Down(_message.Message):
    __slots__ = ("opened", "commit", "done", "padding")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    commit: Commit
    done: Done
    padding: bytes
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("n_reused", "prompt_us", "queued_us")
    N_REUSED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_US_FIELD_NUMBER: _ClassVar[int]
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    n_reused: int
    prompt_us: int
    queued_us: int
    def __init__(self, n_reused: _Optional[int] = ..., prompt_us: _Optional[int] = ..., queued_us: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("pos", "tokens", "n_accepted", "n_verified", "own_draft", "pass_us", "hint_id", "hint_age_us")
    POS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    N_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    OWN_DRAFT_FIELD_NUMBER: _ClassVar[int]
    PASS_US_FIELD_NUMBER: _ClassVar[int]
    HINT_ID_FIELD_NUMBER: _ClassVar[int]
    HINT_AGE_US_FIELD_NUMBER: _ClassVar[int]
    pos: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    n_accepted: int
    n_verified: int
    own_draft: bool
    pass_us: int
    hint_id: int
    hint_age_us: int
    def __init__(self, pos: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., n_accepted: _Optional[int] = ..., n_verified: _Optional[int] = ..., own_draft: bool = ..., pass_us: _Optional[int] = ..., hint_id: _Optional[int] = ..., hint_age_us: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class LayersUp(_message.Message):
    __slots__ = ("open", "rows", "cancel", "padding")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    open: LayersOpen
    rows: Rows
    cancel: Cancel
    padding: bytes
    def __init__(self, open: _Optional[_Union[LayersOpen, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class LayersOpen(_message.Message):
    __slots__ = ("model_id", "start", "stop", "output", "codec", "sampling", "text_start", "sequence_id", "held", "next", "accept", "padding")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TEXT_START_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    start: int
    stop: int
    output: bool
    codec: str
    sampling: Sampling
    text_start: int
    sequence_id: int
    held: int
    next: Hop
    accept: bytes
    padding: bytes
    def __init__(self, model_id: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., output: bool = ..., codec: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., text_start: _Optional[int] = ..., sequence_id: _Optional[int] = ..., held: _Optional[int] = ..., next: _Optional[_Union[Hop, _Mapping]] = ..., accept: _Optional[bytes] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("host", "port", "fingerprint", "capability")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    fingerprint: bytes
    capability: bytes
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., capability: _Optional[bytes] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("pos", "n_rows", "data", "silent", "tokens", "n_select", "compute_us", "parents")
    POS_FIELD_NUMBER: _ClassVar[int]
    N_ROWS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_SELECT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    pos: int
    n_rows: int
    data: bytes
    silent: bool
    tokens: _containers.RepeatedScalarFieldContainer[int]
    n_select: int
    compute_us: int
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pos: _Optional[int] = ..., n_rows: _Optional[int] = ..., data: _Optional[bytes] = ..., silent: bool = ..., tokens: _Optional[_Iterable[int]] = ..., n_select: _Optional[int] = ..., compute_us: _Optional[int] = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class LayersDown(_message.Message):
    __slots__ = ("opened", "rows", "commit", "done", "padding")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    opened: LayersOpened
    rows: Rows
    commit: Commit
    done: Done
    padding: bytes
    def __init__(self, opened: _Optional[_Union[LayersOpened, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class LayersOpened(_message.Message):
    __slots__ = ("length", "n_ctx")
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    N_CTX_FIELD_NUMBER: _ClassVar[int]
    length: int
    n_ctx: int
    def __init__(self, length: _Optional[int] = ..., n_ctx: _Optional[int] = ...) -> None: ...

class FeedUp(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: Rows
    def __init__(self, rows: _Optional[_Union[Rows, _Mapping]] = ...) -> None: ...

class FeedDown(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("tokens", "start", "model_id", "padding")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    start: int
    model_id: str
    padding: bytes
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., model_id: _Optional[str] = ..., padding: _Optional[bytes] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("logprobs", "ranks", "n_reused", "compute_us", "padding")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    N_REUSED_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    n_reused: int
    compute_us: int
    padding: bytes
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., n_reused: _Optional[int] = ..., compute_us: _Optional[int] = ..., padding: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("uptime_s", "sessions", "queued", "sessions_total", "refused", "passes", "tokens", "drafted", "accepted", "prompt_tokens", "reused_tokens", "rows", "batch_sizes", "busy_s", "padding", "running", "own_drafted", "own_accepted")
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZES_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    OWN_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    OWN_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    uptime_s: float
    sessions: int
    queued: int
    sessions_total: int
    refused: int
    passes: int
    tokens: int
    drafted: int
    accepted: int
    prompt_tokens: int
    reused_tokens: int
    rows: int
    batch_sizes: _containers.RepeatedScalarFieldContainer[int]
    busy_s: float
    padding: bytes
    running: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    own_drafted: int
    own_accepted: int
    def __init__(self, uptime_s: _Optional[float] = ..., sessions: _Optional[int] = ..., queued: _Optional[int] = ..., sessions_total: _Optional[int] = ..., refused: _Optional[int] = ..., passes: _Optional[int] = ..., tokens: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., reused_tokens: _Optional[int] = ..., rows: _Optional[int] = ..., batch_sizes: _Optional[_Iterable[int]] = ..., busy_s: _Optional[float] = ..., padding: _Optional[bytes] = ..., running: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., own_drafted: _Optional[int] = ..., own_accepted: _Optional[int] = ...) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("n_prompt", "n_tokens", "n_passes", "n_drafted", "n_accepted", "seconds")
    N_PROMPT_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_PASSES_FIELD_NUMBER: _ClassVar[int]
    N_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    N_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    n_prompt: int
    n_tokens: int
    n_passes: int
    n_drafted: int
    n_accepted: int
    seconds: float
    def __init__(self, n_prompt: _Optional[int] = ..., n_tokens: _Optional[int] = ..., n_passes: _Optional[int] = ..., n_drafted: _Optional[int] = ..., n_accepted: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class EchoRequest(_message.Message):
    __slots__ = ("reply_bytes", "padding")
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    reply_bytes: int
    padding: bytes
    def __init__(self, reply_bytes: _Optional[int] = ..., padding: _Optional[bytes] = ...) -> None: ...

class EchoReply(_message.Message):
    __slots__ = ("padding",)
    PADDING_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    def __init__(self, padding: _Optional[bytes] = ...) -> None: ...
