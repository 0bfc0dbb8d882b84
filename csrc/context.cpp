// Contexts: the memory of each sequence as a cache of its tokens, and everything that computes.

#include "internal.hpp"
#include "mtp.hpp"
#include "tree.hpp"

#include "ggml-backend.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

namespace {

ggml_type type_by_name(const char * name, const char * what) {
    // The types that llama.cpp's command line offers for the cache; others compile nowhere or assert deep inside.
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                 GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL}) {
        if (name != nullptr && std::strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    sllm::fail(SLLM_ERR_INVALID, "%s is \"%s\", not one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl", what,
               name == nullptr ? "" : name);
}

bool on_abort_poll(void * user_data) {
    auto & context = *static_cast<sllm_context *>(user_data);
    if (context.reserving || context.cancel.load(std::memory_order_relaxed) || sllm::shutting_down()) {
        return true;
    }
    if (sllm::interrupted()) {
        context.was_interrupted = true;
        return true;
    }
    return false;
}

} // namespace

namespace sllm {

int status_of_lines(const std::string & lines, int otherwise) {
    for (const char * words : {"failed to allocate", "could not reserve space", "bad_alloc"}) {
        if (lines.find(words) != std::string::npos) {
            return SLLM_ERR_NO_MEMORY;
        }
    }
    return otherwise;
}

void fail_stopped(const sllm_context & context) {
    if (context.was_interrupted) {
        fail(SLLM_ERR_INTERRUPTED, "interrupted");
    }
    fail(SLLM_ERR_CANCELLED, "cancelled by another thread");
}

} // namespace sllm

namespace {

// What the system could give without swapping, or `total` where it does not say; ggml calls all of the memory free.
double available_memory(size_t total) {
#ifdef __linux__
    std::ifstream file("/proc/meminfo");
    std::string name;
    double kilobytes = 0;
    for (std::string line; std::getline(file, line);) {
        if (std::istringstream(line) >> name >> kilobytes && name == "MemAvailable:") {
            return std::min(kilobytes * 1024, static_cast<double>(total));
        }
    }
#endif
    return static_cast<double>(total);
}

// Asking for more memory than the machine has would succeed (pages are handed out on first touch) and then end the process.
void check_cache_fits(const sllm_model & model, const llama_context_params & p, uint64_t state_bytes) {
    const llama_model * m = model.model.get();
    const double head = static_cast<double>(llama_model_n_embd(m)) / std::max(1, llama_model_n_head(m));
    const double row = head * llama_model_n_head_kv(m) * llama_model_n_layer(m);
    const auto bytes_of = [](ggml_type type) {
        return static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
    };
    const double need = row * (bytes_of(p.type_k) + bytes_of(p.type_v)) * p.n_ctx;
    const double states = static_cast<double>(state_bytes) * p.n_seq_max * (1.0 + p.n_rs_seq);
    double have = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        size_t free = 0;
        size_t total = 0;
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        ggml_backend_dev_memory(device, &free, &total);
        const bool is_cpu = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
        have += is_cpu ? available_memory(total) : static_cast<double>(free);
    }
    if (have > 0 && need + states > have) {
        sllm::fail(
            SLLM_ERR_NO_MEMORY, "%.1f GB are needed (a KV cache of %u positions%s), and all devices together have %.1f GB free: lower %s",
            (need + states) / 1e9, p.n_ctx, states > 0 ? ", recurrent states for n_seq_max sequences and n_rollback snapshots each" : "",
            have / 1e9, states > need ? "n_rollback or n_seq_max" : "n_ctx");
    }
}

using sllm::Row;

size_t n_nodes(const sllm::Write & write) { return write.tree == nullptr ? 0 : write.tree->size() - write.first_node; }

// The rows of the nodes that a write has after its tokens.
void append_nodes(const sllm_context & context, const sllm::Write & write, std::vector<Row> & rows) {
    for (size_t i = write.first_node, n = 0; n < n_nodes(write); ++i, ++n) {
        const sllm::Node & node = (*write.tree)[i];
        const float * hidden = write.tree_hidden == nullptr ? nullptr : write.tree_hidden + n * sllm::n_embd(context);
        rows.push_back({write.seq_id, write.end + static_cast<size_t>(node.depth), true, hidden, &node, uint64_t{1} << i});
    }
}

const float * hidden_at(const sllm_context & context, const sllm::Write & write, size_t pos) {
    return write.hidden == nullptr ? nullptr : write.hidden + (pos - write.begin) * sllm::n_embd(context);
}

