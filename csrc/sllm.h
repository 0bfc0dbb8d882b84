/*
 * sllm.h - the whole C ABI of sllm over llama.cpp.
 *
 * Rules that hold for every function here:
 *
 *  - Handles are opaque. A handle is freed once, by the function that its constructor names.
 *  - A function that returns `int` returns a status of `enum sllm_status`. On anything but SLLM_OK,
 *    sllm_last_error() holds one line of text for the calling thread, and every output is unspecified.
 *  - Buffers belong to the caller and are only used during the call, unless a comment says otherwise.
 *  - No C++ exception leaves a function. An assertion of llama.cpp that fires on the calling thread becomes
 *    SLLM_ERR_INTERNAL instead of ending the process.
 *  - No type, struct or constant of llama.cpp crosses this header, so that a change upstream is a compile error
 *    in csrc/ and never a wrong memory layout in Python.
 *  - Token ids, positions and sequence ids are int32_t. Arrays of sequences are "ragged": `lengths[i]` items for
 *    sequence i, laid end to end in one flat array.
 *
 * Copyright (c) 2026 the sllm authors. MIT licence.
 */
#ifndef SLLM_H
#define SLLM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

enum sllm_status {
    SLLM_OK = 0,
    SLLM_ERR_INVALID = 1,     /* an argument is wrong; nothing was done */
    SLLM_ERR_LOAD = 2,        /* the file is missing, unreadable or not a model */
    SLLM_ERR_UNSUPPORTED = 3, /* the model cannot do this */
    SLLM_ERR_FULL = 4,        /* the tokens do not fit into the context; nothing was decoded */
    SLLM_ERR_BUSY = 5,        /* another thread is inside this context */
    SLLM_ERR_CANCELLED = 6,   /* sllm_context_cancel() was called meanwhile */
    SLLM_ERR_INTERRUPTED = 7, /* the interrupt or progress callback asked to stop */
    SLLM_ERR_COMPUTE = 8,     /* llama.cpp could not compute the batch */
    SLLM_ERR_NO_MEMORY = 9,   /* an allocation failed */
    SLLM_ERR_GRAMMAR = 10,    /* the tokens so far do not match the grammar, or it takes too much */
    SLLM_ERR_INTERNAL = 11,   /* an assertion of llama.cpp or an unexpected exception */
    SLLM_ERR_CLOSED = 12      /* sllm_context_close() was called before */
};

typedef struct sllm_model sllm_model;
typedef struct sllm_context sllm_context;
typedef struct sllm_sampling sllm_sampling;
typedef struct sllm_tagger sllm_tagger;

/* ---- status.cpp: errors, log, build ------------------------------------------------------------------- */

/* The text of the last failure on this thread; valid until the next call on this thread. Never NULL. */
const char * sllm_last_error(void);

const char * sllm_version(void);
const char * sllm_llama_cpp_commit(void);
/* CPU features and backends that this build was compiled with (llama_print_system_info). */
const char * sllm_system_info(void);

/* Load the backend in the module at `path` (ggml_backend_load), for builds that link none in; before
 * anything that computes, since no device is known until then. Loading one again does nothing.
 * SLLM_ERR_LOAD: the module cannot be loaded, or not for this machine. */
int sllm_backend_load(const char * path);

/* Polled on the calling thread about every 100 ms during a decode. It returns 0 to go on, 1 to stop the
 * decode with SLLM_ERR_INTERRUPTED, 2 to go on and never be asked again on this thread. */
typedef int (*sllm_interrupt_callback)(void * user_data);
void sllm_set_interrupt_callback(sllm_interrupt_callback callback, void * user_data);

/* For the end of the process: stops every computation and load, refuses new ones, and waits up to two
 * seconds until no thread is inside. Static objects of llama.cpp are destroyed after that. */
void sllm_shutdown(void);

/* llama.cpp's log. Lines at `min_level` (1 debug, 2 info, 3 warning, 4 error) and above are kept, the
 * newest 1000 of them, until sllm_log_next() takes them, oldest first: it returns the level and fills
 * `text` (cut to `size` bytes, always terminated), or returns 0 when no line is left. */
void sllm_log_set_level(int32_t min_level);
int32_t sllm_log_next(char * text, int32_t size);

/* ---- model.cpp: devices, models, vocabularies --------------------------------------------------------- */

struct sllm_device_info {
    char name[64];
    char description[128];
    int32_t type; /* 0 CPU, 1 GPU, 2 integrated GPU, 3 accelerator, 4 other */
    uint64_t memory_free;
    uint64_t memory_total;
};

int32_t sllm_device_count(void);
/* SLLM_ERR_INVALID: no such index. */
int sllm_device_get(int32_t index, struct sllm_device_info * info);

/* Returns 0 to cancel the load (SLLM_ERR_INTERRUPTED). `progress` runs from 0 to 1. */
typedef int (*sllm_progress_callback)(float progress, void * user_data);

/* A piece of a file that is put together from others. */
struct sllm_piece {
    int32_t file; /* index into `files`, or -1: zeros */
    uint64_t offset;
    uint64_t size;
};

