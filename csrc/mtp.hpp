// A model's own heads for multi-token prediction (MTP), which draft for a context: what context.cpp tells them.
#pragma once

#include "internal.hpp"
#include "layers.hpp"

namespace sllm {

// The heads of one context: a llama_context of the same model that computes its MTP layer alone. Its row for position p takes the token
// there and the hidden state that the model's last layer gave for position p - 1, and what comes out foretells the token at p + 1.
//
// The model's hidden states are kept until the heads have computed with them, which they do when they draft, and before that where a
// prompt gives many. Nothing here is needed for the text: what the heads lack makes their drafts worse, and nothing else.
class Heads {
  public:
    // No more hidden states of a sequence are kept over a llama_decode() of the model: the heads compute with them before it.
    static constexpr size_t most_kept = 64;

    // `embedding`: that of the whole model, where the context is of its last layers; else null.
    Heads(sllm_context & context, std::unique_ptr<const EmbeddingRows> embedding);

    // Before the context decodes: compute with hidden states that have become many. Throws only where the call is to stop.
    void before_decode();
    // After it has decoded the rows in its batch: keep their hidden states.
    void after_decode();
    // What the context holds of a sequence at and after `length` is void.
    void cut(llama_seq_id seq_id, size_t length);
    // `target` has become an equal of `source`.
    void copy(llama_seq_id source, llama_seq_id target);
    void set_threads(int32_t n_threads, int32_t n_threads_batch);

    // As sllm_mtp_draft() says it, on checked jobs.
    void draft(const std::vector<Job> & jobs, const Chains & chains);

  private:
    struct Row {
        llama_seq_id seq_id;
        size_t pos;
        llama_token token;
        const float * hidden;
        bool output;
    };

    // What the heads hold of a sequence: positions [begin, end) in llama.cpp's memory, computed with the model's hidden states, and
    // after them the tokens of `ahead`, of which all but the first were computed with the heads' own.
    struct State {
        size_t begin = 0;
        size_t end = 0;
        std::vector<llama_token> ahead;
        std::vector<float> own;    // what came out for the last of them
        size_t first = 0;          // the model's hidden states that are kept: of positions first, first + 1, ...
        std::vector<float> hidden; // a row of `width` numbers for each
        size_t certain = 0;        // tokens from this position on may be drafted ones
        Selector selector;         // behind the committed text
    };

    // One drafting call's way with a sequence.
    struct Progress {
        size_t job;
        size_t n_computed; // of the job's tokens
    };

    State & state(llama_seq_id seq_id) { return states[static_cast<size_t>(seq_id)]; }
    const float * hidden_before(const State & s, size_t pos) const;
    void append_missing(llama_seq_id seq_id, size_t end, std::vector<Row> & rows);
    void drop_ahead(llama_seq_id seq_id);
    void drop(llama_seq_id seq_id);
    static bool on_node(ggml_tensor * tensor, bool ask, void * user_data);
    void embed(ggml_tensor * tensor);
    void decode(const std::vector<Row> & rows);
    void hold(const std::vector<Row> & rows);
    void feed(const std::vector<Row> & rows);
    void forget_used(State & s) const;
    std::vector<Row> first_rows(const std::vector<Job> & jobs, std::vector<Progress> & active);
    void begin_selections(const std::vector<Job> & jobs, const std::vector<Progress> & active, std::vector<Selector> & ahead);

    sllm_context & target;
    std::unique_ptr<llama_context, Free> context;
    bool only_outputs; // the heads give hidden states of rows with logits alone
    size_t width;
    size_t n_batch;
    std::vector<float> zeros;
    std::vector<State> states;
    std::unique_ptr<const EmbeddingRows> embedding;
    size_t n_embedded = 0;       // rows of one llama_decode() whose embeddings are there
    std::string embedding_error; // why others are not
    bool broken = false;
};

} // namespace sllm