// In which order llama.cpp computes the rows of a batch (llama_batch_allocr::split_simple, split_equal): hidden states come out in that of
// the ubatches, unlike logits, which llama.cpp sorts.
std::vector<size_t> computed_order(const sllm_context & context, const std::vector<Row> & rows) {
    std::vector<size_t> order;
    order.reserve(rows.size());
    if (context.kv_unified || context.info.n_seq_max == 1) {
        for (size_t i = 0; i < rows.size(); ++i) {
            order.push_back(i);
        }
        return order;
    }
    std::vector<std::vector<size_t>> left(context.sequences.size()); // rows of each sequence that are not in a ubatch yet
    std::vector<size_t> at(context.sequences.size(), 0);
    for (size_t i = 0; i < rows.size(); ++i) {
        left[static_cast<size_t>(rows[i].seq_id)].push_back(i);
    }
    while (order.size() < rows.size()) {
        std::vector<size_t> chosen; // sequences that follow one another
        std::vector<bool> is_chosen(left.size(), false);
        for (const Row & row : rows) {
            const auto seq = static_cast<size_t>(row.seq_id);
            if (at[seq] == left[seq].size() || is_chosen[seq] || (!chosen.empty() && seq != chosen.back() + 1)) {
                continue;
            }
            // A row that was computed before does not count, and the rows of a sequence come in order.
            if (left[seq][at[seq]] > static_cast<size_t>(&row - rows.data())) {
                continue;
            }
            chosen.push_back(seq);
            is_chosen[seq] = true;
            if (chosen.size() > context.info.n_ubatch) {
                break;
            }
        }
        size_t n = 0;
        do {
            ++n;
        } while ((n + 1) * chosen.size() <= context.info.n_ubatch &&
                 std::all_of(chosen.begin(), chosen.end(), [&](size_t seq) { return at[seq] + n < left[seq].size(); }));
        for (const size_t seq : chosen) {
            for (size_t i = 0; i < n; ++i) {
                order.push_back(left[seq][at[seq]++]);
            }
        }
    }
    return order;
}

// Puts hidden states where the first layer will read them. Whatever llama.cpp has computed there, of tokens that are none, is lost.
void replace_input(sllm_context & context, ggml_tensor * tensor) {
    sllm::Capture & capture = context.capture;
    const auto n_rows = static_cast<size_t>(tensor->ne[1]);
    const auto width = static_cast<size_t>(tensor->ne[0]);
    if (capture.n_given + n_rows <= capture.order.size() && width == sllm::n_embd(context)) {
        capture.scratch.resize(n_rows * width);
        for (size_t i = 0; i < n_rows; ++i) {
            std::copy_n(capture.in + capture.order[capture.n_given + i] * width, width, capture.scratch.data() + i * width);
        }
        ggml_backend_tensor_set(tensor, capture.scratch.data(), 0, n_rows * width * sizeof(float));
    }
    capture.n_given += n_rows;
}

// Takes the hidden states behind the last layer, and ends the graph there: norm and output are never computed.
bool on_node(ggml_tensor * tensor, bool ask, void * user_data) {
    auto & context = *static_cast<sllm_context *>(user_data);
    sllm::Capture & capture = context.capture;
    const bool is_input = capture.in != nullptr && capture.input == tensor->name;
    if (ask) {
        return is_input || (!capture.name.empty() && capture.name == tensor->name);
    }
    if (is_input) {
        replace_input(context, tensor);
        return true;
    }
    const auto n_rows = static_cast<size_t>(tensor->ne[1]);
    const auto width = static_cast<size_t>(tensor->ne[0]);
    if (capture.out != nullptr && capture.n_seen + n_rows <= capture.order.size() && width == sllm::n_embd(context)) {
        capture.scratch.resize(n_rows * width);
        ggml_backend_tensor_get(tensor, capture.scratch.data(), 0, n_rows * width * sizeof(float));
        for (size_t i = 0; i < n_rows; ++i) {
            std::copy_n(capture.scratch.data() + i * width, width, capture.out + capture.order[capture.n_seen + i] * width);
        }
    }
    capture.n_seen += n_rows;
    return false;
}