/*
 * A model, or with `header` the layers of one: a GGUF file that exists nowhere as a whole. It begins with
 * the `header_size` bytes of `header`, and `pieces` of the open `files` follow; the weights are read from
 * these and into memory, nothing else is. Its input are hidden states (rows of n_embd numbers). Its output
 * are those after its last layer, or with `has_output` logits; it then shares the vocabulary of
 * `vocabulary`. `header` and `pieces` are used during the load alone. No `use_mmap` then.
 */
struct sllm_model_params {
    const char * path; /* with `header`: not used */
    const uint8_t * header;
    uint64_t header_size;
    const struct sllm_piece * pieces;
    int32_t n_pieces;
    const int32_t * files; /* file descriptors */
    int32_t n_files;
    int32_t has_output;
    const char * input;            /* of layers: the graph's tensor that hidden states replace; NULL: they are the batch's embeddings */
    const char * layer_output;     /* of layers: the graph's tensor behind each, without "-NUMBER" */
    const sllm_model * vocabulary; /* or NULL */
    int32_t n_gpu_layers;          /* negative: all */
    int32_t split_mode;            /* 0 none, 1 layer, 2 row */
    int32_t main_gpu;
    int32_t use_mmap;
    int32_t use_mlock;
    int32_t check_tensors;
    int32_t vocab_only;
    int32_t load_mtp;        /* the heads for multi-token prediction, too, where the file has them; with `header`: how many it has */
    const int32_t * devices; /* indices for sllm_device_get() or of sllm_rpc_add_server(); NULL: all of the former */
    int32_t n_devices;
    const float * tensor_split; /* n_tensor_split proportions, or NULL */
    int32_t n_tensor_split;
    sllm_progress_callback progress; /* or NULL */
    void * progress_user_data;
};

/* How the memory of a sequence takes tokens back. */
enum sllm_rollback {
    SLLM_ROLLBACK_ANY = 0,        /* attention: any number of them, at no cost */
    SLLM_ROLLBACK_SNAPSHOTS = 1,  /* the states after the last tokens of a decode are kept */
    SLLM_ROLLBACK_CHECKPOINTS = 2 /* an earlier state is put back, and what follows is computed again */
};

struct sllm_model_info {
    int32_t n_layer;
    int32_t n_embd;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_ctx_train;
    int32_t n_swa;
    int32_t n_vocab;
    int32_t vocab_type; /* 0: the file has no vocabulary */
    int32_t bos;        /* special tokens: -1 where the file has none */
    int32_t eos;
    int32_t eot;
    int32_t pad;
    int32_t made_up; /* the ordinary token that llama.cpp takes for an EOS which the file does not name, or -1 */
    int32_t add_bos;
    int32_t add_eos;
    int32_t space_prefix; /* a text is tokenised with a space before it */
    int32_t n_mtp;        /* heads for multi-token prediction that were loaded */
    int32_t rollback;     /* enum sllm_rollback: what a context can have */
    uint64_t size_bytes;
    uint64_t n_params;
};

/* SLLM_ERR_LOAD: not a model that llama.cpp can run; SLLM_ERR_UNSUPPORTED: an encoder or a diffusion model;
 * SLLM_ERR_INVALID: a parameter; SLLM_ERR_INTERRUPTED: `progress` returned 0; SLLM_ERR_NO_MEMORY. `*out` is
 * freed by sllm_model_free(). */
int sllm_model_load(const struct sllm_model_params * params, sllm_model ** out);
void sllm_model_free(sllm_model * model);
void sllm_model_get_info(const sllm_model * model, struct sllm_model_info * info);

/* Texts: each writes at most `size` bytes including the terminator and returns the whole length without it,
 * or -1 when there is no such thing. Call with size 0 to learn the length. */
int32_t sllm_model_desc(const sllm_model * model, char * text, int32_t size);
int32_t sllm_model_meta_count(const sllm_model * model);
int32_t sllm_model_meta_key(const sllm_model * model, int32_t index, char * text, int32_t size);
int32_t sllm_model_meta_value(const sllm_model * model, int32_t index, char * text, int32_t size);
/* `name` NULL: the default template. */
int32_t sllm_model_chat_template(const sllm_model * model, const char * name, char * text, int32_t size);

/* Tokenise `size` bytes of UTF-8. Writes at most `capacity` tokens and stores the whole number in
 * `n_tokens` (call again with a larger buffer if it is more). Any number of threads at once.
 * SLLM_ERR_UNSUPPORTED: the file has no vocabulary, or one that llama.cpp would never come to an end with. */
int sllm_tokenize(const sllm_model * model, const char * text, int32_t size, int32_t add_special, int32_t parse_special, int32_t * tokens,
                  int32_t capacity, int32_t * n_tokens);
/* The bytes of one token; control tokens give nothing unless `special`. Stores the whole length in
 * `n_bytes`.
 * SLLM_ERR_INVALID: no such token. */
