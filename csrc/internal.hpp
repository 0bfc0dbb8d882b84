// What the parts of csrc/ share: errors, the guard at the C boundary, and the structs behind the handles.
#pragma once

#include "sllm.h"

#include "llama.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cxxabi.h>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

struct gguf_context;

namespace sllm {

class Error : public std::exception {
  public:
    Error(int why, std::string what_happened) : status(why), text(std::move(what_happened)) {}
    const char * what() const noexcept override { return text.c_str(); }

    int status;
    std::string text;
};

[[noreturn]] void fail(int status, const char * format, ...) __attribute__((format(printf, 2, 3)));

void set_last_error(const std::string & text);
int status_of_current_exception() noexcept;

// While one lives, an assertion of llama.cpp on this thread throws Error instead of aborting, and error lines that llama.cpp logs
// on this thread are kept for the message.
class Guard {
  public:
    Guard();
    ~Guard();
    Guard(const Guard &) = delete;
    Guard & operator=(const Guard &) = delete;

    static std::string logged_errors();
};

// The C boundary: runs f, returns its status, lets no exception out. What passes is not an exception of C++: the unwinding by which
// the C library ends a thread, as Python does with those that want its lock while it shuts down. It must not be caught.
template <class F> int guarded(F && f) {
    try {
        Guard guard;
        f();
        return SLLM_OK;
#ifdef __GLIBCXX__
    } catch (abi::__forced_unwind &) {
        throw;
#endif
    } catch (...) {
        return status_of_current_exception();
    }
}

// Writes `text` the way the sllm.h text getters promise.
int32_t copy_text(const std::string & text, char * buffer, int32_t size);

// Whether sllm_shutdown() was called: whoever computes should stop.
bool shutting_down();

// What the interrupt callback says, asked at most every 100 ms; false when there is none.
bool interrupted();

// The device with this index, be it this machine's or an RPC server's (rpc.cpp).
ggml_backend_device * device_at(int32_t index);

// Frees llama.cpp's objects where unique_ptr expects it.
struct Free {
    void operator()(llama_context * p) const { llama_free(p); }
    void operator()(llama_sampler * p) const { llama_sampler_free(p); }
};

using SamplerPtr = std::unique_ptr<llama_sampler, Free>;

struct Choice {
    llama_token token;
    float prob;
};

// A token that a selection considered.
struct Ranked {
    llama_token token;
    float prob; // as Choice has it
    double score;
};

// What one selection needs and the next one need not make again.
struct Scratch {
    std::vector<float> without;               // a row less the tokens that rank() has found
    std::vector<float> row;                   // logits with biases and penalties
    std::vector<float> maxima;                // of groups of logits
    std::vector<float> groups;                // of groups of groups
    std::vector<llama_token_data> candidates; // behind `filtered`
    std::vector<int32_t> asked;               // the ids of candidates
    std::vector<uint32_t> allowed;            // by the grammar: a bit for each token
    bool all_allowed = false;                 // whether it has the bits of all
    llama_token_data_array filtered{};
};

bool is_allowed(const std::vector<uint32_t> & allowed, llama_token token);

// Logits as llama.cpp's top-p can take them, whatever biases and penalties have made of them: neither their order nor their softmax changes.
void tame(std::vector<llama_token_data> & candidates);

// The first `pos` tokens of a text, each of them one of the vocabulary.
std::vector<llama_token> checked_history(const sllm_sampling & sampling, const int32_t * history, int32_t pos);

// What selection keeps for one sequence between calls. Everything here can be rebuilt from the tokens of the sequence.
class Selector {
  public:
    // Make ready to select the token behind `history`; generated text begins at `start`.
    void begin(const sllm_sampling & sampling, const std::vector<llama_token> & history, int32_t start);
    // The token behind everything accepted so far, at position `pos`; `want_prob` asks for Choice::prob, else 0.
    Choice select(const float * logits, int32_t pos, bool want_prob, Scratch & scratch) const;
    void accept(llama_token token);
    // Up to `n` tokens in the order in which they would be selected, the first one being select()'s: the runners-up under the same
    // noise. Their scores are logit / T + G, at temperature 0 the logit.
    std::vector<Ranked> rank(const float * logits, int32_t pos, size_t n, Scratch & scratch) const;
    // The token that select() would give for the whole row of logits, from the `n` likeliest tokens of it and their log-probabilities, in
    // any order (certify.cpp).
    struct Certified {
        llama_token token; // -1: undecided
        sllm_certainty how;
        double lead = 0; // with another engine's noise: over the score of any other token
    };
    Certified select_known(const int32_t * tokens, const float * logprobs, int32_t n, int32_t pos, Scratch & scratch) const;
    // A copy that may run ahead of the committed text.
    Selector clone() const;

