// The heads that a model brings for multi-token prediction, as its draft (DeepSeek-V3, 2412.19437, section 2.2; llama.cpp's draft-mtp in
// common/speculative.cpp). A round costs the model no pass: its own last pass gave the hidden states.

#include "mtp.hpp"

#include "ggml-backend.h"

#if defined(SLLM_MTP_UNDECLARED) && !defined(SLLM_NO_MTP) // an installed llama.cpp exports these and declares them nowhere
LLAMA_API void llama_set_embeddings_nextn(struct llama_context * ctx, bool value, bool masked);
LLAMA_API float * llama_get_embeddings_nextn_ith(struct llama_context * ctx, int32_t i);
#elif !defined(SLLM_NO_MTP)
#include "llama-ext.h"
#endif

#include <algorithm>
#include <cstring>

#ifdef SLLM_NO_MTP

namespace sllm {

void Heads::before_decode() {}
void Heads::after_decode() {}
void Heads::cut(llama_seq_id /*seq_id*/, size_t /*length*/) {}
void Heads::copy(llama_seq_id /*source*/, llama_seq_id /*target*/) {}
void Heads::set_threads(int32_t /*n_threads*/, int32_t /*n_threads_batch*/) {}

} // namespace sllm

extern "C" {

int32_t sllm_has_mtp(void) { return 0; }

int sllm_mtp_open(sllm_context * /*context*/, const struct sllm_embedding * /*embedding*/) {
    return sllm::guarded([&] {
        sllm::fail(SLLM_ERR_UNSUPPORTED,
                   "this build links an installed llama.cpp that does not export what MTP heads need (llama-ext.h); use another draft, or "
                   "build sllm without SLLM_USE_SYSTEM_LLAMA");
    });
}

int sllm_mtp_draft(sllm_context * context, int32_t /*n_seqs*/, const int32_t * /*jobs*/, int32_t /*n_items*/,
                   sllm_sampling * const * /*samplings*/, const float * /*p_min*/, int32_t /*stride*/, int32_t * /*draft*/,
                   int32_t * /*drafted*/, float * /*probs*/) {
    return sllm_mtp_open(context, nullptr);
}

} // extern "C"

#else

namespace {

// llama.cpp builds a graph for the heads of these; of others it reads the weights and leaves them out.
struct Architecture {
    const char * name;
    bool only_outputs; // the hidden states that come out are those of the rows with logits, else of all rows
};
constexpr Architecture architectures[] = {
    {"bailingmoe3", false}, {"cohere2moe", false}, {"deepseek2", false}, {"deepseek32", false},     {"glm-dsa", false},
    {"glm4moe", false},     {"hy_v3", false},      {"mimo2", true},      {"nemotron_h_moe", false}, {"qwen35", false},
    {"qwen35moe", false},   {"qwen3next", true},   {"step35", true},
};

const Architecture & checked_architecture(const sllm_model & model) {
    char name[64] = "";
    llama_model_meta_val_str(model.model.get(), "general.architecture", name, sizeof name);
    if (model.n_mtp == 0) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "there are no MTP heads among the weights (%s)",
                   model.is_layers ? "they are loaded with the last layers and the output of a file that has them, and load_mtp"
                   : llama_model_n_layer_nextn(model.model.get()) > 0 ? "the model has some: they were left out of the file, or not loaded"
                                                                      : "nextn_predict_layers is not in the file, or 0");
    }
    const auto * found = std::find_if(std::begin(architectures), std::end(architectures),
                                      [&](const Architecture & a) { return std::strcmp(a.name, name) == 0; });
    if (found == std::end(architectures)) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "llama.cpp does not compute with the MTP heads of the architecture %s", name);
    }
    if (model.n_mtp > 1) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "the model has %d MTP heads, to be used one after the other; only a single one is supported",
                   model.n_mtp);
    }
    return *found;
}

} // namespace