int sllm_token_piece(const sllm_model * model, int32_t token, int32_t special, char * bytes, int32_t capacity, int32_t * n_bytes);
/* The bytes of many tokens as one text: their pieces, joined. With `space_prefix`, the space before the
 * first is left out, unless the tokens go on a text (`goes_on`). Stores the whole length in `n_bytes`.
 * SLLM_ERR_INVALID: an id outside the vocabulary. */
int sllm_detokenize(const sllm_model * model, const int32_t * tokens, int32_t n_tokens, int32_t special, int32_t goes_on, char * bytes,
                    int32_t capacity, int32_t * n_bytes);
/* Bits: 1 control, 2 end of generation by the file, 4 byte, 8 user-defined, 16 unused, 32 unknown. -1: no such token. */
int32_t sllm_token_attr(const sllm_model * model, int32_t token);
/* The tokens that have one of these bits, in order. Writes at most `capacity` and returns how many there are. */
int32_t sllm_tokens_with(const sllm_model * model, int32_t bits, int32_t * tokens, int32_t capacity);
/* Further ends of generation, at most 8: what ends a turn in the model's chat template. They replace those of
 * the call before. Any number of threads at once. */
int sllm_model_end_turns(sllm_model * model, const int32_t * tokens, int32_t n_tokens);

/* ---- select.cpp: seeded selection --------------------------------------------------------------------- */

/* What a grammar says of the next token. */
enum sllm_allowed {
    SLLM_ALLOWED_ALL = 0,     /* `allowed` has the bit of every token */
    SLLM_ALLOWED_SOME = 1,    /* of the tokens asked for alone */
    SLLM_ALLOWED_FAILED = 2,  /* the text does not match, or the grammar takes too much; `why` says so */
    SLLM_ALLOWED_STOPPED = 3, /* an exception was raised on this thread, a KeyboardInterrupt for example */
};

/* Which tokens may come after the generated text of `n_text` tokens: sets bit v % 32 of allowed[v / 32] for each such token v, in
 * a buffer of zeros for the whole vocabulary. Whoever asks for some tokens alone names `n_asked` of them (0: all are needed).
 * `why` is a text of at most `size` bytes with the terminator. Called on the thread that selects. */
typedef int (*sllm_grammar_callback)(void * user_data, const int32_t * text, int32_t n_text, const int32_t * asked, int32_t n_asked,
                                     uint32_t * allowed, char * why, int32_t size);

/* Whose noise selects, and with it whose filters, in whose order and arithmetic: see csrc/engine_noise.cpp. */
enum sllm_noise {
    SLLM_NOISE_SLLM = 0,
    SLLM_NOISE_VLLM = 1,   /* vLLM's, of its second model runner, for requests with a seed */
    SLLM_NOISE_SGLANG = 2, /* SGLang's, with --enable-deterministic-inference */
};

struct sllm_sampling_params {
    int32_t noise;          /* an sllm_noise */
    float temperature;      /* 0: argmax */
    int32_t top_k;          /* 0: off */
    float top_p;            /* 1: off */
    float min_p;            /* 0: off */
    int32_t penalty_last_n; /* 0: no penalties */
    float penalty_repeat;   /* 1: off */
    float penalty_freq;     /* 0: off */
    float penalty_present;  /* 0: off */
    uint64_t seed;
    const int32_t * bias_tokens; /* n_bias of each, or NULL */
    const float * bias_values;
    int32_t n_bias;
    sllm_grammar_callback grammar; /* or NULL */
    void * grammar_user_data;
};

/* Selection, compiled for one vocabulary. The token at position `pos` is the argmax over the surviving
 * candidates v of logit(v) / temperature + G(seed, pos, v), with G standard Gumbel noise from a
 * counter-based hash (Gumbel-max trick), so it is a sample of the filtered softmax, and the same sample for
 * everybody who has the same logits. Candidates survive llama.cpp's samplers in llama.cpp's order: logit
 * bias, penalties, grammar, top-k, top-p, min-p. With the noise of another engine it is the token that this engine
 * would select. Immutable: any number of contexts and threads may use it.
 * SLLM_ERR_INVALID: a parameter out of range, or one that another engine's noise does not go with; SLLM_ERR_UNSUPPORTED: a
 * grammar, and no vocabulary or no token that ends a text. `*out` is freed by sllm_sampling_free(), and `grammar` may be called until then. */
int sllm_sampling_new(const sllm_model * model, const struct sllm_sampling_params * params, sllm_sampling ** out);
void sllm_sampling_free(sllm_sampling * sampling);

/* One selection from one row of n_vocab logits, for tests and for loops of one's own. `history` are the
 * tokens at positions 0..pos-1, of which those from `start` on are generated text (what the grammar sees).
 * `prob` (or NULL) receives the probability of the token under the filtered distribution.
 * SLLM_ERR_INVALID: another number of logits than tokens;
 * SLLM_ERR_GRAMMAR: `history` does not match the grammar; SLLM_ERR_COMPUTE: no token can be selected. */
int sllm_select(const sllm_sampling * sampling, const float * logits, int32_t n_vocab, int32_t pos, const int32_t * history, int32_t start,
                int32_t * token, float * prob);

/* ---- certify.cpp: selection from the likeliest tokens of a row ---------------------------------------- */