// Hidden states as the input of a batch whose other fields are there.
void put_hidden(sllm_context & context, const std::vector<Row> & rows, llama_batch & batch) {
    const size_t n = rows.size();
    const size_t width = sllm::n_embd(context);
    context.batch_embd.resize(n * width);
    for (size_t i = 0; i < n; ++i) {
        std::copy_n(rows[i].hidden, width, context.batch_embd.data() + i * width);
    }
    if (!context.capture.input.empty()) {
        std::fill(context.batch_token.begin(), context.batch_token.end(), 0);
        batch.token = context.batch_token.data();
        context.capture.in = context.batch_embd.data();
        return;
    }
    batch.embd = context.batch_embd.data();
    const llama_rope_type rope = llama_model_rope_type(context.model.model.get());
    if (rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE) {
        // Four positions for each row, one section after the other: those that llama.cpp gives to text.
        context.batch_pos.resize(4 * n, 0);
        for (const size_t section : {1, 2}) {
            std::copy_n(context.batch_pos.data(), n, context.batch_pos.data() + section * n);
        }
        std::fill_n(context.batch_pos.data() + 3 * n, n, 0);
    }
}

// One llama_decode() of tokens that stand in their sequences already. On failure the cache is put back to where it was.
void decode_rows(sllm_context & context, const std::vector<Row> & rows) {
    const size_t n = rows.size();
    context.capture.in = nullptr;
    context.batch_token.resize(n);
    context.batch_pos.resize(n);
    context.batch_n_seq_id.assign(n, 1);
    context.batch_seq.resize(n);
    context.batch_seq_id.resize(n + 1);
    context.batch_logits.resize(n);
    const bool has_nodes = std::any_of(rows.begin(), rows.end(), [](const Row & row) { return row.node != nullptr; });
    if (has_nodes) {
        context.batch_nodes.resize(n);
        context.batch_sees.resize(n);
    }
    for (size_t i = 0; i < n; ++i) {
        const sllm::Node * const node = rows[i].node;
        if (has_nodes) {
            context.batch_nodes[i] = rows[i].bit;
            context.batch_sees[i] = node == nullptr ? 0 : node->path;
        }
        context.batch_token[i] = node != nullptr ? node->token : context.sequences[static_cast<size_t>(rows[i].seq_id)].tokens[rows[i].pos];
        context.batch_pos[i] = static_cast<llama_pos>(rows[i].pos);
        context.batch_seq[i] = rows[i].seq_id;
        context.batch_seq_id[i] = &context.batch_seq[i];
        context.batch_logits[i] = rows[i].output ? 1 : 0;
    }
    context.batch_seq_id[n] = nullptr;
    llama_batch batch{};
    batch.n_tokens = static_cast<int32_t>(n);
    if (rows.front().hidden == nullptr) {
        batch.token = context.batch_token.data();
    } else {
        put_hidden(context, rows, batch);
        context.capture.order = computed_order(context, rows);
        context.capture.n_seen = context.capture.n_given = 0;
    }
    batch.pos = context.batch_pos.data();
    batch.n_seq_id = context.batch_n_seq_id.data();
    batch.seq_id = context.batch_seq_id.data();
    batch.logits = context.batch_logits.data();

    if (context.heads != nullptr && !context.reserving) {
        context.heads->before_decode();
    }
    if (!context.reserving && on_abort_poll(&context)) { // backends other than the CPU do not ask while they compute
        sllm::fail_stopped(context);
    }
    int32_t rc = 0;
    try {
        const sllm::TreeBatch trees(has_nodes ? context.batch_nodes.data() : nullptr, context.batch_sees.data());
        rc = llama_decode(context.context.get(), batch);
    } catch (...) {
        context.broken = true;
        throw;
    }
    if (rc != -1) {
        context.copies_pending = false;
    }
    if (rc == 0 && context.was_interrupted) {
        rc = 2; // asked to stop at the last node: the callback has an exception that must come out now
    }
    if (rc == 0 && context.capture.in != nullptr && context.capture.n_given != n) {
        context.broken = true;
        sllm::fail(SLLM_ERR_COMPUTE, "%zu of %zu hidden states went into the layers: llama.cpp has no tensor \"%s\" of that size",
                   context.capture.n_given, n, context.capture.input.c_str());
    }
    std::vector<size_t> n_rows(context.sequences.size(), 0); // of each sequence
    for (const Row & row : rows) {
        ++n_rows[static_cast<size_t>(row.seq_id)];
    }
    if (rc == 0) {
        for (const Row & row : rows) {
            sllm::Sequence & s = context.sequences[static_cast<size_t>(row.seq_id)];
            if (row.node == nullptr) {
                s.n_cached = std::max(s.n_cached, row.pos + 1);
            } else {
                s.tree.push_back(*row.node);
            }
        }
        const auto by_id = [](const Row & a, const Row & b) { return a.seq_id < b.seq_id; };
        sllm::note_decoded(context, n_rows, std::is_sorted(rows.begin(), rows.end(), by_id));
        if (context.heads != nullptr) {
            context.heads->after_decode();
        }
        return;
    }
    if (context.rollback == sllm::Rollback::any || (rc != 1 && rc != -1)) { // with these two nothing was touched
        sllm::note_failed(context, n_rows);
    }
    switch (rc) {
    case 1: sllm::fail(SLLM_ERR_FULL, "the context has no room for %zu more tokens (n_ctx %u)", n, context.info.n_ctx);
    case 2: sllm::fail_stopped(context);
    default: {
        const std::string lines = sllm::Guard::logged_errors();
        sllm::fail(sllm::status_of_lines(lines, SLLM_ERR_COMPUTE), "llama_decode() returned %d: %s", rc,
                   lines.empty() ? "it did not say why" : lines.c_str());
    }
    }
}

} // namespace