  private:
    struct Shortlist;
    Shortlist shortlist(const int32_t * tokens, const float * logprobs, int32_t n, Scratch & scratch) const;
    bool may_follow(llama_token token, Shortlist & list, Scratch & scratch) const;
    bool another_reaches(double least, int32_t pos, Shortlist & list, Scratch & scratch) const;
    bool another_may_follow(Shortlist & list, Scratch & scratch) const;
    static size_t n_ranked(const Shortlist & list);
    Certified known_as_engine(const Shortlist & list, int32_t pos, Scratch & scratch) const;
    llama_token next_reaching(double least, float logit, int32_t pos, llama_token from) const;

    const float * adjust(const float * logits, Scratch & scratch) const;
    void ask_grammar(bool about_candidates, Scratch & scratch) const;
    bool filter_shortlist(const float * row, bool changed, bool want_prob, Scratch & scratch) const;
    bool filter_likely(const float * row, Scratch & scratch) const;
    void filter_all(const float * row, Scratch & scratch) const;
    Choice choose(const llama_token_data_array & filtered, int32_t pos, bool want_prob) const;
    double score(float logit, int32_t pos, llama_token token) const;

    const sllm_sampling * sampling = nullptr;
    uint64_t sampling_id = 0;
    SamplerPtr filters;              // top-k, top-p, min-p
    SamplerPtr penalties;            // null: off
    std::vector<llama_token> recent; // at least the tokens that the penalties see
    std::vector<llama_token> text;   // with a grammar: all that it has to match
};

} // namespace sllm

namespace sllm {

// How a memory takes tokens back (memory.cpp).
enum class Rollback {
    any = SLLM_ROLLBACK_ANY,
    snapshots = SLLM_ROLLBACK_SNAPSHOTS,
    checkpoints = SLLM_ROLLBACK_CHECKPOINTS,
};

} // namespace sllm

// Copied into everything that needs the model to stay: the last copy frees it, so handles may be freed in any order.
namespace sllm {

// What there is to know of a vocabulary besides what llama.cpp's answers; -1: no such token.
struct Specials {
    llama_token bos = -1; // those that the file names, or that are control tokens where llama.cpp expects them
    llama_token eos = -1;
    llama_token eot = -1;
    llama_token pad = -1;
    llama_token sep = -1;
    llama_token made_up = -1;  // an ordinary token that llama.cpp takes for the EOS which the file does not name
    bool space_prefix = false; // a text is tokenised with a space before it
    bool tokenizes = true;     // llama.cpp's tokenizer ends with it
    std::array<std::atomic<llama_token>, 8> turn_ends{-1, -1, -1, -1, -1, -1, -1, -1}; // by the chat template
};

} // namespace sllm

struct sllm_model {
    std::shared_ptr<llama_model> model;
    const llama_vocab * vocab = nullptr;
    int32_t n_vocab = 0;
    bool vocab_only = false;
    int32_t n_mtp = 0; // heads for multi-token prediction that were loaded
    sllm::Rollback rollback = sllm::Rollback::any;
    bool is_layers = false;                                                        // its input are hidden states
    bool has_output = true;                                                        // its output are logits
    std::string input;                                                             // of layers: see sllm_model_params
    std::string layer_output;                                                      // of layers: see sllm_model_params
    std::shared_ptr<llama_model> vocabulary;                                       // of layers: whose `vocab` is
    std::shared_ptr<sllm::Specials> specials = std::make_shared<sllm::Specials>(); // of `vocab`

    // Whether a text ends with this token: by the file, and by the chat template as well.
    bool file_ends(llama_token token) const;
    bool ends(llama_token token) const;
};