/* Whether the likeliest tokens of a position decide what the whole row would select. */
enum sllm_certainty {
    SLLM_UNDECIDED = 0, /* another token might be selected: more of the likeliest are needed */
    SLLM_DECIDED = 1,   /* all that survive the filters are among them */
    SLLM_CERTIFIED = 2, /* others may survive, and none can be selected with the noise that it has */
};

/* What sllm_select() would select from a row of logits of which `n` log-probabilities are known (natural logarithms, under the softmax of
 * the whole row at temperature 1), those of its `n` likeliest tokens, in any order. Of tokens as likely as the last of these the caller has
 * said which come first. The token is an argmax of logit / temperature + G, and so certain where the best known score is above that of any
 * other token with the logit of the n-th and the noise of its own. `history`, `pos` and `start` as for sllm_select(). `token` receives -1
 * where *how is SLLM_UNDECIDED. `lead` (or NULL) receives, with the noise of another engine and a temperature, by how much the token's score
 * is above any other's: how much that engine's own rounding may do without another token coming of it.
 * SLLM_ERR_INVALID: a token twice or outside the vocabulary, NaN, a log-probability above 0, or more than 1 in all;
 * SLLM_ERR_UNSUPPORTED: penalty_repeat, which depends on the logits themselves; SLLM_ERR_GRAMMAR, SLLM_ERR_COMPUTE: as sllm_select(). */
int sllm_select_known(const sllm_sampling * sampling, const int32_t * tokens, const float * logprobs, int32_t n, int32_t pos,
                      const int32_t * history, int32_t start, int32_t * token, int32_t * how, double * lead);

/* The noise of the selection, G(seed, pos, token). */
double sllm_gumbel(uint64_t seed, int32_t pos, int32_t token);

/* That of another engine for the token at `pos`: of vLLM for a token, of SGLang for the place of a token among those sorted by
 * falling probability, from 0 on. NaN for another `noise`. */
double sllm_engine_gumbel(int32_t noise, uint64_t seed, int32_t pos, int32_t index);

/* For tests: how many variants of the code over rows of logits, and of the tagger's, this machine can run,
 * each for another instruction set, and a way to use one of them (0: for any machine; the last one: the
 * default) in the whole process. All select the same tokens and labels. */
int32_t sllm_row_codes(void);
void sllm_use_row_code(int32_t index);

/* ---- context.cpp, memory.cpp: contexts and their memory -------------------------------------------------------- */

struct sllm_context_params {
    uint32_t n_ctx;    /* positions in all; shared out over the sequences unless kv_unified */
    uint32_t n_batch;  /* tokens per llama_decode() */
    uint32_t n_ubatch; /* tokens per computed graph */
    uint32_t n_seq_max;
    uint32_t n_outputs_max;  /* rows of logits per llama_decode() */
    uint32_t n_rollback;     /* tokens that snapshots can take back, at most 64; each costs state_bytes for every sequence */
    uint64_t state_bytes;    /* the recurrent state of one sequence, to see whether it all fits; 0: not known */
    int32_t n_threads;       /* for one token */
    int32_t n_threads_batch; /* for more than one token */
    int32_t flash_attn;      /* -1 auto, 0 off, 1 on */
    const char * type_k;     /* ggml's name of a type: "f16", "q8_0", ... */
    const char * type_v;
    int32_t offload_kqv;
    int32_t kv_unified;
};

/* The values in force, which llama.cpp may have rounded. */
struct sllm_context_info {
    uint32_t n_ctx;
    uint32_t n_ctx_seq; /* positions that one sequence can hold */
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_outputs_max;
    int32_t n_vocab;
    int32_t rollback;     /* enum sllm_rollback */
    uint32_t n_rollback;  /* 0 without snapshots */
    uint64_t state_bytes; /* the recurrent state of one sequence, without snapshots of it; 0 before anything was decoded */
};

/* The context starts with one reference, the caller's. sllm_context_release() drops one; the last frees it.
 * Handles may be freed in any order. A view of the logits holds a reference of its own
 * (sllm_context_retain).
 * SLLM_ERR_INVALID: a parameter that is out of range or that the model does not go with;
 * SLLM_ERR_NO_MEMORY: the KV cache does not fit; SLLM_ERR_UNSUPPORTED: the model keeps no memory of tokens. */
int sllm_context_new(sllm_model * model, const struct sllm_context_params * params, sllm_context ** out);
/* Cancel the call inside, wait for it, and free everything but the handle itself (and the logits, while
 * views hold references); every later call returns SLLM_ERR_CLOSED. SLLM_ERR_BUSY: the call inside is this
 * thread's own (a callback). */
int sllm_context_close(sllm_context * context);
void sllm_context_retain(sllm_context * context);
void sllm_context_release(sllm_context * context);
void sllm_context_get_info(const sllm_context * context, struct sllm_context_info * info);
/* SLLM_ERR_INVALID: not in 1..512; SLLM_ERR_BUSY; SLLM_ERR_CLOSED. */
int sllm_context_set_threads(sllm_context * context, int32_t n_threads, int32_t n_threads_batch);