namespace sllm {

// llama.cpp grows its buffer of logits when a batch asks for more rows than any before, and frees the old one: a view
// into it would dangle. So the largest batch is asked for now, and stopped at the first node of its graph; the buffer is reserved
// before the graph runs.
void reserve_outputs(sllm_context & context) {
    const auto per_sequence = static_cast<size_t>(context.info.n_ctx_seq);
    std::vector<Row> rows;
    for (size_t i = 0; i < context.info.n_outputs_max && i / per_sequence < context.sequences.size(); ++i) {
        context.sequences[i / per_sequence].tokens.push_back(0);
        rows.push_back({static_cast<llama_seq_id>(i / per_sequence), i % per_sequence, true});
    }
    decode_aborted(context, rows);
    llama_memory_clear(llama_get_memory(context.context.get()), false);
    for (Sequence & s : context.sequences) {
        s = Sequence{};
    }
}

} // namespace sllm

namespace {

std::unique_ptr<sllm_context> make_context(const sllm_model & model, const sllm_context_params & params) {
    const auto require = [](bool condition, const char * text) {
        if (!condition) {
            sllm::fail(SLLM_ERR_INVALID, "%s", text);
        }
    };
    require(!model.vocab_only, "the model was loaded without its weights (vocab_only)");
    require(params.n_ctx >= 1, "n_ctx must be >= 1");
    require(params.n_batch >= 1 && params.n_ubatch >= 1, "n_batch and n_ubatch must be >= 1");
    require(params.n_seq_max >= 1 && params.n_seq_max <= llama_max_parallel_sequences(), "n_seq_max must be in 1..256");
    require(params.n_batch >= params.n_seq_max, "n_batch must be at least n_seq_max");
    require(params.n_ctx >= params.n_seq_max, "n_ctx must be at least n_seq_max");
    require(params.n_outputs_max >= params.n_seq_max && params.n_outputs_max <= params.n_batch,
            "n_outputs_max must be in n_seq_max..n_batch");
    require(params.n_outputs_max <= 32768, "n_outputs_max must be at most 32768; logits of more rows are copied, not kept");
    require(params.n_threads >= 1 && params.n_threads <= GGML_MAX_N_THREADS && params.n_threads_batch >= 1 &&
                params.n_threads_batch <= GGML_MAX_N_THREADS,
            "n_threads and n_threads_batch must be in 1..512");
    require(params.n_rollback <= 64, "n_rollback must be at most 64");
    require(params.flash_attn >= -1 && params.flash_attn <= 1, "flash_attn must be -1 (auto), 0 or 1");

    auto context = std::make_unique<sllm_context>();
    context->model = model;
    context->kv_unified = params.kv_unified != 0;

    llama_context_params p = llama_context_default_params();
    p.n_ctx = params.n_ctx;
    p.n_batch = params.n_batch;
    p.n_ubatch = std::min(params.n_ubatch, params.n_batch);
    p.n_seq_max = params.n_seq_max;
    if (model.rollback == sllm::Rollback::snapshots && params.n_rollback > 0) {
        p.n_rs_seq = params.n_rollback;
        // llama.cpp asserts that a graph has room for the tokens that may be taken back, the one before them and one more.
        p.n_batch = std::max(p.n_batch, p.n_rs_seq + 2);
        p.n_ubatch = std::max(p.n_ubatch, p.n_rs_seq + 2);
    }
    p.n_outputs_max = params.n_outputs_max;
    p.n_threads = params.n_threads;
    p.n_threads_batch = params.n_threads_batch;
    p.flash_attn_type = static_cast<llama_flash_attn_type>(params.flash_attn);
    p.type_k = type_by_name(params.type_k, "type_k");
    p.type_v = type_by_name(params.type_v, "type_v");
    p.offload_kqv = params.offload_kqv != 0;
    p.kv_unified = params.kv_unified != 0;
    p.swa_full = true; // a sliding-window cache of the smaller kind could not be rolled back
    p.no_perf = true;
    p.abort_callback = on_abort_poll;
    p.abort_callback_data = context.get();
    if (!model.has_output) {
        context->capture.name = model.layer_output + "-" + std::to_string(llama_model_n_layer(model.model.get()) - 1);
    }
    context->capture.input = model.input;
    if (!model.has_output || !model.input.empty()) {
        p.cb_eval = on_node;
        p.cb_eval_user_data = context.get();
    }
    check_cache_fits(model, p, params.state_bytes);
    context->params = p;

    context->context.reset(llama_init_from_model(model.model.get(), p));
    if (context->context == nullptr) {
        const std::string lines = sllm::Guard::logged_errors();
        sllm::fail(sllm::status_of_lines(lines, SLLM_ERR_INVALID), "llama.cpp made no context: %s",
                   lines.empty() ? "it did not say why" : lines.c_str());
    }
    llama_context * c = context->context.get();
    if (llama_get_memory(c) == nullptr) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "the model keeps no memory of its tokens, so it cannot generate");
    }
    context->info.n_ctx = llama_n_ctx(c);
    context->info.n_ctx_seq = llama_n_ctx_seq(c);
    if (llama_model_rope_type(model.model.get()) == LLAMA_ROPE_TYPE_NONE && !llama_model_is_recurrent(model.model.get())) {
        // Learned positions: there is no row for those beyond the training context, and llama.cpp aborts when it looks one up.
        context->info.n_ctx_seq =
            std::min(context->info.n_ctx_seq, static_cast<uint32_t>(std::max(1, llama_model_n_ctx_train(model.model.get()))));
    }
    context->info.n_rollback = llama_n_rs_seq(c);
    context->rollback = model.rollback;
    if (model.rollback == sllm::Rollback::snapshots && context->info.n_rollback == 0) {
        context->rollback = sllm::Rollback::checkpoints;
    }
    context->info.rollback = static_cast<int32_t>(context->rollback);
    context->info.n_batch = llama_n_batch(c);
    context->info.n_ubatch = llama_n_ubatch(c);
    context->info.n_seq_max = llama_n_seq_max(c);
    context->info.n_outputs_max = std::min(params.n_outputs_max, context->info.n_batch);
    context->info.n_vocab = model.n_vocab;
    context->sequences.resize(context->info.n_seq_max);
    sllm::reserve_outputs(*context);
    return context;
}

} // namespace