namespace sllm {

Heads::Heads(sllm_context & c, std::unique_ptr<const EmbeddingRows> rows)
    : target(c), only_outputs(checked_architecture(c.model).only_outputs),
      width(static_cast<size_t>(llama_model_n_embd_out(c.model.model.get()))), n_batch(c.info.n_batch), zeros(width, 0.0F),
      states(c.sequences.size()), embedding(std::move(rows)) {
    check_graph(c.model, true);
    llama_context_params p = target.params;
    p.ctx_type = LLAMA_CONTEXT_TYPE_MTP;
    p.n_outputs_max = target.info.n_seq_max;
    p.n_rs_seq = 0;
    p.cb_eval = embedding == nullptr ? nullptr : on_node; // that of layers looks for where their hidden states go in and come out
    p.cb_eval_user_data = this;
    context.reset(llama_init_from_model(target.model.model.get(), p));
    if (context == nullptr) {
        const std::string lines = Guard::logged_errors();
        fail(status_of_lines(lines, SLLM_ERR_UNSUPPORTED), "llama.cpp made no context of the MTP heads: %s",
             lines.empty() ? "it did not say why" : lines.c_str());
    }
    // Where all rows come out, "masked" would take the first of them for those with logits.
    llama_set_embeddings_nextn(context.get(), true, only_outputs);
}

// The model's hidden state for the position before `pos`; zeros where it is not kept, as in front of the first one.
const float * Heads::hidden_before(const State & s, size_t pos) const {
    const size_t n = s.hidden.size() / width;
    return pos > s.first && pos - s.first <= n ? s.hidden.data() + (pos - 1 - s.first) * width : zeros.data();
}

// Rows for the positions in front of `end` that the heads lack and whose hidden states are known, all but perhaps the first one's. Where
// more are missing, the heads begin anew behind them.
void Heads::append_missing(llama_seq_id seq_id, size_t end, std::vector<Row> & rows) {
    State & s = state(seq_id);
    if (!s.ahead.empty()) {
        drop_ahead(seq_id);
    }
    if (s.hidden.empty()) {
        return;
    }
    if (s.end > s.begin && s.first > s.end) {
        drop(seq_id);
    }
    const bool is_empty = s.end == s.begin;
    const size_t known = s.first + s.hidden.size() / width;
    const std::vector<llama_token> & tokens = target.sequences[static_cast<size_t>(seq_id)].tokens;
    for (size_t p = !is_empty ? s.end : s.first == 0 ? 0 : s.first + 1; p < std::min(known, end); ++p) {
        rows.push_back({seq_id, p, tokens[p], hidden_before(s, p), false});
    }
}

void Heads::drop_ahead(llama_seq_id seq_id) {
    State & s = state(seq_id);
    s.ahead.clear();
    llama_memory_t memory = llama_get_memory(context.get());
    if (s.end == s.begin || !llama_memory_seq_rm(memory, seq_id, static_cast<llama_pos>(s.end), -1)) {
        llama_memory_seq_rm(memory, seq_id, -1, -1);
        s.begin = s.end = 0;
    }
}

void Heads::drop(llama_seq_id seq_id) {
    state(seq_id).end = state(seq_id).begin;
    drop_ahead(seq_id);
}

// In the graph of the heads of a model's last layers: the rows that llama.cpp has looked up in a matrix that is not the model's embedding
// are replaced by those of its file. A head with an embedding of its own, which is among its weights, has found the right ones.
bool Heads::on_node(ggml_tensor * tensor, bool ask, void * user_data) {
    auto & heads = *static_cast<Heads *>(user_data);
    if (std::strncmp(tensor->name, "mtp_tok_embd-", std::strlen("mtp_tok_embd-")) != 0) {
        return !ask;
    }
    if (tensor->op == GGML_OP_GET_ROWS && std::strcmp(tensor->src[0]->name, "token_embd.weight") != 0) {
        heads.n_embedded += ask ? static_cast<size_t>(tensor->ne[1]) : 0;
        return !ask;
    }
    if (ask) {
        return true;
    }
    try { // not through llama.cpp's scheduler, which called
        heads.embed(tensor);
    } catch (const std::exception & error) {
        heads.embedding_error = error.what();
    }
    return heads.embedding_error.empty();
}

void Heads::embed(ggml_tensor * tensor) {
    const auto n_rows = static_cast<size_t>(tensor->ne[1]);
    const auto n_columns = static_cast<size_t>(tensor->ne[0]);
    if (tensor->op != GGML_OP_GET_ROWS || tensor->src[1]->type != GGML_TYPE_I32 || n_columns != n_embd(target)) {
        return; // decode() finds rows missing
    }
    std::vector<int32_t> tokens(n_rows);
    ggml_backend_tensor_get(tensor->src[1], tokens.data(), 0, n_rows * sizeof(int32_t));
    std::vector<float> found(n_rows * n_columns);
    for (size_t i = 0; i < n_rows; ++i) {
        embedding->read(tokens[i], found.data() + i * n_columns);
    }
    ggml_backend_tensor_set(tensor, found.data(), 0, found.size() * sizeof(float));
    n_embedded += n_rows;
}

// One llama_decode() of a token and a hidden state each. On failure the heads hold what they held.
void Heads::decode(const std::vector<Row> & rows) {
    const size_t n = rows.size();
    std::vector<llama_token> token(n);
    std::vector<float> hidden(n * width);
    std::vector<llama_pos> pos(n);
    std::vector<int32_t> n_seq_id(n, 1);
    std::vector<llama_seq_id> seq(n);
    std::vector<llama_seq_id *> seq_id(n + 1, nullptr);
    std::vector<int8_t> logits(n);
    for (size_t i = 0; i < n; ++i) {
        token[i] = rows[i].token;
        std::copy_n(rows[i].hidden, width, hidden.data() + i * width);
        pos[i] = static_cast<llama_pos>(rows[i].pos);
        seq[i] = rows[i].seq_id;
        seq_id[i] = &seq[i];
        logits[i] = rows[i].output ? 1 : 0;
    }
    llama_batch batch{};
    batch.n_tokens = static_cast<int32_t>(n);
    batch.token = token.data();
    batch.embd = hidden.data();
    batch.pos = pos.data();
    batch.n_seq_id = n_seq_id.data();
    batch.seq_id = seq_id.data();
    batch.logits = logits.data();

    if (target.params.abort_callback(target.params.abort_callback_data)) {
        fail_stopped(target);
    }
    n_embedded = 0;
    embedding_error.clear();
    int32_t rc = 0;
    try {
        rc = llama_decode(context.get(), batch);
    } catch (...) {
        broken = true;
        throw;
    }
    const bool is_embedded = embedding == nullptr || n_embedded == n;
    if (rc == 0 && !target.was_interrupted && is_embedded) {
        return;
    }
    for (const Row & row : rows) {
        drop_ahead(row.seq_id);
    }
    if (rc == 0 && !target.was_interrupted) {
        fail(SLLM_ERR_COMPUTE, "the MTP heads got the embeddings of %zu of %zu tokens: %s", n_embedded, n,
             embedding_error.empty() ? "llama.cpp's graph has no \"mtp_tok_embd\"" : embedding_error.c_str());
    }
    if (rc == 0 || rc == 2) {
        fail_stopped(target);
    }
    const std::string lines = Guard::logged_errors();
    fail(rc == 1 ? SLLM_ERR_FULL : SLLM_ERR_COMPUTE, "llama_decode() of the MTP heads returned %d: %s", rc,
         lines.empty() ? "it did not say why" : lines.c_str());
}

// Rows that were computed with the model's hidden states are held for good.
void Heads::hold(const std::vector<Row> & rows) {
    for (const Row & row : rows) {
        State & s = state(row.seq_id);
        if (s.end == s.begin) {
            s.begin = row.pos;
        }
        s.end = row.pos + 1;
    }
}

void Heads::feed(const std::vector<Row> & rows) {
    for (size_t i = 0; i < rows.size(); i += n_batch) {
        const auto begin = rows.begin() + static_cast<std::ptrdiff_t>(i);
        const std::vector<Row> part(begin, begin + static_cast<std::ptrdiff_t>(std::min(n_batch, rows.size() - i)));
        decode(part);
        hold(part);
    }
}

// Of the hidden states all are used but the last, which goes with the next token.
void Heads::forget_used(State & s) const {
    const size_t n = s.hidden.size() / width;
    const size_t used = n == 0 ? 0 : std::min(n - 1, s.end > s.first + 1 ? s.end - s.first - 1 : 0);
    s.hidden.erase(s.hidden.begin(), s.hidden.begin() + static_cast<std::ptrdiff_t>(used * width));
    s.first += used;
}

void Heads::before_decode() {
    if (broken || std::none_of(states.begin(), states.end(), [&](const State & s) { return s.hidden.size() > (most_kept + 1) * width; })) {
        return;
    }
    std::vector<Row> rows;
    for (size_t i = 0; i < states.size(); ++i) {
        append_missing(static_cast<llama_seq_id>(i), states[i].certain, rows);
    }
    try {
        feed(rows);
    } catch (const Error & error) {
        if (error.status == SLLM_ERR_CANCELLED || error.status == SLLM_ERR_INTERRUPTED) {
            throw;
        }
        for (const Row & row : rows) { // the text goes on without them, and they begin anew behind it
            drop(row.seq_id);
        }
    }
    for (State & s : states) {
        forget_used(s);
    }
}

void Heads::after_decode() {
    for (size_t i = 0; !broken && i < target.batch_seq.size(); ++i) {
        const llama_seq_id seq_id = target.batch_seq[i];
        const auto pos = static_cast<size_t>(target.batch_pos[i]);
        State & s = state(seq_id);
        if (!s.ahead.empty()) {
            // Not the batch's token, which is none where layers are given hidden states.
            const bool is_next = pos == s.end && s.ahead.front() == target.sequences[static_cast<size_t>(seq_id)].tokens[pos];
            s.end += is_next ? 1 : 0; // the first row ahead had the model's own hidden state, too
            drop_ahead(seq_id);
        }
        if (i == 0 || target.batch_seq[i - 1] != seq_id) {
            s.certain = pos;
        }
        if (s.certain == pos && target.batch_logits[i] == 0) { // drafted tokens always have logits
            s.certain = pos + 1;
        }
        const size_t n = s.hidden.size() / width;
        if (n == 0 || pos < s.first || pos > s.first + n) {
            s.hidden.clear();
            s.first = pos;
        } else {
            s.hidden.resize((pos - s.first) * width);
        }
        const float * row = llama_get_embeddings_nextn_ith(target.context.get(), static_cast<int32_t>(i));
        s.hidden.insert(s.hidden.end(), row, row + width);
    }
}

void Heads::cut(llama_seq_id seq_id, size_t length) {
    State & s = state(seq_id);
    if (s.end > length) {
        s.end = std::max(length, s.begin);
        drop_ahead(seq_id);
    }
    const size_t n = s.hidden.size() / width;
    if (s.first + n > length) {
        s.hidden.resize(length > s.first ? (length - s.first) * width : 0);
    }
}

void Heads::copy(llama_seq_id source, llama_seq_id to) {
    cut(to, 0);
    drop_ahead(to);
    drop_ahead(source);
    const State & from = state(source);
    State & s = state(to);
    if (from.end > from.begin) {
        llama_memory_seq_cp(llama_get_memory(context.get()), source, to, -1, -1);
    }
    s = State{};
    s.begin = from.begin;
    s.end = from.end;
    s.first = from.first;
    s.hidden = from.hidden;
}

void Heads::set_threads(int32_t n_threads, int32_t n_threads_batch) { llama_set_n_threads(context.get(), n_threads, n_threads_batch); }

// The rows of the first pass: what the heads lack of each text, and one that gives something to go on with.
std::vector<Heads::Row> Heads::first_rows(const std::vector<Job> & jobs, std::vector<Progress> & active) {
    std::vector<Row> missing;
    std::vector<Row> next;
    for (size_t i = 0; i < jobs.size(); ++i) {
        const Job & job = jobs[i];
        State & s = state(job.seq_id);
        cut(job.seq_id, job.pos);
        if (job.n_more == 0 || sequence_at(target, job.seq_id).n_cached < job.pos) {
            continue; // the model has to compute some of the text again first, and what the heads hold is good for after that
        }
        const bool goes_on = s.ahead.size() + 1 == job.n_tokens && s.end == job.pos && !s.ahead.empty() &&
                             std::equal(s.ahead.begin(), s.ahead.end(), job.tokens);
        if (goes_on) {
            const size_t n = s.ahead.size();
            next.push_back({job.seq_id, job.pos + n, job.tokens[n], s.own.data(), true});
            active.push_back({i, n + 1});
            continue;
        }
        append_missing(job.seq_id, job.pos, missing);
        const size_t held = !missing.empty() && missing.back().seq_id == job.seq_id ? missing.back().pos + 1 : s.end;
        if (held != job.pos) { // a hole: what is held is of no use
            while (!missing.empty() && missing.back().seq_id == job.seq_id) {
                missing.pop_back();
            }
            drop(job.seq_id);
            s.begin = s.end = job.pos;
        }
        next.push_back({job.seq_id, job.pos, job.tokens[0], hidden_before(s, job.pos), true});
        active.push_back({i, 1});
    }
    if (only_outputs || missing.size() + next.size() > n_batch) {
        feed(missing);
        missing.clear();
    }
    missing.insert(missing.end(), next.begin(), next.end());
    return missing;
}

// Selectors that may run ahead of the text, ready behind what is given of it.
void Heads::begin_selections(const std::vector<Job> & jobs, const std::vector<Progress> & active, std::vector<Selector> & ahead) {
    for (const Progress & one : active) {
        const Job & job = jobs[one.job];
        const Sequence & text = sequence_at(target, job.seq_id);
        const auto here = static_cast<int32_t>(job.pos) + 1;
        const int32_t start = std::min(job.start >= 0 ? job.start : text.start >= 0 ? text.start : here, here);
        if (needs_history(*job.sampling)) {
            State & s = state(job.seq_id);
            Job committed = job;
            committed.n_tokens = 1;
            begin_selection(s.selector, text, committed, start);
            ahead[one.job] = s.selector.clone();
            for (size_t j = 1; j < job.n_tokens; ++j) {
                ahead[one.job].accept(job.tokens[j]);
            }
        } else {
            ahead[one.job].begin(*job.sampling, {}, -1);
        }
    }
}

void Heads::draft(const std::vector<Job> & jobs, const Chains & chains) {
    std::vector<Progress> active;
    std::vector<Row> rows = first_rows(jobs, active);
    std::vector<Selector> ahead(jobs.size());
    begin_selections(jobs, active, ahead);
    while (!active.empty()) {
        // 1. One pass. A row behind what is held stays only until the text has gone on.
        try {
            decode(rows);
        } catch (const Error & error) {
            const bool has_some =
                std::any_of(active.begin(), active.end(), [&](const Progress & one) { return chains.lengths[one.job] > 0; });
            if (has_some && (error.status == SLLM_ERR_CANCELLED || error.status == SLLM_ERR_FULL)) {
                return; // a draft is only a hint: a shorter one will do
            }
            throw;
        }
        std::vector<Row> held;
        std::copy_if(rows.begin(), rows.end(), std::back_inserter(held), [](const Row & row) { return !row.output; });
        hold(held);
        // 2. What comes next: a token that was given, or the one that the head selects.
        std::vector<Row> next;
        std::vector<Progress> still;
        size_t at = 0;
        for (Progress one : active) {
            while (!rows[at].output) {
                ++at;
            }
            const Job & job = jobs[one.job];
            State & s = state(job.seq_id);
            const auto index = static_cast<int32_t>(at);
            const float * own = llama_get_embeddings_nextn_ith(context.get(), index);
            s.own.assign(own, own + width);
            s.ahead.push_back(rows[at].token);
            llama_token token = -1;
            if (one.n_computed < job.n_tokens) {
                token = job.tokens[one.n_computed++];
            } else if (chains.extend(one.job, target, job, ahead[one.job], llama_get_logits_ith(context.get(), index))) {
                token = chains.last(one.job);
            }
            if (token >= 0) {
                next.push_back({job.seq_id, rows[at].pos + 1, token, s.own.data(), true});
                still.push_back(one);
            }
            ++at;
        }
        for (const Progress & one : active) {
            forget_used(state(jobs[one.job].seq_id));
        }
        rows.swap(next);
        active.swap(still);
    }
}

} // namespace sllm