/* Ends the call that is now inside the context on another thread, within one graph node on the CPU and one
 * ubatch elsewhere. No call inside: nothing happens. The memory goes back to its committed length. */
void sllm_context_cancel(sllm_context * context);

/*
 * The memory of a sequence is a cache of its tokens. It has a committed length, and after it there may be
 * tokens that were drafted. Writing at position p makes everything at or after p void; a write that repeats
 * what is cached there computes nothing. Where the memory cannot take back so few tokens (enum
 * sllm_rollback), what is missing is computed again at the next write; layers, which have no tokens to do
 * that from, then have a shorter length.
 * All of them: SLLM_ERR_INVALID: no such sequence or position; SLLM_ERR_BUSY; SLLM_ERR_CLOSED.
 */
int sllm_memory_length(sllm_context * context, int32_t seq_id, int32_t * length);
int sllm_memory_tokens(sllm_context * context, int32_t seq_id, int32_t * tokens, int32_t capacity, int32_t * n_tokens);
int sllm_memory_truncate(sllm_context * context, int32_t seq_id, int32_t length);
/* Like a clear, but the next write that repeats what the sequence held computes nothing (with kv_unified
 * nothing is kept: others may need the room). */
int sllm_memory_forget(sllm_context * context, int32_t seq_id);
/* The whole of `source` replaces `target`. */
int sllm_memory_copy(sllm_context * context, int32_t source, int32_t target);
int sllm_memory_clear(sllm_context * context, int32_t seq_id); /* -1: every sequence */

/* What sllm_decode() computes logits for. */
enum sllm_logits { SLLM_LOGITS_NONE = 0, SLLM_LOGITS_LAST = 1, SLLM_LOGITS_ALL = 2 };

/* Decode tokens of several sequences. `hidden` is for contexts of layers, else NULL. `pos[i]`, or -1 for
 * "append", is where sequence i's tokens go; `pos` NULL appends all. Logits come in the order of the
 * tokens: LAST gives one row a sequence, ALL one row a token. With `rows` (n_rows x n_vocab) they are
 * copied there, and there may be any number of them. Without it up to n_outputs_max rows stay in the
 * context, and `view` receives where, together with a reference to the context (sllm_context_release()), as
 * long as which that memory lives; the next call on the context overwrites it.
 * SLLM_ERR_INVALID: a token, position or sequence out of range; SLLM_ERR_FULL: no room, and nothing was
 * decoded; SLLM_ERR_CANCELLED, SLLM_ERR_INTERRUPTED, SLLM_ERR_COMPUTE: the memory is at its committed
 * length; SLLM_ERR_BUSY; SLLM_ERR_CLOSED. */
int sllm_decode(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
                const int32_t * pos, const float * hidden, int32_t logits, float * rows, const float ** view);

/* Log-probabilities: for each sequence the tokens t0..tn are decoded at its length, and log p(t1|..t0), ...
 * log p(tn|..) under the unfiltered softmax are stored in `logprobs`, with their ranks (0: the most likely)
 * in `ranks` or NULL; both flat, sum(lengths[i] - 1) items. The committed length grows by n tokens; the
 * last one needs no decoding.
 * Returns what sllm_decode() returns. */
int sllm_score(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
               float * logprobs, int32_t * ranks);

/* State of one sequence: its memory and its tokens. `capacity` is checked; sllm_state_get() stores the
 * bytes written.
 *
 * sllm_state_set(): SLLM_ERR_INVALID: not a state of such a context, which is then empty or as it was;
 * SLLM_ERR_FULL: it does not fit. All: SLLM_ERR_BUSY, SLLM_ERR_CLOSED. */
int sllm_state_size(sllm_context * context, int32_t seq_id, uint64_t * size);
int sllm_state_get(sllm_context * context, int32_t seq_id, uint8_t * data, uint64_t capacity, uint64_t * size);
int sllm_state_set(sllm_context * context, int32_t seq_id, const uint8_t * data, uint64_t size, const int32_t * tokens, int32_t n_tokens);

/* ---- layers.cpp: some layers of a model, with hidden states instead of tokens ------------------------- */

/*
 * A context of layers (sllm_model_params.header) has the memory of any other, and sllm_decode() and
 * sllm_verify() take `hidden` along with the tokens: one row of n_embd finite numbers for each of them, in
 * their order. Nothing is taken from the memory in place of computing it: what is written is computed.
 * Without `has_output` there are neither tokens nor logits, and this is the way through the layers:
 * lengths[i] rows of sequence i go to `pos[i]` (-1 or `pos` NULL: append), and the hidden states behind the
 * last layer are stored in `out`, row for row. The last n_nodes[i] rows of a sequence (`n_nodes` NULL: none),
 * at most SLLM_TREE_NODES and fewer than all, are nodes of a tree, whose `parents` stand one after the other for all
 * sequences as for sllm_verify(). Of these the memory keeps the main path (each node's first child); a write
 * at its end, or before it, goes on from there.
 * Returns what sllm_decode() returns; SLLM_ERR_UNSUPPORTED: a whole model, layers that end in logits, or a
 * tree where sllm_context_can_branch() says no; SLLM_ERR_INVALID: also where parents make no tree.
 */