struct sllm_sampling {
    uint64_t id = 0; // never used twice, unlike an address
    sllm_model model;
    int32_t noise = SLLM_NOISE_SLLM;
    double temperature = 0;
    int32_t top_k = 0;
    float top_p = 1;
    float min_p = 0;
    int32_t penalty_last_n = 0;
    float penalty_repeat = 1;
    float penalty_freq = 0;
    float penalty_present = 0;
    uint64_t seed = 0;
    std::vector<llama_logit_bias> bias;
    sllm_grammar_callback grammar = nullptr; // null: no grammar
    void * grammar_user_data = nullptr;

    bool has_penalties() const { return penalty_last_n > 0 && (penalty_repeat != 1.0F || penalty_freq != 0.0F || penalty_present != 0.0F); }
    bool has_filters() const { return top_k > 0 || top_p < 1.0F || min_p > 0.0F; }
};

namespace sllm {

// The first of the largest logits; fails where there is none.
int32_t index_of_largest(const float * logits, int32_t n);
// The `k` largest logits as scratch.candidates, largest first, equal ones in the order of their ids; fewer if there are no more.
void top_candidates(const float * logits, int32_t n, size_t k, Scratch & scratch);
[[noreturn]] void fail_no_candidate();

// Selection with another engine's noise, at a temperature (engine_noise.cpp): Selector::rank() for logits with the biases added.
std::vector<Ranked> rank_as_engine(const sllm_sampling & sampling, const float * logits, int32_t pos, size_t n, Scratch & scratch);
// Sets what another engine makes of the parameters, and refuses what it has no equal of.
void adopt_noise(sllm_sampling & sampling, int32_t noise);

// The recurrent state after the first `pos` tokens of a sequence.
struct Checkpoint {
    size_t pos;
    std::shared_ptr<const std::vector<uint8_t>> state;
};

// A node of a tree of tokens, in an order in which parents come before their children.
struct Node {
    llama_token token;
    int32_t parent; // -1: the last committed token
    int32_t depth;  // 0: a child of that token
};

// So many nodes of a sequence may be cached at once.
constexpr size_t N_TREE_NODES = SLLM_TREE_NODES;
constexpr size_t N_TREE_WORDS = N_TREE_NODES / 64; // of a set of them, a bit for each

void add_path(const Node * tree, int32_t last, uint64_t * words); // the nodes on the way to one of them

// The memory of one sequence: llama.cpp's cache holds the first `n_cached` of `tokens`, and the caller knows the first
// `n_committed` of them.
struct Sequence {
    std::vector<llama_token> tokens;
    size_t n_committed = 0;
    size_t n_cached = 0;
    size_t depth = 0;                    // with snapshots: how many of the newest cached tokens can be taken back
    std::vector<Checkpoint> checkpoints; // by rising position, none after n_cached
    std::vector<Node> tree;              // cached after the first n_cached tokens, besides them
    int32_t start = -1;                  // position of the first generated token, once known
    Selector selector;
};

// One row range of a write: tokens[begin, end) of a sequence, logits from `first_output` on.
struct Write {
    llama_seq_id seq_id;
    size_t begin;
    size_t end;
    size_t first_output;
    const float * hidden = nullptr;           // of layers: the input row for `begin`
    size_t n_padding = 0;                     // tokens at the end that nobody asked for
    const std::vector<Node> * tree = nullptr; // after `end`: the nodes that follow, all with logits; those from `first_node` on
    size_t first_node = 0;
    const float * tree_hidden = nullptr; // of layers: the input row for node `first_node`
};

// One row of a batch, whose token stands in its sequence already.
struct Row {
    llama_seq_id seq_id;
    size_t pos;
    bool output;
    const float * hidden = nullptr;
    const Node * tree = nullptr; // where its token is that of `node`; null: it is the sequence's at `pos`
    size_t node = 0;
};

// What draft and verify are asked for one sequence, checked.
struct Job {
    llama_seq_id seq_id;
    const int32_t * tokens; // the committed ones, and behind them those to verify
    size_t n_tokens;
    size_t n_more;
    size_t pos;
    int32_t start;
    const sllm_sampling * sampling;
    std::vector<Node> tree = {};     // what to verify, where it is a tree
    std::vector<int32_t> rows = {};  // which of the caller's drafted tokens each node is
    std::vector<int32_t> chain = {}; // the tokens to verify, where they are not the caller's
};

// The chains that a call drafts, in its caller's buffers.
struct Chains {
    const float * p_min;
    size_t width;
    int32_t * tokens;
    int32_t * lengths;
    float * probs;