namespace sllm {

Entry::Entry(sllm_context & c) : context(c) {
    if (context.busy.exchange(true, std::memory_order_acquire)) {
        fail(SLLM_ERR_BUSY, "another thread is inside this context; a context serves one thread at a time");
    }
    if (context.closed || shutting_down()) {
        context.busy.store(false, std::memory_order_release);
        fail(SLLM_ERR_CLOSED, "the context is closed");
    }
    if (context.broken) {
        context.busy.store(false, std::memory_order_release);
        fail(SLLM_ERR_COMPUTE,
             "an assertion of llama.cpp failed in this context before, so its state is unknown; close it and make a new one");
    }
    context.owner.store(std::this_thread::get_id(), std::memory_order_relaxed);
    context.cancel.store(false, std::memory_order_relaxed);
    context.was_interrupted = false;
}

Entry::~Entry() {
    context.owner.store(std::thread::id{}, std::memory_order_relaxed);
    context.busy.store(false, std::memory_order_release);
}

Sequence & sequence_at(sllm_context & context, int32_t seq_id) {
    if (seq_id < 0 || static_cast<size_t>(seq_id) >= context.sequences.size()) {
        fail(SLLM_ERR_INVALID, "sequence %d does not exist: this context has %zu (n_seq_max)", seq_id, context.sequences.size());
    }
    return context.sequences[static_cast<size_t>(seq_id)];
}

void check_sequences(const sllm_context & context, int32_t n_seqs, const int32_t * seq_ids) {
    if (n_seqs < 1) {
        fail(SLLM_ERR_INVALID, "no sequences given");
    }
    std::vector<bool> seen(context.sequences.size(), false);
    for (int32_t i = 0; i < n_seqs; ++i) {
        const int32_t id = seq_ids[i];
        if (id < 0 || static_cast<size_t>(id) >= seen.size()) {
            fail(SLLM_ERR_INVALID, "sequence %d does not exist: this context has %zu (n_seq_max)", id, seen.size());
        }
        if (seen[static_cast<size_t>(id)]) {
            fail(SLLM_ERR_INVALID, "sequence %d is named twice", id);
        }
        seen[static_cast<size_t>(id)] = true;
    }
}

void check_tokens(const sllm_context & context, const int32_t * tokens, size_t n_tokens) {
    for (size_t i = 0; i < n_tokens; ++i) {
        if (tokens[i] < 0 || tokens[i] >= context.info.n_vocab) {
            fail(SLLM_ERR_INVALID, "token %d is not in the vocabulary of %d tokens", tokens[i], context.info.n_vocab);
        }
    }
}

void decode_aborted(sllm_context & context, const std::vector<Row> & rows) {
    context.reserving = true;
    try {
        decode_rows(context, rows);
    } catch (const sllm::Error & error) {
        context.reserving = false;
        if (error.status != SLLM_ERR_CANCELLED) {
            throw;
        }
    }
    context.reserving = false;
}

void compute(sllm_context & context, const std::vector<Write> & writes, float * rows) {
    const size_t n_batch = context.info.n_batch;
    const auto n_vocab = static_cast<size_t>(context.info.n_vocab);
    size_t total = 0;
    size_t outputs = 0;
    for (const Write & w : writes) {
        total += w.end - w.begin + n_nodes(w);
        outputs += w.end - std::min(w.first_output, w.end) + n_nodes(w);
    }
    std::vector<Row> batch;
    batch.reserve(std::min(total, n_batch));

    if (rows != nullptr) { // any number of rows, copied out batch by batch
        size_t in_batch = 0;
        const auto flush = [&] {
            if (batch.empty()) {
                return;
            }
            decode_rows(context, batch);
            if (in_batch > 0) {
                std::memcpy(rows, llama_get_logits(context.context.get()), in_batch * n_vocab * sizeof(float));
                rows += in_batch * n_vocab;
            }
            batch.clear();
            in_batch = 0;
        };
        for (const Write & w : writes) {
            for (size_t p = w.begin; p < w.end; ++p) {
                const bool output = p >= w.first_output && p + w.n_padding < w.end;
                if (batch.size() == n_batch || (output && in_batch == context.info.n_outputs_max)) {
                    flush();
                }
                batch.push_back({w.seq_id, p, output, hidden_at(context, w, p)});
                in_batch += output ? 1 : 0;
            }
        }
        flush();
        return;
    }

    // The rows that are wanted come last and together; what goes before them is split as needed.
    const bool one_call = total <= n_batch;
    if (!one_call) {
        for (const Write & w : writes) {
            for (size_t p = w.begin; p < std::min(w.first_output, w.end); ++p) {
                if (batch.size() == n_batch) {
                    decode_rows(context, batch);
                    batch.clear();
                }
                batch.push_back({w.seq_id, p, false, hidden_at(context, w, p)});
            }
        }
        if (!batch.empty() && batch.size() + outputs > n_batch) {
            decode_rows(context, batch);
            batch.clear();
        }
    }
    for (const Write & w : writes) {
        for (size_t p = one_call ? w.begin : std::max(w.begin, w.first_output); p < w.end; ++p) {
            batch.push_back({w.seq_id, p, p >= w.first_output && p + w.n_padding < w.end, hidden_at(context, w, p)});
        }
        append_nodes(context, w, batch);
    }
    if (!batch.empty()) {
        decode_rows(context, batch);
    }
}

size_t n_embd(const sllm_context & context) { return static_cast<size_t>(llama_model_n_embd(context.model.model.get())); }

void check_has_output(const sllm_context & context) {
    if (!context.model.has_output) {
        fail(SLLM_ERR_UNSUPPORTED, "these layers end before the model's output: they give hidden states, not logits");
    }
}

void check_hidden(const sllm_context & context, const float * hidden, size_t n_rows) {
    if (!context.model.is_layers) {
        if (hidden != nullptr) {
            fail(SLLM_ERR_INVALID, "hidden states are for layers of a model, and this is a whole one");
        }
        return;
    }
    if (hidden == nullptr) {
        fail(SLLM_ERR_UNSUPPORTED, "these are layers of a model: they take hidden states, not tokens");
    }
    const size_t width = n_embd(context);
    for (size_t i = 0; i < n_rows * width; ++i) {
        if (!std::isfinite(hidden[i])) {
            fail(SLLM_ERR_INVALID, "hidden[%zu, %zu] is %g, not a finite number", i / width, i % width, static_cast<double>(hidden[i]));
        }
    }
}

void forward(sllm_context & context, const std::vector<Write> & writes, float * out) {
    std::vector<Row> batch;
    const auto flush = [&] {
        if (batch.empty()) {
            return;
        }
        Capture & capture = context.capture;
        capture.out = out;
        try {
            decode_rows(context, batch);
        } catch (...) {
            capture.out = nullptr;
            throw;
        }
        capture.out = nullptr;
        if (capture.n_seen != batch.size()) {
            fail(SLLM_ERR_COMPUTE, "%zu of %zu hidden states came out of the layers", capture.n_seen, batch.size());
        }
        out += batch.size() * n_embd(context);
        batch.clear();
    };
    for (const Write & w : writes) {
        for (size_t p = w.begin; p < w.end; ++p) {
            // States with snapshots are not gathered with those of other sequences: see note_decoded().
            const bool alone = context.rollback == Rollback::snapshots && !batch.empty() && batch.back().seq_id != w.seq_id;
            if (batch.size() == context.info.n_batch || alone) {
                flush();
            }
            batch.push_back({w.seq_id, p, true, hidden_at(context, w, p)}); // an output, or the last layer would leave it out
        }
        if (n_nodes(w) > 0) { // the nodes of one tree are computed together
            if (batch.size() + n_nodes(w) > context.info.n_batch) {
                flush();
            }
            append_nodes(context, w, batch);
        }
    }
    flush();
}

} // namespace sllm