int sllm_forward(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * lengths, const int32_t * pos,
                 const int32_t * n_nodes, const int32_t * parents, const float * hidden, float * out);

/* Bytes of a row of `n_columns` weights of ggml's type with the number `type`; 0: there is no such type, or
 * no such row of it. */
uint64_t sllm_row_size(int32_t type, int32_t n_columns);
/* Rows of a weight matrix as float32. `data` are n_rows rows as they stand in a file, `size` bytes in all;
 * `out` receives n_rows x n_columns numbers (ggml_get_type_traits()->to_float).
 * SLLM_ERR_INVALID: `size` is not n_rows rows;
 * SLLM_ERR_UNSUPPORTED: no such type, or one that cannot be read row by row. */
int sllm_dequantize(int32_t type, const uint8_t * data, uint64_t size, int32_t n_rows, int32_t n_columns, float * out);

/* ---- speculate.cpp: batched draft and verify ---------------------------------------------------------- */

/*
 * Common to both. `jobs` says what is asked for each of n_seqs distinct sequences, one after the other,
 * `n_items` numbers in all: a header of SLLM_JOB_HEADER numbers and what it announces,
 *
 *     seq_id, pos, start, n_tokens, n_more, tokens[n_tokens], then for sllm_verify() draft[n_more]
 *
 * `tokens` are the committed tokens that the memory does not hold yet (at least one; the last one is what
 * drafting or verifying starts after), written at `pos` (-1: at the committed length). `start` (-1:
 * remembered from the sequence's first call since it was empty) is the position of the first generated
 * token, which only a grammar asks for. `samplings` are n_seqs handles, compiled for this context's model.
 */
enum sllm_job { SLLM_JOB_HEADER = 5 };

/* Draft up to n_more <= stride tokens for each sequence. A chain ends early before a token whose
 * probability is below p_min[i], after an end-of-generation token, where the context is full or no token
 * can be selected, and on sllm_context_cancel(). `draft` and `probs` are n_seqs x stride, `drafted` n_seqs;
 * unused places hold -1 and 0. The committed length afterwards is that of the tokens passed in; the chain
 * stays cached after it.
 * Returns what sllm_decode() returns; SLLM_ERR_CANCELLED only where nothing was drafted. */
int sllm_draft(sllm_context * context, int32_t n_seqs, const int32_t * jobs, int32_t n_items, sllm_sampling * const * samplings,
               const float * p_min, int32_t stride, int32_t * draft, int32_t * drafted, float * probs);

/* Verify the n_more <= stride drafted tokens of each sequence: one pass decodes the last committed token
 * and the chain, selects y1..y(k+1), and accepts while y_j equals the draft. `selected` is n_seqs x (stride
 * + 1) and receives y1..y(a+1), then -1; `n_accepted` receives a. Selection ends behind an
 * end-of-generation token, and before a position where no token can be selected: that is an error only
 * where it is a sequence's first. `logprobs` (or NULL), n_seqs x (stride + 1), receives the log-probability
 * of each selected token under the unfiltered softmax. The committed length afterwards is that of the
 * tokens passed in plus a. Drafted tokens outside this vocabulary, or that do not fit into
 * the context, are treated as rejected. For a context of layers, `hidden` has n_tokens + n_more rows for
 * each job, one after the other; else it is NULL.
 *
 * `parents` (NULL: chains) has a number for each drafted token, job after job: the drafted token of its job
 * that it follows, always an earlier one, or -1: it comes right after the committed tokens. A chain has -1, 0,
 * 1, ...; anything else is a tree, of at most SLLM_TREE_NODES, whose longest path that agrees is accepted. Where
 * sllm_context_can_branch() says no, only the main path is verified, from each node to its first child.
 * Returns what sllm_decode() returns; SLLM_ERR_GRAMMAR and SLLM_ERR_COMPUTE as sllm_select() at a
 * sequence's first position; SLLM_ERR_INVALID: also where the drafts need more rows than n_outputs_max, and
 * where parents make no tree (a parent that comes later, two like children of one node). */
int sllm_verify(sllm_context * context, int32_t n_seqs, const int32_t * jobs, int32_t n_items, sllm_sampling * const * samplings,
                int32_t stride, const int32_t * parents, const float * hidden, int32_t * selected, int32_t * n_accepted, float * logprobs);

/* ---- tree.cpp: several ways in which a text may go on ---------------------------------------------------- */

/* A tree has so many nodes at most. */
enum sllm_tree_limits { SLLM_TREE_NODES = 256 };

/* Whether this build's llama.cpp computes trees: 0 for one without our patch. */
int32_t sllm_has_trees(void);

/* Whether a context's memory can hold a tree: of attention alone, and not followed by a model's own heads.
 * SLLM_ERR_BUSY, SLLM_ERR_CLOSED. */
int sllm_context_can_branch(sllm_context * context, int32_t * can);

/* The trees of n_seqs sequences, n_seqs x stride numbers each, likeliest nodes first; unused places hold -1
 * and 0. What is in tokens, parents and lengths before the call are trees to go on from. */