    // Empties the buffers for `n` chains; refuses a p_min that is no probability.
    void begin(size_t n) const;
    // Select the token behind chain `i` from a row of logits. Whether the chain goes on behind it, or ends there or before it.
    bool extend(size_t i, sllm_context & context, const Job & job, Selector & selector, const float * logits) const;
    llama_token last(size_t i) const { return tokens[i * width + static_cast<size_t>(lengths[i]) - 1]; }
};

class Heads; // mtp.hpp

} // namespace sllm

namespace sllm {

// Where the rows of one llama_decode() go that come out behind the last layer, and where those come from that replace a tensor.
struct Capture {
    std::string name;           // of the tensor that holds what comes out; empty: the layers end in logits
    std::string input;          // of the tensor that is replaced; empty: the batch has the rows
    std::vector<size_t> order;  // the row of the batch for each row that comes, ubatch by ubatch
    size_t n_seen = 0;          // rows that have come
    size_t n_given = 0;         // rows that have been put in
    float * out = nullptr;      // null: nobody wants them
    const float * in = nullptr; // the rows to put in, in the batch's order; null: there are none
    std::vector<float> scratch; // of one ubatch
};

} // namespace sllm

struct sllm_context {
    sllm_model model; // before `context`, which is freed first
    std::unique_ptr<llama_context, sllm::Free> context;
    llama_context_params params{};      // that it was made with
    std::shared_ptr<sllm::Heads> heads; // that draft for it; null: none
    sllm_context_info info{};
    std::vector<sllm::Sequence> sequences;

    std::atomic<int32_t> references{1};
    std::atomic<bool> busy{false};
    std::atomic<bool> cancel{false};
    std::atomic<std::thread::id> owner{}; // the thread inside
    bool closed = false;
    bool kv_unified = false;
    sllm::Rollback rollback = sllm::Rollback::any;
    bool reserving = false;      // abort at the first node: see sllm_context_new()
    bool copies_pending = false; // llama.cpp copies the memory of sequences at its next decode
    bool was_interrupted = false;
    bool broken = false; // an assertion fired inside llama.cpp; its state is unknown

    // Scratch of one llama_decode(), kept to avoid allocations.
    std::vector<llama_token> batch_token;
    std::vector<llama_pos> batch_pos;
    std::vector<int32_t> batch_n_seq_id;
    std::vector<llama_seq_id *> batch_seq_id;
    std::vector<llama_seq_id> batch_seq;
    std::vector<int8_t> batch_logits;
    std::vector<float> batch_embd;
    std::vector<uint16_t> batch_nodes;
    std::vector<uint64_t> batch_sees;
    sllm::Capture capture;

    sllm::Scratch selection; // of one selection; the sequences take turns
};

namespace sllm {

// Enters a context for the length of a call: one thread at a time.
class Entry {
  public:
    explicit Entry(sllm_context & context);
    ~Entry();
    Entry(const Entry &) = delete;
    Entry & operator=(const Entry &) = delete;