extern "C" {

int sllm_context_new(sllm_model * model, const struct sllm_context_params * params, sllm_context ** out) {
    *out = nullptr;
    return sllm::guarded([&] { *out = make_context(*model, *params).release(); });
}

int sllm_context_close(sllm_context * context) {
    return sllm::guarded([&] {
        if (context->owner.load(std::memory_order_relaxed) == std::this_thread::get_id()) {
            sllm::fail(SLLM_ERR_BUSY, "this thread is inside the context; it cannot be closed from a callback");
        }
        while (context->busy.exchange(true, std::memory_order_acquire)) {
            context->cancel.store(true, std::memory_order_relaxed);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        context->closed = true;
        context->heads.reset();
        context->sequences.clear();
        if (context->references.load(std::memory_order_acquire) == 1) {
            context->context.reset();
        }
        context->busy.store(false, std::memory_order_release);
    });
}

void sllm_context_retain(sllm_context * context) { context->references.fetch_add(1, std::memory_order_relaxed); }

void sllm_context_release(sllm_context * context) {
    if (context->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        sllm::guarded([&] { delete context; });
    }
}

void sllm_context_get_info(const sllm_context * context, struct sllm_context_info * info) { *info = context->info; }

int sllm_context_set_threads(sllm_context * context, int32_t n_threads, int32_t n_threads_batch) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        if (n_threads < 1 || n_threads > GGML_MAX_N_THREADS || n_threads_batch < 1 || n_threads_batch > GGML_MAX_N_THREADS) {
            sllm::fail(SLLM_ERR_INVALID, "n_threads and n_threads_batch must be in 1..512");
        }
        llama_set_n_threads(context->context.get(), n_threads, n_threads_batch);
        if (context->heads != nullptr) {
            context->heads->set_threads(n_threads, n_threads_batch);
        }
    });
}