extern "C" {

int32_t sllm_has_mtp(void) { return 1; }

int sllm_mtp_open(sllm_context * context, const struct sllm_embedding * embedding) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        if (context->heads != nullptr) {
            return;
        }
        sllm::check_has_output(*context);
        checked_architecture(context->model);
        std::unique_ptr<const sllm::EmbeddingRows> rows;
        if (context->model.is_layers) {
            if (embedding == nullptr) {
                sllm::fail(SLLM_ERR_INVALID, "these are layers of a model, whose heads need its embedding, and none is given");
            }
            rows = std::make_unique<sllm::EmbeddingRows>(*embedding, sllm::n_embd(*context));
        }
        if (context->references.load(std::memory_order_acquire) > 1) {
            sllm::fail(SLLM_ERR_INVALID,
                       "logits of this context are still in use, and its buffers have to change: copy and drop them first");
        }
        auto heads = std::make_shared<sllm::Heads>(*context, std::move(rows));
        llama_memory_clear(llama_get_memory(context->context.get()), false);
        for (sllm::Sequence & s : context->sequences) {
            s = sllm::Sequence{};
        }
        llama_set_embeddings_nextn(context->context.get(), true, false);
        sllm::reserve_outputs(*context);
        context->heads = std::move(heads);
    });
}

int sllm_mtp_draft(sllm_context * context, int32_t n_seqs, const int32_t * items, int32_t n_items, sllm_sampling * const * samplings,
                   const float * p_min, int32_t stride, int32_t * draft, int32_t * drafted, float * probs) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        if (context->heads == nullptr) {
            sllm::fail(SLLM_ERR_INVALID, "the MTP heads of this context are not open");
        }
        const std::vector<sllm::Job> jobs = sllm::read_jobs(*context, n_seqs, items, n_items, samplings, stride, false);
        const sllm::Chains chains{p_min, static_cast<size_t>(stride), draft, drafted, probs};
        chains.begin(jobs.size());
        for (const sllm::Job & job : jobs) {
            sllm::Sequence & s = sllm::sequence_at(*context, job.seq_id);
            s.n_committed = job.pos;
            sllm::uncache(*context, job.seq_id, job.pos);
        }
        context->heads->draft(jobs, chains);
    });
}

} // extern "C"

#endif