  private:
    sllm_context & context;
};

Sequence & sequence_at(sllm_context & context, int32_t seq_id);
// The sequences of a batched call: in range, no two alike.
void check_sequences(const sllm_context & context, int32_t n_seqs, const int32_t * seq_ids);
void check_tokens(const sllm_context & context, const int32_t * tokens, size_t n_tokens);

// Where a write of `n_tokens` tokens at `pos` (-1: append) begins; refuses negative positions, gaps and what does not fit.
size_t checked_position(sllm_context & context, int32_t seq_id, int32_t pos, size_t n_tokens);

// Put `n_tokens` tokens at `pos` of a sequence: from there on it holds these and nothing else. What llama.cpp's cache already
// holds of them stays cached, except that at least `n_recompute` tokens at the end will be computed. Returns the position to
// write from.
size_t place_tokens(sllm_context & context, llama_seq_id seq_id, size_t pos, const int32_t * tokens, size_t n_tokens, size_t n_recompute);

// The input of layers: as many finite numbers as `n_rows` rows have, for a context of layers alone.
void check_hidden(const sllm_context & context, const float * hidden, size_t n_rows);

// Refuses layers without an output: they have no logits.
void check_has_output(const sllm_context & context);

// The width of a hidden state.
size_t n_embd(const sllm_context & context);

// Send rows through the layers of a context without an output; the hidden states behind the last one go to `out`.
void forward(sllm_context & context, const std::vector<Write> & writes, float * out);

// Compute writes in as few llama_decode() calls as n_batch allows; logits come only from the last call, which holds every output
// row unless `rows` is given. Throws, with `n_cached` of every sequence true, on failure.
void compute(sllm_context & context, const std::vector<Write> & writes, float * rows);

// A llama_decode() that does everything but compute: it is stopped at the first node of its graph (on the CPU; elsewhere it runs).
void decode_aborted(sllm_context & context, const std::vector<Row> & rows);

// Whether llama.cpp's memory of this context can hold trees: see tree.cpp.
bool can_branch(const sllm_context & context);

// The nodes of a tree given as tokens with parents (-1: the root), main path first, where that path follows each node's first child;
// `order` receives which of the given ones each node is. Throws where it is no tree.
std::vector<Node> read_tree(const int32_t * tokens, const int32_t * parents, size_t n, std::vector<int32_t> & order);
// How many of the first nodes are its main path.
size_t main_path(const std::vector<Node> & tree);
// Make the cached nodes on the way to node `last` (-1: none) ordinary tokens of the sequence's cache, which `s.tokens` has to hold
// already, and drop the others.
void keep_path(sllm_context & context, llama_seq_id seq_id, int32_t last);
// Likewise the nodes that have the tokens to be written at `pos`, except for the last `n_recompute` tokens.
void follow_tree(sllm_context & context, llama_seq_id seq_id, size_t pos, const int32_t * tokens, size_t n_tokens, size_t n_recompute);

// Drop what llama.cpp has cached at and after `length`; where the memory cannot take so few tokens back, more or all of them.
void uncache(sllm_context & context, llama_seq_id seq_id, size_t length);

// What ends a call that was cancelled or interrupted.
[[noreturn]] void fail_stopped(const sllm_context & context);

// Grow llama.cpp's buffer of outputs to the largest that the context will need; the memory is empty afterwards.
void reserve_outputs(sllm_context & context);

// Refuses a model that ggml cannot compute with, before it does: see graph_check.cpp. Of its heads for multi-token prediction, or of all
// else.
void check_graph(const sllm_model & model, bool heads);

// Refuses hyperparameters that are 0 and that llama.cpp would divide by, and layers without a tensor that it takes to be there.
void check_header(const gguf_context & file);

// What llama.cpp logged says more than the little that it returns.
int status_of_lines(const std::string & lines, int otherwise);

// Reads the jobs of a call as sllm.h describes them; `with_draft`: every job ends with the tokens to verify.
std::vector<Job> read_jobs(sllm_context & context, int32_t n_seqs, const int32_t * items, int32_t n_items,
                           sllm_sampling * const * samplings, int32_t stride, bool with_draft);

// Make `selector` ready behind the committed tokens of `s` in front of `job.pos` and the job's own, of which generated text begins at
// `start`.
void begin_selection(Selector & selector, const Sequence & s, const Job & job, int32_t start);

// Whether what is selected depends on the text before it, and not on logits and position alone.
bool needs_history(const sllm_sampling & sampling);
// Where generated text begins: as told, as remembered, or here.
int32_t resolve_start(Sequence & s, const Job & job);

// A draft that runs ahead goes back to where any of its last ones began.
constexpr size_t N_DRAFT_CHECKPOINTS = 4;
// Keep the state of what is cached, so that what is decoded from here on can be taken back; of the checkpoints of this sequence
// `n_kept` stay. For attention memories nothing is needed and nothing happens.
void save_checkpoint(sllm_context & context, llama_seq_id seq_id, size_t n_kept);

// After a llama_decode() with so many rows of each sequence (`in_order`: by rising ids): how many tokens can be taken back now, or
// what is left after it failed.
void note_decoded(sllm_context & context, const std::vector<size_t> & n_rows, bool in_order);
void note_failed(sllm_context & context, const std::vector<size_t> & n_rows);

// log softmax(row)[token] and the number of tokens that are likelier.
double log_prob(const float * row, int32_t n_vocab, llama_token token);

} // namespace sllm