void sllm_context_cancel(sllm_context * context) { context->cancel.store(true, std::memory_order_relaxed); }

int sllm_decode(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
                const int32_t * pos, const float * hidden, int32_t logits, float * rows, const float ** view) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_has_output(*context);
        sllm::check_sequences(*context, n_seqs, seq_ids);
        size_t total = 0;
        size_t n_rows = 0;
        for (int32_t i = 0; i < n_seqs; ++i) {
            if (lengths[i] < 0 || (lengths[i] == 0 && logits == SLLM_LOGITS_LAST)) {
                sllm::fail(SLLM_ERR_INVALID, "sequence %d is given %d tokens", seq_ids[i], lengths[i]);
            }
            const auto n = static_cast<size_t>(lengths[i]);
            sllm::checked_position(*context, seq_ids[i], pos == nullptr ? -1 : pos[i], n);
            total += n;
            n_rows += logits == SLLM_LOGITS_ALL ? n : logits == SLLM_LOGITS_LAST ? 1 : 0;
        }
        sllm::check_tokens(*context, tokens, total);
        sllm::check_hidden(*context, hidden, total);
        if (rows == nullptr && n_rows > context->info.n_outputs_max) {
            sllm::fail(SLLM_ERR_INVALID, "%zu rows of logits were asked for, and the context keeps %u (n_outputs_max)", n_rows,
                       context->info.n_outputs_max);
        }
        std::vector<sllm::Write> writes;
        const int32_t * text = tokens;
        for (int32_t i = 0; i < n_seqs; ++i) {
            sllm::Sequence & s = sllm::sequence_at(*context, seq_ids[i]);
            const auto n = static_cast<size_t>(lengths[i]);
            const size_t at = sllm::checked_position(*context, seq_ids[i], pos == nullptr ? -1 : pos[i], n);
            const size_t n_logits = logits == SLLM_LOGITS_ALL ? n : logits == SLLM_LOGITS_LAST ? 1 : 0;
            const size_t begin = sllm::place_tokens(*context, seq_ids[i], at, text, n, hidden == nullptr ? n_logits : n);
            s.start = -1; // what is decoded outright is prompt
            writes.push_back({seq_ids[i], begin, at + n, at + n - n_logits, hidden});
            text += n;
            hidden = hidden == nullptr ? nullptr : hidden + n * sllm::n_embd(*context);
        }
        sllm::compute(*context, writes, rows);
        for (const sllm::Write & w : writes) {
            sllm::sequence_at(*context, w.seq_id).n_committed = w.end;
        }
        if (rows == nullptr && n_rows > 0) {
            *view = llama_get_logits(context->context.get());
            sllm_context_retain(context); // here, where no other thread can close the context in between
        }
    });
}