struct sllm_tree {
    int32_t * tokens;
    int32_t * parents;  /* as for sllm_verify() */
    int32_t * ranks;    /* among the ways to go on after the parent */
    float * probs;      /* the draft's, as sllm_draft() has them */
    float * chances;    /* that the target takes the path to this node, as far as the draft can tell */
    int32_t * lengths;  /* n_seqs: nodes of each tree */
    int32_t * n_passes; /* one number: passes that were computed */
};

/* Draft a tree of up to n_more <= stride nodes for each sequence. After each computed node the tokens follow that
 * come first by logit / T + G, the selection's own order: the runners-up under the same noise. n_passes[i] passes
 * compute up to `width` nodes of sequence i each (the first one the committed tokens), the likeliest of all that
 * are known, as far as their chance is p_min[i] or more; the likeliest n_more of all are the tree. The nodes of a
 * tree to go on from are computed in the first pass, as many as that can have rows. Where
 * sllm_context_can_branch() says no it is a chain. Otherwise as sllm_draft(); the computed nodes stay cached until
 * the next call on their sequence.
 * Returns what sllm_draft() returns; SLLM_ERR_INVALID: also a width or n_passes below 1. */
int sllm_draft_tree(sllm_context * context, int32_t n_seqs, const int32_t * jobs, int32_t n_items, sllm_sampling * const * samplings,
                    const int32_t * n_passes, const float * p_min, int32_t width, int32_t stride, const struct sllm_tree * out);

/* ---- mtp.cpp: a model's own heads as its draft --------------------------------------------------------- */

/* Whether this build can draft with them: 0 where it links a llama.cpp that does not export what they need. */
int32_t sllm_has_mtp(void);

/* Where a model's embedding is in an open file: a row of n_embd weights of ggml's `type` for each token, from
 * `offset` on. */
struct sllm_embedding {
    int32_t file; /* a descriptor */
    int32_t type;
    uint64_t offset;
};

/* Let the context's model draft for it with its heads for multi-token prediction (sllm_model_info.n_mtp),
 * which then follow its memory by themselves, for as long as the context lives: a KV cache of one layer, and
 * a few hidden states of each sequence. The memory is empty afterwards; asked again, nothing happens.
 * The heads of a model's last layers need its `embedding`, which is not among their weights: its rows are
 * read when a token is drafted, from a descriptor of the heads' own. For a whole model it is NULL.
 * SLLM_ERR_UNSUPPORTED: the model has none, several, or such as llama.cpp does not compute with; or
 * !sllm_has_mtp(). SLLM_ERR_INVALID: views of its logits are held, or layers come without an embedding.
 * SLLM_ERR_NO_MEMORY, SLLM_ERR_BUSY, SLLM_ERR_CLOSED. */
int sllm_mtp_open(sllm_context * context, const struct sllm_embedding * embedding);

/* What sllm_draft() does, by the heads. The context's memory holds the text in front of `pos` (and nothing
 * after it from now on); tokens[0] is the committed token at `pos`, and those behind it are an unconfirmed
 * chain to go on from, as the call before has drafted it. Nothing is added to the context's memory.
 * Returns what sllm_draft() returns; SLLM_ERR_INVALID: also where the heads are not open. */
int sllm_mtp_draft(sllm_context * context, int32_t n_seqs, const int32_t * jobs, int32_t n_items, sllm_sampling * const * samplings,
                   const float * p_min, int32_t stride, int32_t * draft, int32_t * drafted, float * probs);

/* ---- rpc.cpp: ggml's RPC backend ------------------------------------------------------------------------ */

/* The version of ggml's RPC protocol that this build speaks: major, minor, patch. This and the next one
 * return SLLM_ERR_UNSUPPORTED in builds without the backend. */
int sllm_rpc_version(int32_t * version);
/* Connect to the server at `endpoint` ("IPV4:PORT" or "NAME:PORT") and give its devices the indices `first`
 * .. `first + count - 1`, for sllm_model_load() alone; asked again, the same ones. Without a limit of time.
 * A server that cannot be reached is an error here, but one that is lost while a model uses it ends the
 * process: llama.cpp aborts on a thread of its own.
 * SLLM_ERR_INTERNAL: it has no devices. */
int sllm_rpc_add_server(const char * endpoint, int32_t * first, int32_t * count);
/* What ggml's servers name a cached tensor by: FNV-1a of its bytes, 64 bits. `before`: that of the bytes in
 * front of these, 0 where there are none. */
uint64_t sllm_rpc_hash(const uint8_t * data, uint64_t size, uint64_t before);

/* ---- rpc_server.cpp: serving ggml's RPC ------------------------------------------------------------------- */

typedef struct sllm_rpc_server sllm_rpc_server;

/* Make devices (indices for sllm_device_get()) ready to be served, with `n_threads` threads on the CPU.
 * `memory` has two numbers for each: bytes that are free, and in all.
 * SLLM_ERR_INVALID: no device, or no such; SLLM_ERR_INTERNAL: its driver refuses; SLLM_ERR_UNSUPPORTED: the
 * RPC protocol of this build's llama.cpp is another than the one that is served. */