int sllm_score(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * tokens, const int32_t * lengths,
               float * logprobs, int32_t * ranks) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        sllm::check_hidden(*context, nullptr, 0);
        sllm::check_sequences(*context, n_seqs, seq_ids);
        size_t total = 0;
        for (int32_t i = 0; i < n_seqs; ++i) {
            if (lengths[i] < 2) {
                sllm::fail(SLLM_ERR_INVALID, "sequence %d has %d tokens, and scoring one takes the token before it too", seq_ids[i],
                           lengths[i]);
            }
            sllm::checked_position(*context, seq_ids[i], -1, static_cast<size_t>(lengths[i]) - 1);
            total += static_cast<size_t>(lengths[i]);
        }
        sllm::check_tokens(*context, tokens, total);

        // Rows are used as soon as they are there, so that memory for them stays bounded: as many tokens of as many sequences
        // as the context keeps rows for.
        const auto n_vocab = static_cast<size_t>(context->info.n_vocab);
        const size_t n_max = std::min(context->info.n_batch, context->info.n_outputs_max);
        struct Part {
            const int32_t * next; // the tokens that the rows predict
            size_t n;
        };
        std::vector<sllm::Write> writes;
        std::vector<Part> parts;
        size_t in_batch = 0;
        const auto flush = [&] {
            if (writes.empty()) {
                return;
            }
            sllm::compute(*context, writes, nullptr);
            const float * row = llama_get_logits(context->context.get());
            for (const Part & part : parts) {
                for (size_t j = 0; j < part.n; ++j, row += n_vocab) {
                    const llama_token token = part.next[j];
                    *logprobs++ = static_cast<float>(sllm::log_prob(row, context->info.n_vocab, token));
                    if (ranks != nullptr) {
                        const float value = row[token];
                        *ranks++ = static_cast<int32_t>(std::count_if(row, row + n_vocab, [&](float x) { return x > value; }));
                    }
                }
            }
            for (const sllm::Write & w : writes) {
                sllm::sequence_at(*context, w.seq_id).n_committed = w.end;
            }
            writes.clear();
            parts.clear();
            in_batch = 0;
        };
        const int32_t * text = tokens;
        for (int32_t i = 0; i < n_seqs; ++i) {
            size_t left = static_cast<size_t>(lengths[i]) - 1;
            const int32_t * at = text;
            while (left > 0) {
                if (in_batch == n_max || (!writes.empty() && writes.back().seq_id == seq_ids[i])) {
                    flush();
                }
                const size_t n = std::min(left, n_max - in_batch);
                sllm::Sequence & s = sllm::sequence_at(*context, seq_ids[i]);
                const size_t pos = s.n_committed;
                const size_t begin = sllm::place_tokens(*context, seq_ids[i], pos, at, n, n);
                writes.push_back({seq_ids[i], begin, pos + n, pos});
                parts.push_back({at + 1, n});
                in_batch += n;
                at += n;
                left -= n;
            }
            text += lengths[i];
        }
        flush();
    });
}

} // extern "C"