int sllm_rpc_server_open(int32_t n_threads, const int32_t * devices, int32_t n_devices, sllm_rpc_server ** server, uint64_t * memory);
/* Serve the connections that come over the Unix socket `socket` (as descriptors), one after the other, until
 * that is closed; `once`: until one has ended whose client had memory here. Files of cached tensors are asked
 * for over the same socket; `cache`: whether to. sllm.rpc.server is the other end.
 * A client that sends what it should not is hung up on; that, and nothing of what it sent, goes to stderr.
 * SLLM_ERR_INTERNAL: an assertion of ggml's failed; the process should end. */
int sllm_rpc_server_run(sllm_rpc_server * server, int32_t socket, int32_t cache, int32_t once);
void sllm_rpc_server_free(sllm_rpc_server * server);

/* ---- confine.cpp: a process that can do little ------------------------------------------------------------ */

/* From here on this thread, and every thread that it starts, has no capabilities, gains none, and of the files
 * opens only those in or under these paths. `landlock`: the version of Linux's Landlock that sees to the files
 * (from 4 on it allows no TCP, from 6 on no signals to others); 0: there is none, or this process has other
 * threads already, which it would not bind. */
int sllm_confine_files(const char * const * readable, int32_t n_readable, const char * const * writable, int32_t n_writable,
                       int32_t * landlock);
/* From here on this process starts no program and no process, traces and signals none, and opens no socket;
 * without `files`, nor any file. `confined`: 1; 0: the system has no seccomp. */
int sllm_confine_calls(int32_t files, int32_t * confined);

/* ---- allocator.cpp: the C library's memory ---------------------------------------------------------------- */

/* From here on this process takes memory from `n_arenas` arenas at most (those that there are stay), hands
 * blocks of `large` bytes back to the system when they are freed, and what is free at the end of an arena
 * once it is as much. For programs of our own: it is the whole process's business.
 * Returns 1; 0: the C library has no such settings, or refuses them. */
int sllm_bound_arenas(int32_t n_arenas, int32_t large);

/* ---- carry.cpp: a connection between a worker's open port and its server ------------------------------- */

enum sllm_client {
    SLLM_CLIENT_STRANGER = 0, /* has not shown a token yet */
    SLLM_CLIENT_ADMITTED = 1,
    SLLM_CLIENT_REFUSED = 2 /* has to go when it has been answered */
};

/* Carry bytes between two connected stream sockets until both ends have closed, or the client has to go.
 * `standing`, of enum sllm_client, and `max_bytes` are written by another thread meanwhile. A stranger has
 * `max_ms` milliseconds, and nothing is read of it beyond its first `max_bytes` bytes; one that is refused is
 * not read any more, and has a second for the answer; one that is admitted is not bounded at all. Both sockets
 * stay open; shutdown() of `client` on another thread ends the call.
 * Returns 1 if the client had to go, else 0. */
int sllm_carry(int client, int server, const int32_t * standing, const int64_t * max_bytes, int32_t max_ms);

/* ---- tagger.cpp: labels of characters ------------------------------------------------------------------ */

/*
 * A bidirectional GRU with a CRF, from a GGUF of our own layout. general.architecture is "sllm-tagger",
 * sllm-tagger.version 1 (uint32), sllm-tagger.labels the labels (texts), sllm-tagger.unknown the row of a
 * character that the file does not know (uint32). Tensors (width x rows; f32 or q8_0, but for the first two):
 *
 *   chars, rows                    i32, n_chars: code points in rising order, and the row of each
 *   embd                           n_embd x n_rows
 *   gru.L.forward.in               n_in x 3 n_units: to update, reset and candidate; n_in is n_embd, of later
 *                                  layers 2 n_units, forward states first
 *   gru.L.forward.bias             3 n_units
 *   gru.L.forward.recurrent        n_units x 3 n_units; and the same with `backward`
 *   out, out_bias                  2 n_units x n_labels, n_labels
 *   start, end                     n_labels: what the first and the last label add
 *   transitions                    n_labels x n_labels: a row for each label, of what the next one adds
 *
 * With u, r = sigmoid(in x + recurrent h) and c = tanh(in x + recurrent (r h)) the next state is
 * (1 - u) h + u c. SLLM_ERR_LOAD: the file cannot be read, or is anything else than that.
 */
int sllm_tagger_load(const char * path, sllm_tagger ** tagger);
void sllm_tagger_free(sllm_tagger * tagger);

int32_t sllm_tagger_n_labels(const sllm_tagger * tagger);
/* Fills `text` as sllm_model_meta() does; -1: no such label. */
int32_t sllm_tagger_label(const sllm_tagger * tagger, int32_t index, char * text, int32_t size);

/* The likeliest labels of sequences of code points, ragged; of one at most 65536. Any thread may call it, several
 * at a time. SLLM_ERR_INTERRUPTED: the interrupt callback asked to stop. */
int sllm_tagger_run(const sllm_tagger * tagger, int32_t n_seqs, const int32_t * lengths, const uint32_t * chars, int32_t * labels);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif /* SLLM_H */
